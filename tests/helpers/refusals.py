"""For the tests of bad input: the check of an error's class and words, and an engine that must come out of it as it went in.

Read next: test_bad_input.py, test_bad_files.py.
"""

from __future__ import annotations

import loquetier_core as lq
import pytest

from helpers import drive

PROMPT = [11, 12, 90]


@pytest.fixture(scope="session")
def shared_engine(benches):
    """One engine for all cases: after each it must be as it was."""
    with benches("llama31").engine(["attn", "wide"], max_queue=100, max_lora_rank=64) as engine:
        yield engine


@pytest.fixture
def unharmed(shared_engine, benches):
    """Afterwards: the same adapters and weights, nothing queued, the right tokens."""
    engine = shared_engine
    names = sorted(info.name for info in engine.adapters())
    weights = {name: engine.adapter_state(name, "weights") for name in names}
    yield engine
    assert sorted(info.name for info in engine.adapters()) == names
    for name in names:
        drive.assert_states_equal(engine.adapter_state(name, "weights"), weights[name], name)
    assert not engine.has_work() and engine.stats().queued_examples == engine.stats().waiting_requests == 0
    oracle = benches("llama31").oracle
    assert drive.generate(engine, [("wide", PROMPT), (None, PROMPT)], drive.greedy(6)) == [
        oracle.greedy(name, PROMPT, 6) for name in ("wide", None)
    ]


def assert_refused(error, words, call) -> None:
    """The error is of the class, of the library's own base and of the natural built-in, and its message has all the words."""
    built_in = {
        lq.InvalidArgument: ValueError, lq.NotFound: KeyError, lq.FormatError: ValueError, lq.OutOfMemory: MemoryError,
        lq.QueueFull: RuntimeError, lq.DeviceError: RuntimeError,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, lq.Error) and isinstance(caught.value, built_in[error])
    for word in words:
        assert str(word) in str(caught.value), f"the message does not name {word!r}: {caught.value}"
