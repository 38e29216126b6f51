"""Driving an engine in tests: submit, step until done, collect by request or job; and comparing what comes out with the oracle.

Read next: oracle.py, the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import loquetier_core as lq
import numpy as np

STEP_LIMIT = 20000  # a test that needs more hangs


@dataclass
class Collected:
    """Everything that steps reported, by id."""

    tokens: dict[int, list] = field(default_factory=dict)  # TokenEvents of a request, in order
    finished: dict[int, object] = field(default_factory=dict)
    trained: dict[int, object] = field(default_factory=dict)
    evaluated: dict[int, object] = field(default_factory=dict)
    steps: int = 0

    def add(self, result) -> None:
        self.steps += 1
        for token in result.tokens:
            events = self.tokens.setdefault(token.request_id, [])
            assert token.index == len(events), f"request {token.request_id}: token {token.index} came after {len(events)} tokens"
            events.append(token)
        for event, found in ((result.finished, self.finished), (result.trained, self.trained), (result.evaluated, self.evaluated)):
            for item in event:
                key = item.request_id if found is self.finished else item.job_id
                assert key not in found, f"{key} reported twice"
                found[key] = item

    def ids(self, request: int) -> list[int]:
        return list(self.finished[request].token_ids)


def run(engine, collected: Collected | None = None, limit: int = STEP_LIMIT) -> Collected:
    """Steps until there is no work."""
    collected = collected or Collected()
    while engine.has_work():
        collected.add(engine.step())
        assert collected.steps < limit, f"still working after {limit} steps: {engine.stats()}"
    for request, events in collected.tokens.items():  # the two reports of one request agree
        if request in collected.finished:
            assert [event.token_id for event in events] == list(collected.finished[request].token_ids)
    return collected


def greedy(max_tokens: int, **more):
    return lq.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def generate(engine, requests, sampling) -> list[list[int]]:
    """Tokens of every (adapter, prompt), all submitted at once."""
    ids = [engine.submit_infer(prompt, adapter=adapter, sampling=sampling) for adapter, prompt in requests]
    collected = run(engine)
    return [collected.ids(i) for i in ids]


def to_examples(examples) -> list:
    return [lq.Example(**example) for example in examples]


def train(engine, adapter, examples, **options):
    """One submit_train, run to its end alone; returns its TrainResult."""
    job = engine.submit_train(adapter, to_examples(examples), **options)
    return run(engine).trained[job]


def evaluate(engine, adapter, examples):
    job = engine.submit_eval(adapter, to_examples(examples))
    return run(engine).evaluated[job]


def to_numpy(value) -> np.ndarray:
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def assert_close(got, want, tolerance: float, what: str) -> float:
    """max |got - want| <= tolerance * max |want|, over one tensor. Returns the error, relative to the largest value."""
    got, want = to_numpy(got).astype(np.float64), to_numpy(want).astype(np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.array_equal(np.isnan(got), np.isnan(want)), f"{what}: NaN in other places"
    if not want.size or np.isnan(want).all():
        return 0.0
    error = np.nanmax(np.abs(got - want))
    scale = np.nanmax(np.abs(want))
    assert error <= tolerance * scale, (
        f"{what}: largest error {error:.3g} of a largest value {scale:.3g}, allowed {tolerance:g} of it"
    )
    return error / scale if scale else 0.0


def assert_states_close(got: dict, want: dict, tolerance: float, what: str) -> float:
    """Every tensor of two dicts by PEFT key. Returns the largest relative error."""
    assert set(got) == set(want), f"{what}: keys differ: {sorted(set(got) ^ set(want))}"
    return max(assert_close(got[key], want[key], tolerance, f"{what} {key}") for key in want)


def assert_states_equal(got: dict, want: dict, what: str) -> None:
    """Bit for bit."""
    assert set(got) == set(want), f"{what}: keys differ: {sorted(set(got) ^ set(want))}"
    for key in want:
        assert np.array_equal(to_numpy(got[key]), to_numpy(want[key])), f"{what}: {key} differs"
