"""benchmarks/unified.py end to end: a short trace on a small random model, every setting, against PEFT too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "unified.py"


def unified(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("unified") / "unified.json"
    done = unified(
        *"--shape quick --arrivals poisson --rate 20 --requests 6 --prompt 20 --output 5 --max-length 64 --trainers 2".split(),
        *"--batch 2 --accumulation 2 --train-seconds 0.5 --warm-seconds 0.3 --limit 20 --seed 5".split(),
        "--records", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads(out.read_text())["cases"]["default"], done.stdout


def test_every_setting_of_every_side(record):
    figures = record[0]["figures"]
    assert set(figures) == {"inference", "training", "unified"}
    for setting, sides in figures.items():
        assert set(sides) == {"loquetier", "throughput", "peft"}
        for side, values in sides.items():
            if setting != "training":
                assert values["requests"] == 6 and values["unfinished"] == 0, (setting, side)
                assert 0 < values["ttft_p50"] <= values["ttft_p99"] and 0 < values["tpot_p50"] <= values["tpot_p99"]
                assert values["attained_ttft_6s"] >= values["attained_ttft_1s"] >= 0
            if setting != "inference":
                assert values["training_tokens_per_second"] > 0
            if setting == "unified":
                rates = [figures[s][side]["training_tokens_per_second"] for s in ("unified", "training")]
                assert values["training_share"] == pytest.approx(rates[0] / rates[1], rel=1e-4)


def test_every_side_served_the_same_trace(record):
    records = record[0]["records"]
    traces = [
        [(r["arrived"], r["prompt"], r["wanted"]) for r in settings[name]["requests"]]
        for settings in records.values()
        for name in ("inference", "unified")
    ]
    assert len(traces) == 6 and all(trace == traces[0] for trace in traces)
    for settings in records.values():
        for name in ("inference", "unified"):
            for r in settings[name]["requests"]:
                assert r["tokens"] == r["wanted"] and r["arrived"] < r["first"] <= r["last"] <= settings[name]["window"] + 1e-6


def test_the_table_says_what_ran(record):
    text = record[1]
    assert "6 requests" in text and "2 trainers" in text and "of stand-alone training" in text and "peft" in text


def test_cases_run_on_one_model_and_are_added_to_a_file(tmp_path):
    cases, out = tmp_path / "cases.txt", tmp_path / "out.json"
    cases.write_text(
        "# live requests beside one trainer, and the same under another target\n"
        "first: --arrivals burst --requests 4 --lengths fixed --prompt 16 --output 40 --setting unified --setting training\n"
        "second: --arrivals even --rate 50 --requests 3 --output 3 --trainers 0 --tpot-ms 70 --setting inference\n"
    )
    common = [*"--shape quick --side loquetier --train-length 30 --batch 1 --accumulation 1".split(), "--cases", str(cases)]
    common += [*"--train-seconds 0.5 --warm-seconds 0.2 --limit 20".split(), "--out", str(out)]
    for name in ("first", "second"):
        done = unified(*common, "--case", name)
        assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())["cases"]
    assert set(record["first"]["figures"]) == {"training", "unified"} and set(record["second"]["figures"]) == {"inference"}
    assert record["second"]["arguments"]["tpot_ms"] == 70 and "records" not in record["second"]
    figures = record["first"]["figures"]["unified"]["loquetier"]
    assert figures["requests"] == 4 and figures["unfinished"] == 0
    assert figures["live_training_share"] > 0  # all four are running most of the time
    assert record["first"]["cost_model"].startswith("loquetier-cost-model-")
    done = unified(*common, "--case", "third")
    assert done.returncode != 0 and "--case: not in" in done.stderr
    out.write_text(json.dumps({"benchmark": "unified", "device": "another", "shape": {}, "cases": {}}))
    done = unified(*common, "--case", "second")
    assert done.returncode != 0 and "expected a file with shape" in done.stderr


def test_bad_arguments_are_refused_before_anything_runs():
    done = unified("--gamma-shape", "0", "--arrivals", "gamma")
    assert done.returncode != 0 and "[workload] gamma_shape: expected > 0, got 0.0" in done.stderr
    done = unified("--tpot-ms", "-1")
    assert done.returncode != 0 and "--tpot-ms: expected > 0" in done.stderr
