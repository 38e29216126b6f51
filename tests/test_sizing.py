"""Workload generators by their statistics, the arithmetic of attainment, and the tables: no model, no engine."""

import argparse
import dataclasses
import json
import math

import numpy as np
import pytest
from loquetier_core.sizing import metrics
from loquetier_core.sizing.workload import (
    WorkloadOptions,
    add_arguments,
    from_arguments,
    make_workload,
    parse_pieces,
    popularity,
)

MANY = WorkloadOptions(requests=20000, rate=50.0, seed=7)


def gaps(options: WorkloadOptions) -> np.ndarray:
    trace = make_workload(options)
    print(f"seed {options.seed}")
    assert len(trace) == options.requests and np.all(np.diff(trace.arrivals) >= 0)
    return np.diff(trace.arrivals)


def test_even_arrivals():
    assert np.allclose(gaps(dataclasses.replace(MANY, arrivals="even")), 1 / 50)


@pytest.mark.parametrize("shape", [1.0, 0.5, 0.25])
def test_gamma_arrivals(shape):
    """The mean gap is 1 / rate whatever the shape; the gaps' coefficient of variation is 1 / sqrt(shape)."""
    found = gaps(dataclasses.replace(MANY, arrivals="gamma", gamma_shape=shape))
    assert found.mean() == pytest.approx(1 / 50, rel=0.06)
    assert found.std() / found.mean() == pytest.approx(shape**-0.5, rel=0.06)


def test_poisson_arrivals():
    """Counts in windows of a second have variance = mean = rate."""
    trace = make_workload(dataclasses.replace(MANY, arrivals="poisson"))
    counts = np.bincount(trace.arrivals.astype(int))[:-1]
    assert counts.mean() == pytest.approx(50, rel=0.03)
    assert counts.var() == pytest.approx(50, rel=0.2)


def test_piecewise_arrivals():
    trace = make_workload(WorkloadOptions(arrivals="piecewise", seed=3))
    assert len(trace) == 630 == trace.full_requests
    ends = np.cumsum([120, 150, 240, 120])
    begins = [0, *ends[:-1]]
    for begin, end, rate in zip(begins, ends, (1, 2.5, 2, 1), strict=True):
        piece = np.diff(trace.arrivals[begin:end])
        assert piece.mean() == pytest.approx(1 / rate, rel=4 / math.sqrt(len(piece)))
    shorter = make_workload(WorkloadOptions(arrivals="piecewise", seed=3, scale=0.1))
    assert len(shorter) == 12 + 15 + 24 + 12 and "shortened from 630" in shorter.describe()
    assert parse_pieces("2@1,3@0.5") == [(2, 1.0), (3, 0.5)]


def test_burst_and_speed():
    burst = make_workload(WorkloadOptions(arrivals="burst", requests=100, burst_at=5.0))
    assert np.all(burst.arrivals == 5.0) and len(burst) == 100
    slow = make_workload(WorkloadOptions(seed=4))
    fast = make_workload(WorkloadOptions(seed=4, speed=4.0))
    assert np.allclose(fast.arrivals * 4, slow.arrivals) and np.array_equal(fast.prompts, slow.prompts)


def test_timestamps_from_a_file(tmp_path):
    path = tmp_path / "times.txt"
    path.write_text("10.5\n\n12\n11.25\n")
    trace = make_workload(WorkloadOptions(arrivals="file", timestamps=str(path)))
    assert trace.arrivals.tolist() == [0, 0.75, 1.5]
    path.write_text("1\nsoon\n")
    with pytest.raises(ValueError, match=r"line 2: expected a number of seconds, got 'soon'"):
        make_workload(WorkloadOptions(arrivals="file", timestamps=str(path)))
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one"):
        make_workload(WorkloadOptions(arrivals="file", timestamps=str(path)))


def test_lengths():
    trace = make_workload(MANY)
    assert np.median(trace.prompts) == pytest.approx(200, rel=0.05) and np.median(trace.outputs) == pytest.approx(150, rel=0.05)
    assert trace.prompts.max() <= 2048 and np.mean(trace.prompts > 1500) > 0.01
    assert trace.outputs.min() >= 1 and np.mean(trace.outputs > 1000) > 0.005
    assert np.all(trace.prompts + trace.outputs <= MANY.max_length)
    fixed = make_workload(WorkloadOptions(lengths="fixed", prompt=200, output=200))
    assert set(fixed.prompts) == {200} and set(fixed.outputs) == {200}
    cut = make_workload(dataclasses.replace(MANY, max_length=256))
    assert np.all(cut.prompts + cut.outputs <= 256) and cut.outputs.min() >= 1


def test_training_data():
    trace = make_workload(WorkloadOptions(trainers=8, seed=2))
    assert len(trace.examples) == 8 and len({tuple(e[:20]) for e in trace.examples}) == 8
    drawn = np.concatenate(trace.examples)
    assert np.median(drawn) == pytest.approx(120, rel=0.05) and drawn.max() == 1024 and drawn.min() >= 8
    packed = make_workload(WorkloadOptions(trainers=1, train_data="packed", train_length=4096))
    assert set(packed.examples[0]) == {4096}


