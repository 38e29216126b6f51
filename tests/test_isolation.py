"""What an adapter gets does not depend on who shares the batch.

Default mode: within rounding. The bound is 2e-5 of the largest value: co-tenants change how many rows a product has, hence the
order in which its up to 100 f32 terms are added; the error of such a sum is about sqrt(100) * 6e-8 = 6e-7, and two layers forward
and backward multiply it by some ten. Deterministic mode: bit for bit, and the log-probability sampled is the one evaluated and
trained on. Read next: test_parity.py.
"""

from __future__ import annotations

import loquetier_core as lq
import numpy as np
import pytest
from helpers import adapters, drive, models
from helpers.oracle import make_examples

pytest_plugins = ["helpers.fixtures"]

SEED = 61
ROUNDING = 2e-5


def journey(bench, name, tenants, engine_options, steps=6):
    """Trains `name` for some steps and serves requests on it, with `tenants` training and being served in the same steps.

    Returns what concerns `name`: losses, norms, state, tokens and log-probabilities."""
    engine = bench.engine([name, *[t for t in tenants if t and t != name]], **engine_options)
    serving = [models.prompts(1, bench.vocab_size, SEED + s)[0] for s in range(steps)]
    jobs, requests, collected = [], [], drive.Collected()
    # With a small eps Adam's first step is the sign of the gradient, also where that is only rounding: nothing to compare.
    adamw = lq.AdamW(lr=2e-3, max_grad_norm=1.0, eps=1e-4)
    for step in range(steps):
        for i, tenant in enumerate(tenants):
            noise = make_examples(2, bench.vocab_size, 500 + 10 * step + i, longest=8 + 5 * i)
            sampling = lq.SamplingParams(temperature=1.0, max_tokens=5 + i, ignore_eos=True)
            engine.submit_infer(noise[0]["input_ids"], adapter=tenant, sampling=sampling)
            if tenant:
                engine.submit_train(tenant, drive.to_examples(noise), optimizer=lq.AdamW(lr=1e-2))
        examples = make_examples(3, bench.vocab_size, SEED + step, weights=True)
        jobs.append(engine.submit_train(name, drive.to_examples(examples), optimizer=adamw))
        collected = drive.run(engine, collected)
        # Requests run between updates: an update while they run would come at a time that depends on the co-tenants.
        requests.append(
            engine.submit_infer(serving[step], adapter=name, sampling=drive.greedy(8, logprobs=3, prompt_logprobs=True))
        )
        for i, tenant in enumerate(tenants):
            engine.submit_infer([5 + i] * (3 + 4 * i), adapter=tenant, sampling=lq.SamplingParams(max_tokens=9, seed=i))
            if tenant:
                engine.submit_train(tenant, drive.to_examples(make_examples(1, bench.vocab_size, 900 + i)))
        collected = drive.run(engine, collected)
    return dict(
        losses=[collected.trained[job].loss for job in jobs],
        norms=[collected.trained[job].grad_norm for job in jobs],
        master=engine.adapter_state(name, "master"),
        moments=engine.adapter_state(name, "exp_avg"),
        tokens=[collected.ids(request) for request in requests],
        logprobs=[list(collected.finished[request].logprobs) for request in requests],
        prompt_logprobs=[list(collected.finished[request].prompt_logprobs) for request in requests],
    )


CROWD = [None, "deep", "gated", "attn", "head_only"]


@pytest.mark.parametrize("name", ["wide", "vocab", "upper"])
def test_co_tenants_change_nothing_beyond_rounding(bench, name):
    print("seed", SEED)
    alone = journey(bench, name, [], {})
    crowded = journey(bench, name, CROWD, dict(max_batch_tokens=96))
    assert crowded["tokens"] == alone["tokens"]
    for key in ("losses", "norms"):
        drive.assert_close(crowded[key], np.array(alone[key]), ROUNDING, key)
    for key in ("logprobs", "prompt_logprobs"):
        for got, want in zip(crowded[key], alone[key], strict=True):
            drive.assert_close(got, np.array(want), ROUNDING, key)
    drive.assert_states_close(crowded["moments"], alone["moments"], 1e-4, "first moment of")  # after 6 steps that feed back
    drive.assert_states_close(crowded["master"], alone["master"], 1e-4, "master of")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["wide", "vocab"])
