"""Engine.plan_memory: shares of a device that need not be there, the errors, and the engine's own figures."""

import subprocess
import sys

import loquetier_core as lq
import pytest
from loquetier_core.__main__ import LLAMA_8B

TINY = LLAMA_8B | {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WIDE = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_attention_heads": 16}  # for a GPU
SHARES = (
    "weight_bytes",
    "kv_bytes",
    "adapter_pool_bytes",
    "saved_bytes",
    "scratch_bytes",
    "metadata_bytes",
    "workspace_bytes",
    "training_state_bytes",
)


def test_the_shares_of_a_gpu_that_is_not_there():
    plan = lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=139 << 30, rank=64)
    assert plan.at_start and plan.device == "cuda:0" and plan.rank == 64
    assert sum(getattr(plan, share) for share in SHARES) == plan.budget_bytes
    assert plan.kv_tokens > 100_000 and plan.adapters >= 25
    serving = lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=139 << 30, max_train_tokens=0)
    assert serving.saved_bytes == 0 and serving.kv_tokens > plan.kv_tokens
    pieces = lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=139 << 30, rank=64, latency=lq.LatencyTarget())
    assert pieces.saved_bytes > plan.saved_bytes and pieces.kv_tokens < plan.kv_tokens
    assert sum(getattr(pieces, share) for share in SHARES) == pieces.budget_bytes
    sliced = lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=139 << 30, slice_rows=512)
    assert sliced.saved_bytes == pieces.saved_bytes
    for line in ("weights", "kv", "adapter pool", "saved", "training state"):
        assert line in str(plan)


def test_what_does_not_fit():
    with pytest.raises(lq.OutOfMemory, match="max_train_tokens"):
        lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=24 << 30)
    with pytest.raises(lq.InvalidArgument, match="plan_memory latency"):
        lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=80 << 30, latency=5)
    with pytest.raises(lq.InvalidArgument, match="rank"):
        lq.Engine.plan_memory(LLAMA_8B, device="cuda", device_bytes=80 << 30, rank=257)
    with pytest.raises(lq.InvalidArgument, match="max_train_tokens"):
        lq.Engine.plan_memory(LLAMA_8B, device="cpu", max_batch_tokens=64, max_train_tokens=100)


def test_an_engine_on_the_cpu_takes_memory_as_it_needs_it(tmp_path):
    options = {"device": "cpu", "max_batch_tokens": 64, "max_sequences": 4, "kv_cache_tokens": 256, "adapter_pool_bytes": 1 << 20}
    plan = lq.Engine.plan_memory(TINY, **options)
    assert not plan.at_start and plan.kv_tokens == 256
    with lq.Engine(TINY, num_threads=1, **options) as engine:
        stats = engine.stats()
        assert stats.kv_bytes == plan.kv_bytes and stats.adapter_pool_bytes == plan.adapter_pool_bytes
        assert stats.saved_bytes == stats.scratch_bytes == 0 and stats.training_state_limit == -1
        engine.add_adapter("a", lq.LoraConfig(r=4))
        engine.submit_train("a", [[1, 2, 3, 4, 5]], optimizer=lq.AdamW(lr=1e-3))
        while engine.has_work():
            engine.step()
        stats = engine.stats()
        assert 0 < stats.saved_bytes <= plan.saved_bytes and 0 < stats.scratch_bytes <= plan.scratch_bytes
        assert 0 < stats.host_seconds < stats.step_seconds
    with lq.Engine(TINY, num_threads=1, max_train_tokens=0, **options) as engine:
        engine.add_adapter("a", lq.LoraConfig(r=4))
        with pytest.raises(lq.InvalidArgument, match="training is off"):
            engine.submit_train("a", [[1, 2, 3]])


def test_the_report_of_a_model(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    command = [sys.executable, "-m", "loquetier_core", "report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "adapter pool" in done.stdout and "training state" in done.stdout
    missing = subprocess.run([*command, str(tmp_path / "missing")], capture_output=True, text=True)
    assert missing.returncode == 2 and "config.json" in missing.stderr


@pytest.fixture
def card():
    """torch on a GPU, to fill the memory that an engine wants; skipped without one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        lq.Engine(WIDE, device="cuda", kv_cache_tokens=64, adapter_pool_bytes=1 << 20).close()
    except lq.DeviceError as error:
        pytest.skip(str(error))
    yield torch
    torch.cuda.empty_cache()


def fill(torch, leave: int):
    """Takes all device memory but `leave` bytes, down to pieces of 1 MiB; freed when the result is."""
    taken = []
    piece = 1 << 36
    while piece >= 1 << 20:
        if torch.cuda.mem_get_info()[0] - leave >= piece:
            try:
                taken.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
                continue
            except torch.cuda.OutOfMemoryError:
                pass
        piece //= 2
    return taken


@pytest.mark.gpu
def test_no_memory_on_the_card_at_start(card):
    options = {"device": "cuda", "kv_cache_tokens": 4096, "adapter_pool_bytes": 1 << 30, "max_batch_tokens": 64}
    taken = fill(card, leave=300 << 20)
    with pytest.raises(lq.OutOfMemory, match="expected the shares below to fit"):
        lq.Engine(WIDE, **options)
    before = card.cuda.mem_get_info()[0]
    with pytest.raises(lq.OutOfMemory):  # and what the refused engine took is given back
        lq.Engine(WIDE, **options)
    assert abs(card.cuda.mem_get_info()[0] - before) <= 32 << 20
    taken.clear()
    card.cuda.empty_cache()
    with lq.Engine(WIDE, **options) as engine:
        request = engine.submit_infer([1, 2, 3], sampling=lq.SamplingParams(max_tokens=4, ignore_eos=True))
        assert [r.request_id for r in drain(engine)[0]] == [request]


@pytest.mark.gpu
def test_no_memory_on_the_card_in_the_middle(card):
    """Training state is the one thing taken later: without memory for it the job ends with the reason, all else goes on."""
    options = {"device": "cuda", "kv_cache_tokens": 4096, "adapter_pool_bytes": 1 << 28, "max_batch_tokens": 256}
    with lq.Engine(WIDE, **options) as engine:
        engine.add_adapter("a", lq.LoraConfig(r=256, target_modules=["all-linear"]))
        warm = engine.submit_infer([1, 2, 3], adapter="a", sampling=lq.SamplingParams(max_tokens=4, ignore_eos=True))
        assert drain(engine)[0][0].request_id == warm
        taken = fill(card, leave=0)
        job = engine.submit_train("a", [list(range(1, 50))], optimizer=lq.AdamW(lr=1e-3))
        request = engine.submit_infer([4, 5, 6], adapter="a", sampling=lq.SamplingParams(max_tokens=8, ignore_eos=True))
        finished, trained = drain(engine)
        assert [r.finish_reason for r in finished] == ["length"] and finished[0].request_id == request
        assert [t.job_id for t in trained] == [job] and not trained[0].applied
        assert "expected room for" in trained[0].reason and "bytes" in trained[0].reason
        taken.clear()
        card.cuda.empty_cache()
        job = engine.submit_train("a", [list(range(1, 50))], optimizer=lq.AdamW(lr=1e-3))
        assert [t.applied for t in drain(engine)[1]] == [True]


def drain(engine):
    """(finished requests, ended training jobs)."""
    finished, trained = [], []
    while engine.has_work():
        result = engine.step()
        finished += result.finished
        trained += result.trained
    return finished, trained