def test_adapters():
    uniform = make_workload(dataclasses.replace(MANY, adapters=64))
    counts = np.bincount(uniform.adapters, minlength=64)
    assert counts.sum() == 20000 and abs(counts / 20000 - 1 / 64).max() < 0.006
    zipf = make_workload(dataclasses.replace(MANY, adapters=64, zipf=1.0))
    shares = np.bincount(zipf.adapters, minlength=64) / 20000
    assert np.allclose(shares, popularity(64, 1.0), atol=0.015) and shares[0] / shares[9] == pytest.approx(10, rel=0.25)
    assert set(make_workload(dataclasses.replace(MANY, adapters=0)).adapters) == {-1}


def test_traces_come_from_the_seed():
    """The same seed gives the same trace; changing one part leaves the random choices of the others."""
    a, b, other = make_workload(MANY), make_workload(MANY), make_workload(dataclasses.replace(MANY, seed=8))
    for name in ("arrivals", "adapters", "prompts", "outputs"):
        assert np.array_equal(getattr(a, name), getattr(b, name)) and not np.array_equal(getattr(a, name), getattr(other, name))
    changed = make_workload(dataclasses.replace(MANY, arrivals="gamma", trainers=8))
    assert np.array_equal(a.adapters, changed.adapters) and np.array_equal(a.prompts, changed.prompts)
    assert np.array_equal(a.examples[0], changed.examples[0])


@pytest.mark.parametrize(
    "field, value",
    [("rate", 0.0), ("scale", 1.5), ("scale", 0.0), ("arrivals", "never"), ("adapters", -1), ("pieces", "3"), ("max_length", 4)],
)
def test_bad_options_are_named(field, value):
    options = dataclasses.replace(WorkloadOptions(arrivals="piecewise" if field == "pieces" else "poisson"), **{field: value})
    with pytest.raises(ValueError, match=rf"\[workload\] {field}: expected .*got"):
        make_workload(options)


def test_arguments_are_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser, rate=5.0)
    assert from_arguments(parser.parse_args([])) == WorkloadOptions(rate=5.0)
    given = from_arguments(parser.parse_args(["--timestamps", "x", "--gamma-shape", "0.25", "--trainers", "8"]))
    assert given == WorkloadOptions(arrivals="file", timestamps="x", gamma_shape=0.25, trainers=8, rate=5.0)


# ---------------------------------------------------------------- figures


def record(arrived, first, gap, tokens, wanted=None) -> metrics.RequestRecord:
    r = metrics.RequestRecord(arrived, prompt=10, wanted=tokens if wanted is None else wanted)
    for i in range(tokens):
        r.token(first + i * gap)
    return r


def test_attainment():
    requests = [
        record(1.0, 1.5, 0.02, 10),  # inside everything
        record(1.0, 3.0, 0.02, 10),  # late
        record(1.0, 1.5, 0.07, 10),  # slow
        record(1.0, 1.5, 0.02, 5, wanted=10),  # never ended: meets nothing
        record(2.0, 2.1, 0.0, 1),  # one token: has no time per token
    ]
    assert requests[0].ttft == 0.5 and requests[0].tpot == pytest.approx(0.02) and math.isnan(requests[4].tpot)
    assert metrics.attainment(requests) == 4 / 5
    assert metrics.attainment(requests, ttft=1.0) == 3 / 5
    assert metrics.attainment(requests, tpot=0.05) == 3 / 5
    assert metrics.attainment(requests, 1.0, 0.05) == 2 / 5
    assert math.isnan(metrics.attainment([]))
    requests.append(metrics.RequestRecord(1.0, 5, 10))  # was not even begun
    assert metrics.attainment_so_far(requests, 1.0, 0.05) == 3 / 6  # those, and the one that was cut off
    assert metrics.attainment_so_far(requests, 1.0, 0.01) == 1 / 6
    assert math.isnan(metrics.attainment_so_far([]))


def test_longest_gap_is_not_the_mean():
    r = metrics.RequestRecord(0.0, 1, 3)
    for at in (0.1, 0.15, 0.95):
        r.token(at)
    assert r.longest_gap == pytest.approx(0.8) and r.tpot == pytest.approx(0.425)


def test_summary():
    run = metrics.RunRecord(
        [record(0.0, 0.5, 0.1, 11), record(1.0, 1.2, 0.1, 11)], 4.0, [(1.0, 100), (3.9, 60), (4.5, 1000)], 2, {"steps": 7.0}
    )
    figures = metrics.summarise(run, ttft=0.3, tpot=0.2)
    assert figures["training_tokens_per_second"] == 40  # what ended behind the window does not count
    assert figures["output_tokens_per_second"] == 5.5 and figures["requests_per_second"] == 0.5
    assert figures["attained"] == 0.5 and figures["attained_ttft_1s"] == 1 and figures["attained_tpot_50ms"] == 0
    assert figures["ttft_p50"] == pytest.approx(0.35) and figures["tpot_p99"] == pytest.approx(0.1) and figures["steps"] == 7
    table = metrics.format_columns({"a": figures, "b": {"requests": 3.0}})
    assert "first token, p50" in table and "350" in table and "queued" not in table
    assert json.loads(json.dumps(metrics.plain({"x": math.nan, "y": [np.float64(1.5), np.int64(2)]}))) == {"x": None, "y": [1.5, 2]}