def test_deterministic_mode_is_bit_for_bit(bench, name, threads):
    alone = journey(bench, name, [], dict(deterministic=True), steps=3)
    crowded = journey(bench, name, CROWD, dict(deterministic=True, max_batch_tokens=96, num_threads=threads), steps=3)
    for key in ("tokens", "losses", "norms", "logprobs"):
        assert crowded[key] == alone[key], key
    assert np.array_equal(np.concatenate(crowded["prompt_logprobs"]), np.concatenate(alone["prompt_logprobs"]), equal_nan=True)
    for key in ("master", "moments"):
        drive.assert_states_equal(crowded[key], alone[key], key)


@pytest.mark.parametrize("family", ["llama31", "qwen2", "qwen3"])
def test_sampled_logprob_is_the_one_evaluated_and_trained(benches, family):
    """Deterministic mode: a policy-gradient ratio of a fresh sample is exactly 1."""
    bench = benches(family)
    engine = bench.engine(adapters.NAMES, deterministic=True, max_batch_tokens=64)
    for tenant in (None, "wide", "vocab"):
        prompt = models.prompts(1, bench.vocab_size, SEED, 12, 30)[0]
        for other in adapters.NAMES[:3]:
            engine.submit_infer([7] * 9, adapter=other, sampling=lq.SamplingParams(max_tokens=30, seed=1))
        sampling = lq.SamplingParams(temperature=1.0, seed=SEED, max_tokens=20, ignore_eos=True)
        request = engine.submit_infer(prompt, adapter=tenant, sampling=sampling)
        result = drive.run(engine).finished[request]
        sampled = np.array(result.logprobs, np.float32)
        ids = prompt + list(result.token_ids)
        labels = [-100] * len(prompt) + list(result.token_ids)
        again = engine.submit_infer(ids, adapter=tenant, sampling=drive.greedy(1, prompt_logprobs=True))
        job = engine.submit_eval(tenant, drive.to_examples([{"input_ids": ids, "labels": labels}]))
        done = drive.run(engine)
        evaluated = np.array(done.evaluated[job].logprobs[0], np.float32)
        assert np.array_equal(evaluated[len(prompt) :], sampled), "evaluated"
        rescored = np.array(done.finished[again].prompt_logprobs, np.float32)
        assert np.array_equal(rescored[len(prompt) :], sampled), "as a prompt"
        if tenant is None:
            continue
        for t in (len(prompt), len(ids) - 1):  # one target a job: its loss is minus its log-probability
            one = [-100] * len(ids)
            one[t] = ids[t]
            trained = drive.train(engine, tenant, [{"input_ids": ids, "labels": one}], reduction="sum")
            assert np.float32(-trained.loss) == sampled[t - len(prompt)], "trained"


def test_sampled_logprob_is_close_by_default(bench):
    engine = bench.engine(["wide"])
    prompt = models.prompts(1, bench.vocab_size, SEED, 12, 30)[0]
    request = engine.submit_infer(prompt, adapter="wide", sampling=lq.SamplingParams(seed=1, max_tokens=20, ignore_eos=True))
    result = drive.run(engine).finished[request]
    evaluated = drive.evaluate(engine, "wide", [{"input_ids": prompt + list(result.token_ids)}]).logprobs[0]
    drive.assert_close(np.asarray(evaluated)[len(prompt) :], np.array(result.logprobs), ROUNDING, "log-probabilities")


def test_two_runs_are_equal(bench):
    """The same calls give the same bits, in the default mode too."""
    first, second = (journey(bench, "wide", CROWD, dict(max_batch_tokens=96, num_threads=2), steps=2) for _ in range(2))
    for key in ("tokens", "losses", "norms", "logprobs"):
        assert first[key] == second[key], key
    drive.assert_states_equal(first["master"], second["master"], "master of")
