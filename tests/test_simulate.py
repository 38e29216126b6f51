"""The simulator through Python: its command line, what it refuses, and that its figures hang together."""

import json
import subprocess
import sys

import numpy as np
import pytest
from loquetier_core import InvalidArgument, _native
from loquetier_core.sizing import cli, deployment
from loquetier_core.sizing.workload import WorkloadOptions, make_workload

SHORT = "--requests 60 --rate 10 --adapters 4 --trainers 2 --seed 3".split()


def simulate(capsys, *arguments: str) -> str:
    assert cli.main([*SHORT, *arguments]) == 0
    return capsys.readouterr().out


def test_table_and_json(capsys, tmp_path):
    out = tmp_path / "figures.json"
    text = simulate(capsys, "--device", "h200", "--tpot-ms", "30", "--out", str(out))
    assert "llama-3-8b (8.0 B, bf16) on h200" in text and "60 requests" in text and "KV pages" in text
    record = json.loads(out.read_text())
    figures = record["figures"]
    assert set(figures) == {"inference", "training", "unified"}
    assert figures["unified"]["attained"] >= 0.99 and figures["unified"]["tpot_p99"] <= 0.03
    assert 0.5 < figures["unified"]["training_share"] < 1
    assert figures["inference"]["ttft_p50"] > 0 and record["search"] == [] and record["arguments"]["seed"] == 3


def test_the_same_seed_gives_the_same_text(capsys):
    first = simulate(capsys)
    assert first == simulate(capsys) and first != simulate(capsys, "--seed", "4")


def test_without_a_target_training_holds_requests_up(capsys, tmp_path):
    figures = []
    for extra in ([], ["--no-target"]):
        out = tmp_path / "figures.json"
        simulate(capsys, "--tpot-ms", "30", "--train-data", "packed", "--out", str(out), *extra)
        figures.append(json.loads(out.read_text())["figures"]["unified"])
    assert figures[0]["longest_gap_p99"] < 0.06 < figures[1]["longest_gap_p99"]


def test_search(capsys, tmp_path):
    """Each rate above the answer misses the target, the answer keeps it, and a faster device serves more."""
    best = []
    for device in ("h100", "cpu"):
        out = tmp_path / f"{device}.json"
        text = simulate(capsys, "--model", "100m", "--max-length", "512", "--device", device, "--search", "--out", str(out))
        tried = json.loads(out.read_text())["search"]
        assert [p["rate"] for p in tried] == sorted(p["rate"] for p in tried)
        kept = [p["rate"] for p in tried if p["attained"] >= 0.99]
        missed = [p["rate"] for p in tried if p["attained"] < 0.99]
        best.append(max(kept))
        assert missed and min(missed) <= 1.03 * max(kept) * 1.001
        assert f"up to {max(kept):.1f} requests a second" in text and "training then has" in text
    assert best[0] > 10 * best[1]


def test_folder_and_learned_cost_model(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(deployment.MODELS["100m"]))
    text = simulate(capsys, "--model", str(tmp_path), "--device", "cpu", "--max-length", "256", "--rate", "1", "--requests", "5")
    assert "(0.1 B, f32) on cpu" in text
    broken = tmp_path / "cost.txt"
    broken.write_text("not a cost model")
    with pytest.raises(SystemExit, match="cost model"):
        cli.main(["--cost-model", str(broken)])
    with pytest.raises(SystemExit, match=r"\[simulate\] model: expected one of .*got 'nothing'"):
        cli.main(["--model", "nothing"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(SystemExit, match=r"memory: expected to fit 79.0 GiB, got GiB of weights 131"):
        cli.main(["--model", "llama-3-70b", "--device", "h100"])
    with pytest.raises(SystemExit, match=r"tpot_ms: expected > 0"):
        cli.main(["--tpot-ms", "0"])
    trace = make_workload(WorkloadOptions(requests=3))
    arguments = dict(
        config=deployment.MODELS["100m"], dtype="f32", bytes_per_second=1e10, flops_per_second=1e11, launch_seconds=1e-6,
        step_seconds=1e-5, arrivals=trace.arrivals, adapters=trace.adapters, prompts=trace.prompts, outputs=trace.outputs,
        serving=4, examples=[], kv_tokens=65536, adapter_pool_bytes=1 << 30,
    )  # fmt: skip
    assert _native.simulate(**arguments)["tokens"].tolist() == trace.outputs.tolist()
    with pytest.raises(InvalidArgument, match="expected 3 entries, one for each arrival, got 2"):
        _native.simulate(**{**arguments, "prompts": trace.prompts[:2]})
    with pytest.raises(InvalidArgument, match="request 0 adapter"):
        _native.simulate(**{**arguments, "adapters": np.full(3, 4)})
    with pytest.raises(InvalidArgument, match=r"dtype: expected .*got \"f8\""):
        _native.simulate(**{**arguments, "dtype": "f8"})


def test_sizes_of_a_public_model():
    """Llama-3-8B has 8.03e9 parameters, 128 KiB of KV a token in 16 bits, and 42 million LoRA parameters at rank 16."""
    sizes = _native.model_sizes(deployment.MODELS["llama-3-8b"], dtype="bf16", rank=16)
    assert sizes["parameters"] == pytest.approx(8.03e9, rel=1e-3) and sizes["kv_token_bytes"] == 131072
    assert sizes["adapter_parameters"] == 41943040 and sizes["adapter_bytes"] == 2 * 41943040


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    for extra in ([], ["--search"]):
        path = tmp_path / "plot.png"
        assert cli.main([*SHORT, "--plot", str(path), *extra]) == 0
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        path.unlink()


def test_help_is_one_command():
    done = subprocess.run([sys.executable, "-m", "loquetier_core", "simulate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--tpot-ms" in done.stdout and "--gamma-shape" in done.stdout and "--search" in done.stdout
