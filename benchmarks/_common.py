"""What the benchmarks share: the model and adapters both sides load, worker processes, medians, the table and its JSON.

Invariants: both sides read the same folders, use the same number of threads and f32, and run in a process of their own, so that
the peak memory of one (VmHWM of /proc/self/status) never contains the other. Read next: serve.py, train.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A Llama shape of about 100 million parameters; `quick` is for trying the scripts out.
SHAPES = {
    "100m": dict(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
    "quick": dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
RANK = 16
ADAPTERS = 8
SIDES = ("peft", "loquetier")


def parse_args(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per figure; the median is reported")
    parser.add_argument("--side", choices=(*SIDES, "both"), default="both")
    parser.add_argument("--device", default="cpu", help="of the loquetier side")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of model and adapters: given to workers
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- inputs


def make_inputs(folder: Path, shape: str) -> int:
    """Writes folder/model and folder/adapter0 … with random values; returns the number of base parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder / "model")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    peft_model = get_peft_model(model, config, adapter_name="source")
    for i in range(ADAPTERS):
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if "lora_" in name:
                    p.normal_(0, 0.02)
        peft_model.save_pretrained(folder / "saved", selected_adapters=["source"])
        (folder / "saved" / "source").rename(folder / f"adapter{i}")
    return parameters


def random_ids(rows: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(rows)]


# ---------------------------------------------------------------- measuring


def memory_mb(field: str) -> float:
    """VmHWM (peak) or VmRSS (now) of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status: no {field}")


class Timings(dict):
    """Seconds of every repeat by name."""

    def measure(self, repeats: int, cases, warmup: int = 1) -> None:
        """cases: (name, run) in turns, so that a change of the machine's load meets all of them alike. run() returns the
        seconds that count, or None: the whole call counts."""
        for i in range(warmup + repeats):
            for name, run in cases:
                start = time.perf_counter()
                counted = run()
                seconds = time.perf_counter() - start if counted is None else counted
                if i >= warmup:
                    self.setdefault(name, []).append(seconds)


def run_side(side: str, script: str, args: argparse.Namespace, folder: Path) -> dict:
    """Runs `script --worker side` in its own process; its last output line is the JSON result."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(args.threads)
    command = [
        sys.executable, script, "--worker", side, "--folder", str(folder), "--shape", args.shape,
        "--threads", str(args.threads), "--repeats", str(args.repeats), "--device", args.device,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{side}: {' '.join(command)} exited with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def finish_worker(timings: Timings, **more) -> None:
    print(json.dumps({"seconds": timings, "peak_mb": memory_mb("VmHWM"), **more}))


# ---------------------------------------------------------------- reporting


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("loquetier-core", "torch", "transformers", "peft", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def run_benchmark(script: str, args: argparse.Namespace, summarise, settings: dict) -> None:
    """Makes the inputs, runs the sides, prints the table of summarise(results) and writes the JSON.

    summarise(results by side) returns rows (name, unit, {side: value}, target or None); a target is (">=" or "<=", ratio of
    loquetier to peft)."""
    sides = SIDES if args.side == "both" else (args.side,)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="loquetier-benchmark-") as temporary:
        folder = Path(temporary)
        parameters = make_inputs(folder, args.shape)
        results = {side: run_side(side, script, args, folder) for side in sides}
    rows = summarise(results)
    print(f"{cpu_name()}, {args.threads} threads, f32, {parameters / 1e6:.0f} M parameters, load before {load:.1f}")
    print(format_table(rows))
    if args.out:
        record = {
            "benchmark": Path(script).stem, "commit": commit(), "cpu": cpu_name(), "threads": args.threads,
            "load_before": round(load, 2), "versions": versions(), "shape": SHAPES[args.shape], "parameters": parameters,
            "settings": {"rank": RANK, "targets": "all-linear", "dtype": "f32", "repeats": args.repeats, **settings},
            "rows": [{"name": n, "unit": u, **{k: v for k, v in values.items()}, "target": t} for n, u, values, t in rows],
            "results": results,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def format_table(rows) -> str:
    lines = [("", "loquetier", "transformers + PEFT", "ratio", "target")]
    for name, unit, values, target in rows:
        ours, theirs = values.get("loquetier"), values.get("peft")
        ratio = ours / theirs if ours is not None and theirs else None
        verdict = ""
        if target:
            sign, bound = target
            verdict = f"{sign} {bound}x"
            if ratio is not None:
                verdict += " met" if (ratio >= bound if sign == ">=" else ratio <= bound) else " missed"
        shown = ["-" if value is None else f"{value:,.1f} {unit}" for value in (ours, theirs)]
        lines.append((name, *shown, "-" if ratio is None else f"{ratio:.2f}x", verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def median_rate(result: dict, name: str, amount: int) -> float | None:
    """amount / median seconds, or None when that side did not measure it."""
    seconds = result["seconds"].get(name)
    return amount / statistics.median(seconds) if seconds else None


def overhead_percent(result: dict, with_adapters: str, base: str) -> float | None:
    """How much longer the adapters make it, percent of the base's time."""
    seconds = result["seconds"]
    if with_adapters not in seconds or base not in seconds:
        return None
    return 100 * (statistics.median(seconds[with_adapters]) / statistics.median(seconds[base]) - 1)
