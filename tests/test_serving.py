"""Serving as seen from outside: whatever the scheduler does (chunks, pre-emption, prefix caching, rotation of adapters through a
small pool), the tokens are the oracle's; cancelling, priorities, fairness, back-pressure; versions, clones, removal.

Read next: test_sampling.py, test_isolation.py.
"""

from __future__ import annotations

import loquetier_core as lq
import pytest
from helpers import adapters, drive, models
from helpers.oracle import make_examples

pytest_plugins = ["helpers.fixtures"]

SEED = 43


def mixed_requests(bench, count, longest=40):
    tenants = [None, *adapters.NAMES]
    prompts = models.prompts(count, bench.vocab_size, SEED, longest=longest)
    return [(tenants[i % len(tenants)], prompt) for i, prompt in enumerate(prompts)]


def oracle_tokens(bench, requests, count):
    return [bench.oracle.greedy(tenant, prompt, count) for tenant, prompt in requests]


# ---------------------------------------------------------------- scheduling changes no token


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_chunked_prefill(bench, rows, page_size):
    requests = mixed_requests(bench, 8, longest=60)
    engine = bench.engine(adapters.NAMES, max_batch_tokens=rows, page_size=page_size)
    assert drive.generate(engine, requests, drive.greedy(8)) == oracle_tokens(bench, requests, 8)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption(bench, prefix_caching):
    """Sixteen requests of up to 70 tokens through room for about four."""
    requests = mixed_requests(bench, 16)
    engine = bench.engine(adapters.NAMES, kv_cache_tokens=256, prefix_caching=prefix_caching)
    assert drive.generate(engine, requests, drive.greedy(30)) == oracle_tokens(bench, requests, 30)
    stats = engine.stats()
    assert stats.preemptions > 0, "the pool was never short: the test proves nothing"
    assert stats.kv_pages_free + stats.kv_pages_cached == stats.kv_pages, "pages leaked"


def test_preemption_keeps_what_was_sampled(bench):
    """Seeded draws too, with their log-probabilities reported once."""
    requests = mixed_requests(bench, 12)
    results = []
    for tokens in (4096, 192):
        engine = bench.engine(adapters.NAMES, kv_cache_tokens=tokens)
        ids = [
            engine.submit_infer(p, adapter=a, sampling=lq.SamplingParams(temperature=1.0, seed=i, max_tokens=30, ignore_eos=True))
            for i, (a, p) in enumerate(requests)
        ]
        done = drive.run(engine)
        results.append([done.ids(i) for i in ids])
    assert engine.stats().preemptions > 0
    assert results[0] == results[1]


def test_prefix_caching(bench):
    """The second time a prompt's full pages are not computed, under the same adapter only."""
    engine = bench.engine(["wide", "attn"], page_size=16)
    prompt = models.prompts(1, bench.vocab_size, SEED, 50, 50)[0]

    def cached_by(adapter, ids):
        before = engine.stats()
        (tokens,) = drive.generate(engine, [(adapter, ids)], drive.greedy(6))
        assert tokens == bench.oracle.greedy(adapter, ids, 6)
        after = engine.stats()
        cached = after.cached_prompt_tokens - before.cached_prompt_tokens
        assert cached + after.prefill_tokens - before.prefill_tokens == len(ids)
        return cached

    assert cached_by("wide", prompt) == 0
    assert cached_by("wide", prompt) == 48
    assert cached_by("wide", prompt[:48]) == 32, "at least one row is computed, and pages are shared whole"
    assert cached_by("wide", prompt[:20] + [3] * 20) == 16
    assert cached_by("attn", prompt) == 0, "never across adapters"
    assert cached_by(None, prompt) == 0
    assert cached_by(None, prompt) == 48


def test_prompt_logprobs_are_computed_even_when_cached(bench):
    engine = bench.engine(["wide"])
    prompt = models.prompts(1, bench.vocab_size, SEED, 50, 50)[0]
    drive.generate(engine, [("wide", prompt)], drive.greedy(1))
    request = engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(1, prompt_logprobs=True))
    got = drive.run(engine).finished[request].prompt_logprobs
    drive.assert_close(got, bench.oracle.logprobs("wide", {"input_ids": prompt}), 1e-4, "prompt log-probabilities")


def test_no_stale_prefix_after_an_update(bench, tmp_path):
    """The cache of version 0 is not used by version 1: tokens equal those of a new engine with the trained weights."""
    engine = bench.engine(["wide"])
    prompt = models.prompts(1, bench.vocab_size, SEED, 64, 64)[0]
    first = drive.generate(engine, [("wide", prompt)] * 2, drive.greedy(24))
    drive.train(engine, "wide", make_examples(4, bench.vocab_size, SEED), optimizer=lq.AdamW(lr=5e-2))
    cached = engine.stats().cached_prompt_tokens
    after = drive.generate(engine, [("wide", prompt)], drive.greedy(24))
    assert engine.stats().cached_prompt_tokens == cached
    engine.save_adapter("wide", tmp_path / "wide")
    fresh = bench.engine()
    fresh.add_adapter("wide", tmp_path / "wide")
    assert after == drive.generate(fresh, [("wide", prompt)], drive.greedy(24))
    assert after[0] != first[0], "the update changed nothing: the test proves nothing"


