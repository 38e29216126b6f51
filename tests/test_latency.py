"""Latency targets from Python, on the CPU: serving keeps its time while training takes the rest, a burst takes over at once,
shares follow weights. Times are the machine's own and compared with what the same machine does without a target."""

import json
import statistics
import threading
import time

import loquetier_core as lq
import numpy as np
import pytest

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 255,
}


def make_engine(**options) -> lq.Engine:
    defaults = dict(device="cpu", num_threads=1, max_batch_tokens=1024, max_sequences=16, kv_cache_tokens=8192, seed=3)
    return lq.Engine(CONFIG, **{**defaults, **options})


def examples(seed: int, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, length).tolist() for _ in range(count)]


def greedy(tokens: int) -> lq.SamplingParams:
    return lq.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def serve(engine: lq.Engine, train: bool, tokens: int = 60) -> tuple[float, int]:
    """Median gap between tokens of four requests, seconds, and training rows meanwhile; a job is always waiting with `train`."""
    job = 0
    prompts = examples(9, 4, 24)
    ids = {engine.submit_infer(p, sampling=greedy(tokens)) for p in prompts}
    before = engine.stats().train_tokens
    gaps, last = [], None
    while ids:
        if train and engine.stats().queued_examples < 8:
            engine.submit_train("learner", examples(job, 8, 200), optimizer=lq.AdamW(lr=1e-4))
            job += 1
        result = engine.step()
        if result.tokens:
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now
        ids -= {r.request_id for r in result.finished}
    return statistics.median(gaps), engine.stats().train_tokens - before


def test_tokens_keep_their_time_beside_training():
    with make_engine() as engine:
        engine.add_adapter("learner", lq.LoraConfig(r=4, target_modules="all-linear"))
        serve(engine, train=False)
        alone, _ = serve(engine, train=False)
        unbounded, _ = serve(engine, train=True)
    target = max(4 * alone, 0.004)
    if unbounded < 2 * target:
        pytest.skip("training whole micro-batches does not disturb serving on this machine")
    with make_engine(latency=lq.LatencyTarget(ttft_ms=5000, tpot_ms=target * 1e3)) as engine:
        engine.add_adapter("learner", lq.LoraConfig(r=4, target_modules="all-linear"))
        serve(engine, train=True)  # the cost model learns
        gap, rows = serve(engine, train=True)
        stats = engine.stats()
    assert rows > 0, "training went on beside"
    assert gap <= 1.3 * target
    assert gap < 0.8 * unbounded
    assert 0 < stats.training_seconds <= stats.step_seconds
    assert stats["prediction_error_median"] < 1


def test_a_burst_takes_the_machine_and_gives_it_back():
    with make_engine(latency=lq.LatencyTarget(ttft_ms=5000, tpot_ms=50)) as engine:
        engine.add_adapter("learner", lq.LoraConfig(r=4, target_modules="all-linear"))
        job = engine.submit_train("learner", examples(1, 40, 400), optimizer=lq.AdamW())
        for _ in range(3):
            engine.step()
        done = threading.Event()
        ids: list[int] = []

        def burst() -> None:
            time.sleep(0.02)  # into the middle of a step
            ids.extend(engine.submit_infer(p, sampling=greedy(4)) for p in examples(2, 10, 12))
            done.set()

        thread = threading.Thread(target=burst)
        thread.start()
        finished = {}
        trained = []
        steps_after = 0
        while engine.has_work() or not done.is_set():
            result = engine.step()
            finished |= {r.request_id: r for r in result.finished}
            trained += result.trained
            steps_after += done.is_set() and not finished
        thread.join()
        assert set(ids) == set(finished)
        assert steps_after < 40
        assert all(r.finish_reason == "length" and r.deadline_met for r in finished.values())
        assert all(r.queue_seconds <= r.ttft_seconds for r in finished.values())
        assert [t.job_id for t in trained] == [job] and trained[0].applied
        assert trained[0].steps > 1 and trained[0].seconds >= trained[0].queue_seconds


