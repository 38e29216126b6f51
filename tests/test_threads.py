"""Threads and lifetime: submit, cancel and look from many threads while one steps; a re-entered step; an engine used after close.

The same races run under ThreadSanitizer in the C++ tests. Read next: test_bad_input.py.
"""

from __future__ import annotations

import random
import threading
import time

import loquetier_core as lq
import pytest
from helpers import adapters, drive, models
from helpers.oracle import make_examples

pytest_plugins = ["helpers.fixtures"]

SEED = 83


def run_threads(*bodies) -> None:
    """Runs all at once; the first exception of any is raised here."""
    failures = []

    def guarded(body):
        try:
            body()
        except BaseException as error:  # handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def test_submit_and_cancel_while_stepping(bench):
    """Every request ends once, the cancelled as a prefix of their tokens, the others with all of them; training goes on
    meanwhile."""
    print("seed", SEED)
    engine = bench.engine(adapters.NAMES, max_sequences=12, max_batch_tokens=128)
    tenants = [None, "attn", "wide", "gated"]
    prompts = models.prompts(6, bench.vocab_size, SEED, longest=12)
    want = {(t, i): bench.oracle.greedy(t, p, 10) for t in tenants for i, p in enumerate(prompts)}
    submitted, cancelled, jobs = {}, set(), []
    lock, submitters_left = threading.Lock(), [4]
    collected = drive.Collected()

    def submitter(index):
        rng = random.Random(SEED + index)
        try:
            for _ in range(40):
                key = rng.choice(list(want))
                request = engine.submit_infer(prompts[key[1]], adapter=key[0], sampling=drive.greedy(10), priority=rng.randrange(3))
                with lock:
                    submitted[request] = key
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 0.003)
                    if engine.cancel(request):
                        with lock:
                            cancelled.add(request)
                if rng.random() < 0.1:
                    examples = drive.to_examples(make_examples(1, bench.vocab_size, index))
                    job = engine.submit_train("upper", examples, optimizer=lq.AdamW())
                    with lock:
                        jobs.append(job)
        finally:
            with lock:
                submitters_left[0] -= 1

    def stepper():
        while submitters_left[0] or engine.has_work():
            collected.add(engine.step())

    def watcher():
        rng = random.Random(SEED)
        while submitters_left[0]:
            stats = engine.stats()
            assert 0 <= stats.running_requests <= 12 and stats.kv_pages_free >= 0
            assert len(engine.adapters()) in (len(adapters.NAMES), len(adapters.NAMES) + 1)
            name = f"temporary-{rng.randrange(10**6)}"
            engine.add_adapter(name, lq.LoraConfig(r=2))
            engine.remove_adapter(name)

    run_threads(stepper, watcher, *(lambda i=i: submitter(i) for i in range(4)))
    assert set(collected.finished) == set(submitted) and set(collected.trained) == set(jobs)
    for request, key in submitted.items():
        result = collected.finished[request]
        if request in cancelled and result.finish_reason == "cancelled":
            assert list(result.token_ids) == want[key][: len(result.token_ids)]
        else:  # a request may end in the very step that was to cancel it
            assert result.finish_reason == "length" and list(result.token_ids) == want[key], (request, key)
    assert all(collected.trained[job].applied for job in jobs)
    assert engine.adapter("upper").version == len(jobs)
    stats = engine.stats()
    assert stats.adapters == len(adapters.NAMES) and stats.kv_pages_free + stats.kv_pages_cached == stats.kv_pages


def test_step_re_entered(bench):
    """A second thread inside step() is refused by name; the first does not notice."""
    engine = bench.engine(["attn"], max_batch_tokens=64)
    for i in range(20):
        engine.submit_train("attn", drive.to_examples(make_examples(20, bench.vocab_size, SEED + i)), optimizer=lq.AdamW(lr=1e-3))
    refused, trained, barrier, stop = [], [], threading.Barrier(2), threading.Event()

    def step_all():
        barrier.wait()
        while engine.has_work() and not stop.is_set():
            try:
                trained.extend(engine.step().trained)
            except lq.InvalidArgument as error:
                refused.append(str(error))

    run_threads(step_all, step_all)
    assert refused, "the threads never met: the test proves nothing"
    assert all("step" in message and "thread" in message for message in refused)
    assert len(trained) == 20 and all(result.applied for result in trained), "the work was done all the same"
    alone = bench.engine(["attn"], max_batch_tokens=64)
    for i in range(20):
        alone.submit_train("attn", drive.to_examples(make_examples(20, bench.vocab_size, SEED + i)), optimizer=lq.AdamW(lr=1e-3))
    drive.run(alone)
    drive.assert_states_equal(engine.adapter_state("attn", "master"), alone.adapter_state("attn", "master"), "master of")


def test_step_releases_the_interpreter(bench):
    """Another Python thread runs while a step computes."""
    engine = bench.engine(["wide"])
    engine.submit_train("wide", drive.to_examples(make_examples(60, bench.vocab_size, SEED)))
    ticks, inside = [], threading.Event()

    def ticker():
        inside.wait()
        while inside.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    def stepper():
        inside.set()
        began = time.perf_counter()
        engine.step()
        ended = time.perf_counter()
        inside.clear()
        assert sum(began < t < ended for t in ticks) >= 3, f"{len(ticks)} ticks, {ended - began:.3f} s"

    run_threads(ticker, stepper)
    drive.run(engine)


def test_use_after_close(bench, tmp_path):
    engine = bench.engine(["attn"])
    engine.submit_infer([5, 6], sampling=drive.greedy(4))
    engine.step()
    engine.close()
    engine.close()  # once is enough, twice is no error
    example = drive.to_examples([{"input_ids": [5, 6]}])
    for call in (
        lambda: engine.submit_infer([5, 6]),
        lambda: engine.submit_train("attn", example),
        lambda: engine.submit_eval("attn", example),
        lambda: engine.submit_eval(None, example),
        lambda: engine.step(),
        lambda: engine.cancel(1),
        lambda: engine.stats(),
        lambda: engine.adapters(),
        lambda: engine.adapter("attn"),
        lambda: engine.add_adapter("wide", bench.adapter_folders["wide"]),
        lambda: engine.add_adapter("fresh", lq.LoraConfig()),
        lambda: engine.remove_adapter("attn"),
        lambda: engine.clone_adapter("attn", "copy"),
        lambda: engine.adapter_state("attn", "weights"),
        lambda: engine.save_adapter("attn", tmp_path / "x"),
        lambda: engine.export_adapter("attn"),
        lambda: engine.save_checkpoint(tmp_path / "y"),
    ):
        with pytest.raises(lq.InvalidArgument, match="close"):
            call()
    assert engine.has_work() is False
    assert not list(tmp_path.iterdir())


def test_close_while_stepping(bench):
    """close() waits for the step under way; the stepper then learns that the engine is closed."""
    engine = bench.engine(["wide"], max_batch_tokens=64)
    engine.submit_train("wide", drive.to_examples(make_examples(100, bench.vocab_size, SEED)))
    begun = threading.Event()

    def stepper():
        try:
            while engine.has_work():
                engine.step()
                begun.set()
        except lq.InvalidArgument as error:
            assert "close" in str(error)

    def closer():
        assert begun.wait(60)
        engine.close()

    run_threads(stepper, closer)
    assert not engine.has_work()


def test_context_manager(bench):
    with bench.engine(["attn"]) as engine:
        assert drive.generate(engine, [("attn", [5, 6])], drive.greedy(3)) == [bench.oracle.greedy("attn", [5, 6], 3)]
    with pytest.raises(lq.InvalidArgument, match="close"):
        engine.step()