# ---------------------------------------------------------------- order and limits


def test_cancel(bench):
    engine = bench.engine(max_sequences=1)
    running, waiting, survivor = (engine.submit_infer([7, 8, 9 + i], sampling=drive.greedy(40)) for i in range(3))
    collected = drive.Collected()
    for _ in range(3):
        collected.add(engine.step())
    assert engine.cancel(running) and engine.cancel(waiting)
    drive.run(engine, collected)
    partial = collected.finished[running]
    assert partial.finish_reason == "cancelled" and 1 <= len(partial.token_ids) < 40
    assert list(partial.token_ids) == bench.oracle.greedy(None, [7, 8, 9], 40)[: len(partial.token_ids)]
    assert collected.finished[waiting].finish_reason == "cancelled" and len(collected.finished[waiting].token_ids) == 0
    assert collected.ids(survivor) == bench.oracle.greedy(None, [7, 8, 11], 40)
    assert not engine.cancel(running) and not engine.cancel(survivor), "they have ended"
    stats = engine.stats()
    assert stats.running_requests == stats.waiting_requests == 0 and stats.kv_pages_free + stats.kv_pages_cached == stats.kv_pages


def test_priorities(bench):
    """With one place, the waiting request of highest priority is next; equals in order of arrival."""
    engine = bench.engine(max_sequences=1)
    ids = [engine.submit_infer([10 + i], sampling=drive.greedy(3), priority=p) for i, p in enumerate((0, 0, 5, 5, -1))]
    order = []
    while engine.has_work():
        order += [result.request_id for result in engine.step().finished]
    assert order == [ids[2], ids[3], ids[0], ids[1], ids[4]]


def test_fairness_between_adapters(bench):
    """One request does not wait behind another adapter's fifty."""
    engine = bench.engine(["attn", "wide"], max_sequences=4)
    crowd = [engine.submit_infer([3 + i], adapter="attn", sampling=drive.greedy(8)) for i in range(50)]
    late = engine.submit_infer([20], adapter="wide", sampling=drive.greedy(8))
    order = []
    while engine.has_work():
        order += [result.request_id for result in engine.step().finished]
    assert set(order) == {*crowd, late} and order.index(late) < 16


def test_training_advances_under_constant_traffic(bench):
    """Prompts that would fill every step do not starve training."""
    engine = bench.engine(["attn", "wide"], max_batch_tokens=32)
    job = engine.submit_train("attn", drive.to_examples(make_examples(6, bench.vocab_size, SEED)), optimizer=lq.AdamW(lr=1e-3))
    prompts = models.prompts(400, bench.vocab_size, SEED, 30, 32)
    for step in range(300):
        if engine.stats().waiting_requests < 3:
            engine.submit_infer(prompts[step], adapter="wide", sampling=drive.greedy(1))
        if any(result.job_id == job and result.applied for result in engine.step().trained):
            return
    raise AssertionError("not trained in 300 steps")


def test_queue_full(bench):
    engine = bench.engine(["attn"], max_queue=4)
    examples = drive.to_examples(make_examples(2, bench.vocab_size, SEED))
    ids = [engine.submit_infer([5, 6 + i], sampling=drive.greedy(2)) for i in range(2)]
    job = engine.submit_train("attn", examples)
    with pytest.raises(lq.QueueFull, match="max_queue"):
        engine.submit_infer([5], sampling=drive.greedy(2))
    with pytest.raises(lq.QueueFull, match="max_queue"):
        engine.submit_eval("attn", examples)
    done = drive.run(engine)
    assert set(done.finished) == set(ids) and set(done.trained) == {job}
    assert drive.generate(engine, [(None, [5])], drive.greedy(2)) == [bench.oracle.greedy(None, [5], 2)]


# ---------------------------------------------------------------- versions


def test_versions_of_a_running_request(bench):
    """Unpinned: the newest version from the next token on. Pinned: the version it began with, and its tokens."""
    engine = bench.engine(["wide"])
    prompt = models.prompts(1, bench.vocab_size, SEED, 20, 20)[0]
    follows = engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(40))
    pinned = engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(40), pin_version=True)
    collected = drive.Collected()
    for _ in range(6):
        collected.add(engine.step())
    for i in range(2):
        engine.submit_train("wide", drive.to_examples(make_examples(3, bench.vocab_size, SEED + i)), optimizer=lq.AdamW(lr=5e-2))
    late = engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(4), pin_version=True)
    drive.run(engine, collected)
    versions = [event.version for event in collected.tokens[follows]]
    assert versions == sorted(versions) and versions[0] == 0 and versions[-1] == 2
    assert {event.version for event in collected.tokens[pinned]} == {0}
    assert collected.ids(pinned) == bench.oracle.greedy("wide", prompt, 40)
    assert collected.ids(follows) != collected.ids(pinned), "the updates changed nothing: the test proves nothing"
    assert len({event.version for event in collected.tokens[late]}) == 1
    assert engine.adapter("wide").version == 2