def test_the_burst_is_in_the_next_step():
    with make_engine(latency=lq.LatencyTarget(ttft_ms=5000, tpot_ms=50)) as engine:
        engine.add_adapter("learner", lq.LoraConfig(r=4, target_modules="all-linear"))
        engine.submit_train("learner", examples(1, 10, 400))
        engine.step()
        request = engine.submit_infer(list(range(20)), sampling=greedy(2))
        assert [t.request_id for t in engine.step().tokens] == [request]


def test_training_is_shared_by_weight():
    with make_engine(slice_rows=64, max_batch_tokens=512) as engine:
        for name in ("one", "three"):
            engine.add_adapter(name, lq.LoraConfig(r=2))
        counts = {"one": 0, "three": 0}
        for i in range(60):  # many small jobs without a barrier: only the shares decide
            engine.submit_train("one", examples(i, 1, 32), weight=1)
            engine.submit_train("three", examples(i, 1, 32), weight=3)
        while counts["three"] < 45:
            for r in engine.step().trained:
                counts[r.adapter] += 1
        assert counts["one"] > 0
        assert 2 <= counts["three"] / counts["one"] <= 4.5


def test_same_losses_and_weights_with_and_without_a_target():
    def run(**options):
        with make_engine(**options) as engine:
            engine.add_adapter("learner", lq.LoraConfig(r=4, init_lora_weights=False))
            losses = []
            for i in range(3):
                engine.submit_train("learner", examples(i, 4, 90), optimizer=lq.AdamW(lr=1e-3))
                while engine.has_work():
                    losses += [r.loss for r in engine.step().trained]
            return losses, engine.adapter_state("learner", "master")

    losses, weights = run()
    pieces, cut = run(latency=lq.LatencyTarget(ttft_ms=100, tpot_ms=1), slice_rows=24)
    np.testing.assert_allclose(pieces, losses, rtol=1e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(cut[name], value, rtol=0, atol=1e-4 * max(np.abs(value).max(), 1e-2))


def test_rejected_and_late():
    with make_engine() as engine:
        prompt = list(range(10))
        rejected = engine.submit_infer(prompt, sampling=greedy(2), deadline_ms=1, reject_late=True)
        late = engine.submit_infer(prompt, sampling=greedy(2), deadline_ms=1)
        time.sleep(0.005)
        results = {}
        while engine.has_work():
            results |= {r.request_id: r for r in engine.step().finished}
        assert results[rejected].finish_reason == "rejected" and "1 ms" in results[rejected].error
        assert results[late].finish_reason == "length" and not results[late].deadline_met
        assert engine.stats().deadlines_missed == 2 and engine.stats().rejected_requests == 1


def test_trace(tmp_path):
    with make_engine(latency=lq.LatencyTarget(ttft_ms=500, tpot_ms=50)) as engine:
        engine.add_adapter("learner", lq.LoraConfig(r=2))
        engine.start_trace(tmp_path / "trace.json")
        engine.submit_train("learner", examples(1, 2, 50))
        engine.submit_infer([1, 2, 3], sampling=greedy(3))
        steps = 0
        while engine.has_work():
            engine.step()
            steps += 1
        engine.stop_trace()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e["name"] == "step" for e in events) == steps
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_target_values():
    target = lq.LatencyTarget(ttft_ms=200, tpot_ms=30)
    assert (target.ttft_ms, target.tpot_ms) == (200, 30)
    assert "tpot_ms=30" in repr(target)
    with pytest.raises(lq.InvalidArgument, match="tpot_ms"):
        make_engine(latency=lq.LatencyTarget(tpot_ms=0))
    with pytest.raises(lq.InvalidArgument, match="LatencyTarget"):
        make_engine(latency=30)
    with make_engine() as engine, pytest.raises(lq.InvalidArgument, match="reject_late"):
        engine.submit_infer([1, 2], reject_late=True)
