"""Every sampling option against the numpy oracle of the documented order, statistically; what a request's random numbers depend
on; stopping.

All draws come from fixed seeds, so a pass stays a pass. Read next: helpers/sampling.py, test_serving.py (scheduling).
"""

from __future__ import annotations

import loquetier_core as lq
import numpy as np
import pytest
import torch
from helpers import drive, models
from helpers.sampling import adjusted, assert_drawn_from, distribution

pytest_plugins = ["helpers.fixtures"]

DRAWS = 2500
PROMPT = [17, 40, 17, 99, 5, 60, 8]


@torch.no_grad()
def next_logits(bench, adapter, ids) -> np.ndarray:
    """[V] f64: of the token after ids."""
    return bench.oracle.logits(adapter, ids)[-1].double().numpy()


def draw(engine, adapter, options, count=DRAWS, max_tokens=1):
    """Token lists of `count` requests with the seeds 0, 1, …"""
    sampling = [lq.SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, **options) for seed in range(count)]
    ids = [engine.submit_infer(PROMPT, adapter=adapter, sampling=s) for s in sampling]
    done = drive.run(engine)
    return [done.ids(i) for i in ids]


OPTIONS = {
    "plain": {},
    "cold": dict(temperature=0.4),
    "hot": dict(temperature=3.0),
    "top_k": dict(top_k=5),
    "top_k_off": dict(top_k=-1),
    "top_p": dict(top_p=0.6),
    "min_p": dict(min_p=0.2),
    "bias": dict(logit_bias={3: 2.5, 17: -100.0, 60: 1.0}, top_k=12),
    "repetition": dict(repetition_penalty=2.5, temperature=0.7),
    "repetition_below_one": dict(repetition_penalty=0.2, temperature=0.7),
    "min_p_before_top_p": dict(min_p=0.12, top_p=0.7, temperature=1.5),
    "top_k_before_top_p": dict(top_k=6, top_p=0.75),
    "temperature_before_min_p": dict(temperature=2.0, min_p=0.3),
    "everything": dict(
        temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, logit_bias={70: 1.5}, presence_penalty=0.5
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_distribution(bench, case):
    adapter = "wide" if len(case) % 2 else None
    options = OPTIONS[case]
    p = distribution(next_logits(bench, adapter, PROMPT), options, PROMPT)
    engine = bench.engine(["wide"])
    assert_drawn_from([tokens[0] for tokens in draw(engine, adapter, options)], p, case)


def test_options_change_the_distribution(bench):
    """The cases above would notice an option that is ignored: each moves at least 5 % of the mass."""
    for case, options in OPTIONS.items():
        adapter = "wide" if len(case) % 2 else None
        z = next_logits(bench, adapter, PROMPT)
        moved = np.abs(distribution(z, options, PROMPT) - distribution(z, {}, PROMPT)).sum() / 2
        assert moved > 0.05 or case in ("plain", "top_k_off"), f"{case} moves only {moved:.3f}"


@pytest.mark.parametrize(
    "options", [dict(presence_penalty=1.8), dict(frequency_penalty=2.0), dict(presence_penalty=-2.0, frequency_penalty=-1.0)]
)
def test_penalties_count_the_output(bench, options):
    """The third token given the first two, which a strong bias keeps to two tokens: the penalties shift them against each other."""
    options = {**options, "logit_bias": {30: 40.0, 31: 40.0}}
    draws = draw(bench.engine(), None, options, max_tokens=3)
    pairs = {tuple(tokens[:2]) for tokens in draws}
    assert len(pairs) >= 2
    tested = 0
    for pair in pairs:
        given = [tokens[2] for tokens in draws if tuple(tokens[:2]) == pair]
        p = distribution(next_logits(bench, None, PROMPT + list(pair)), options, PROMPT, pair)
        if (p * len(given) >= 8).sum() > 1:
            assert_drawn_from(given, p, f"after {pair}")
            tested += 1
    assert tested


@pytest.mark.parametrize(
    "options",
    [
        dict(presence_penalty=2.0),
        dict(frequency_penalty=1.5),
        dict(repetition_penalty=1.8),
        dict(presence_penalty=-1.0, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias={9: 3.0}),
    ],
)
def test_greedy_with_penalties(bench, options):
    engine = bench.engine(["attn"])
    (got,) = drive.generate(engine, [("attn", PROMPT)], drive.greedy(40, **options))
    want: list[int] = []
    for _ in range(40):
        want.append(int(adjusted(next_logits(bench, "attn", PROMPT + want), options, PROMPT, want).argmax()))
    assert got == want
    (plain,) = drive.generate(engine, [("attn", PROMPT)], drive.greedy(40))
    assert plain != want, "the options do nothing here"


def test_tokens_of_one_request_are_independent(bench):
    """First and second token: the pair is drawn from the product of the conditionals."""
    options = dict(top_k=3)
    draws = draw(bench.engine(), None, options, max_tokens=2)
    first = distribution(next_logits(bench, None, PROMPT), options, PROMPT)
    vocab = bench.vocab_size
    joint = np.zeros(vocab * vocab)
    for token in np.flatnonzero(first):
        second = distribution(next_logits(bench, None, [*PROMPT, int(token)]), options, PROMPT, [token])
        joint[token * vocab : (token + 1) * vocab] = first[token] * second
    assert_drawn_from([a * vocab + b for a, b in draws], joint, "pairs")


# ---------------------------------------------------------------- what the random numbers depend on


def test_draws_depend_on_seed_and_position_only(bench):
    """Alone, among others, in another order, in another engine: the same tokens."""
    sampling = {
        seed: lq.SamplingParams(temperature=1.2, seed=seed, max_tokens=20, ignore_eos=True) for seed in (1, 2, 3, 2**63 + 5)
    }
    engine = bench.engine(["wide", "attn"], seed=4)
    alone = {}
    for seed, s in sampling.items():
        (alone[seed],) = drive.generate(engine, [("wide", PROMPT)], s)
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)
    crowd, collected = bench.engine(["wide", "attn"], seed=99, max_batch_tokens=24), drive.Collected()
    other = lq.SamplingParams(temperature=1.0, max_tokens=30)
    ids = {}
    for i, prompt in enumerate(models.prompts(6, bench.vocab_size, 3)):
        crowd.submit_infer(prompt, adapter=("attn", None)[i % 2], sampling=other)
    for seed in reversed(list(sampling)):
        ids[seed] = crowd.submit_infer(PROMPT, adapter="wide", sampling=sampling[seed])
        collected.add(crowd.step())
    done = drive.run(crowd, collected)
    for seed, request in ids.items():
        assert done.ids(request) == alone[seed], f"seed {seed}"


def test_seeds_drawn_by_the_engine(bench):
    """Without a seed: reproducible from the engine's, different between requests and between engine seeds."""
    sampling = lq.SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    runs = [drive.generate(bench.engine(seed=s), [(None, PROMPT)] * 3, sampling) for s in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_are_the_models_own(bench):
    """Before bias, penalties, temperature and filters; top log-probabilities in order."""
    engine = bench.engine(["wide"])
    options = dict(temperature=0.5, top_k=4, logit_bias={50: 6.0}, repetition_penalty=1.5, seed=5)
    request = engine.submit_infer(
        PROMPT, adapter="wide", sampling=lq.SamplingParams(max_tokens=10, ignore_eos=True, logprobs=20, **options)
    )
    done = drive.run(engine)
    tokens = done.ids(request)
    with torch.no_grad():
        p = torch.log_softmax(bench.oracle.logits("wide", PROMPT + tokens), -1)[len(PROMPT) - 1 : -1]
    drive.assert_close(done.finished[request].logprobs, p.gather(1, torch.tensor(tokens)[:, None])[:, 0], 1e-4, "log-probabilities")
    for i, event in enumerate(done.tokens[request]):
        assert [t.token_id for t in event.top_logprobs] == p[i].topk(20).indices.tolist()
        assert event.logprob == done.finished[request].logprobs[i]


def test_no_logprobs_asked_for(bench):
    engine = bench.engine()
    request = engine.submit_infer(PROMPT, sampling=drive.greedy(3))
    done = drive.run(engine)
    assert all(event.top_logprobs == [] for event in done.tokens[request])
    assert len(done.finished[request].prompt_logprobs) == 0 and len(done.finished[request].logprobs) == 3


# ---------------------------------------------------------------- stopping


def greedy_tokens(bench, count=12):
    return bench.oracle.greedy("wide", PROMPT, count)


def test_stop_token(bench):
    engine = bench.engine(["wide"])
    tokens = greedy_tokens(bench)
    stop = tokens[4]
    first = tokens.index(stop)
    request = engine.submit_infer(PROMPT, adapter="wide", sampling=drive.greedy(12, stop_token_ids=[stop]))
    done = drive.run(engine)
    assert done.ids(request) == tokens[: first + 1] and done.finished[request].finish_reason == "stop"
    reasons = [event.finish_reason for event in done.tokens[request]]
    assert reasons == [None] * first + ["stop"]


def test_end_of_sequence(bench):
    """The model's own id stops unless told not to."""
    engine = bench.engine()
    bias = {models.EOS: 100.0}
    for ignore, count, reason in ((False, 1, "stop"), (True, 4, "length")):
        sampling = lq.SamplingParams(temperature=0, max_tokens=4, ignore_eos=ignore, logit_bias=bias)
        request = engine.submit_infer(PROMPT, sampling=sampling)
        done = drive.run(engine)
        assert done.ids(request) == [models.EOS] * count and done.finished[request].finish_reason == reason


def test_min_tokens(bench):
    """Stop tokens are forbidden before; the choice falls on the next best."""
    engine = bench.engine(["wide"])
    stop = greedy_tokens(bench)[0]
    sampling = lq.SamplingParams(temperature=0, max_tokens=12, min_tokens=5, stop_token_ids=[stop], logit_bias={stop: 50.0})
    request = engine.submit_infer(PROMPT, adapter="wide", sampling=sampling)
    done = drive.run(engine)
    want: list[int] = []
    for _ in range(5):
        z = adjusted(next_logits(bench, "wide", PROMPT + want), {}, PROMPT, want, forbidden=[stop, models.EOS])
        want.append(int(z.argmax()))
    assert done.ids(request) == [*want, stop] and done.finished[request].finish_reason == "stop"


def test_length_ends_at_the_context(bench):
    """A request never runs past the model's positions, whatever max_tokens says."""
    engine = bench.engine(kv_cache_tokens=2048)
    prompt = models.prompts(1, bench.vocab_size, 1, 500, 500)[0]
    request = engine.submit_infer(prompt, sampling=drive.greedy(1000))
    done = drive.run(engine)
    assert len(done.ids(request)) == 12 and done.finished[request].finish_reason == "length"