def test_clone_is_a_frozen_copy(bench):
    engine = bench.engine(["wide"])
    drive.train(engine, "wide", make_examples(2, bench.vocab_size, SEED), optimizer=lq.AdamW(lr=1e-2))
    engine.clone_adapter("wide", "copy")
    prompt = [9, 8, 7]
    before = drive.generate(engine, [("wide", prompt)], drive.greedy(20))
    assert engine.adapter("copy").version == 1 and not engine.adapter("copy").training
    drive.assert_states_equal(engine.adapter_state("copy", "weights"), engine.adapter_state("wide", "weights"), "weight")
    drive.train(engine, "wide", make_examples(4, bench.vocab_size, SEED), optimizer=lq.AdamW(lr=5e-2))
    assert drive.generate(engine, [("copy", prompt)], drive.greedy(20)) == before
    assert drive.generate(engine, [("wide", prompt)], drive.greedy(20)) != before


def test_remove_while_requests_run(bench):
    """They finish on the version they have; jobs end; the name is free at once, for another adapter."""
    engine = bench.engine(["wide"])
    prompt = [30, 31, 32, 33]
    running = engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(30))
    collected = drive.Collected()
    for _ in range(4):
        collected.add(engine.step())
    job = engine.submit_train("wide", drive.to_examples(make_examples(3, bench.vocab_size, SEED)), optimizer=lq.AdamW(lr=0.1))
    engine.remove_adapter("wide")
    with pytest.raises(lq.NotFound, match="wide"):
        engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(3))
    engine.add_adapter("wide", bench.adapter_folders["gated"])
    new = engine.submit_infer(prompt, adapter="wide", sampling=drive.greedy(30))
    drive.run(engine, collected)
    assert collected.trained[job].reason == "cancelled" and not collected.trained[job].applied
    assert collected.ids(running) == bench.oracle.greedy("wide", prompt, 30)
    assert collected.ids(new) == bench.oracle.greedy("gated", prompt, 30)
    assert engine.stats().adapters == 1


# ---------------------------------------------------------------- residency


def test_more_adapters_than_fit(bench):
    """A pool for about two of seven: evicted, fetched back, the same tokens, trained weights included."""
    sizes = {name: bench.engine([name]).adapter(name).bytes for name in adapters.NAMES}
    pool = max(sizes.values()) + 4096
    engine = bench.engine(adapters.NAMES, adapter_pool_bytes=pool)
    requests = mixed_requests(bench, 24)
    assert drive.generate(engine, requests, drive.greedy(10)) == oracle_tokens(bench, requests, 10)
    stats = engine.stats()
    assert stats.adapter_evictions > 0 and stats.adapter_fetches > 0 and stats.adapter_pool_used <= pool
    assert stats.adapters == len(adapters.NAMES) and 1 <= stats.resident_adapters < len(adapters.NAMES)
    assert sum(info.resident for info in engine.adapters()) == stats.resident_adapters

    roomy = bench.engine(["attn", "gated"])
    for e in (engine, roomy):
        for i in range(3):  # both at once: they share the small pool in turns
            for name in ("attn", "gated"):
                e.submit_train(
                    name, drive.to_examples(make_examples(2, bench.vocab_size, i)), optimizer=lq.AdamW(lr=1e-2, eps=1e-3)
                )
            e.submit_infer([4, 5, 6], adapter="deep" if e is engine else "attn", sampling=drive.greedy(5))
        drive.run(e)
    for name in ("attn", "gated"):
        drive.assert_states_close(engine.adapter_state(name, "weights"), roomy.adapter_state(name, "weights"), 2e-5, f"{name}")


def test_stats_add_up(bench):
    engine = bench.engine(["attn"], prefix_caching=False)
    requests = [("attn", [5] * 10), (None, [6] * 12)]
    examples = make_examples(2, bench.vocab_size, SEED, masks=False)
    drive.generate(engine, requests, drive.greedy(5))
    drive.train(engine, "attn", examples, optimizer=lq.AdamW(lr=1e-3))
    drive.evaluate(engine, None, examples)
    stats = engine.stats()
    rows = sum(len(example["input_ids"]) - 1 for example in examples)  # the last token is only a target
    assert (stats.prefill_tokens, stats.decode_tokens, stats.generated_tokens) == (22, 8, 10)
    assert (stats.train_tokens, stats.eval_tokens, stats.optimizer_steps) == (rows, rows, 1)
    assert stats.queued_examples == stats.waiting_requests == stats.running_requests == 0 and not engine.has_work()
    assert stats.training_state_bytes >= 16 * engine.adapter("attn").parameters, "master, gradients and two moments in f32"
    assert stats.kv_bytes > 0 and stats.arena_peak > 0 and stats.step_seconds > 0 and stats.steps > 0
