"""Serving while training: replays timed arrivals, open loop, against this engine and against transformers + PEFT.

    python benchmarks/unified.py --shape 100m --scale 0.1 --out benchmarks/results/unified_cpu.json --plot unified.png
    python benchmarks/unified.py --shape llama-3-8b --device cuda --arrivals piecewise --adapters 4 --trainers 2

Three settings, one after another: inference-only, fine-tune-only, unified. Three sides, each in a process of its own on the same
trace: loquetier (with the latency target), throughput (this engine without one: training is not pre-empted), peft. Weights are
random, so tokens mean nothing and every request runs to its length; times are those of a model of that shape. What each figure
means: loquetier_core/sizing/metrics.py. Read next: _replay.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import _common as common
import _replay as replay
from loquetier_core.sizing import metrics, plot, workload

SIDES = ("loquetier", "throughput", "peft")
CPU_DEFAULTS = {  # what two cores can do, so that the default command says something there
    "quick": dict(rate=20.0, prompt=48, output=32, max_length=512),
    "100m": dict(rate=0.5, prompt=100, output=60, max_length=1024),
}


def parse_args() -> argparse.Namespace:
    shapes = argparse.ArgumentParser(add_help=False)
    shapes.add_argument("--shape", choices=replay.SHAPES, default="quick")
    shape = shapes.parse_known_args()[0].shape
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=replay.SHAPES, default="quick", help="of the model; random weights")
    parser.add_argument("--device", default="cpu", help="of every side: cpu, cuda, cuda:1")
    parser.add_argument("--setting", choices=("all", *replay.SETTINGS), default="all")
    parser.add_argument("--side", choices=("all", *SIDES), action="append", help="may be repeated (default: all)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="target of the first token")
    parser.add_argument("--tpot-ms", type=float, default=50.0, help="target of the time per token after it")
    parser.add_argument("--train-seconds", type=float, default=30.0, help="of the fine-tune-only setting")
    parser.add_argument("--warm-seconds", type=float, default=5.0, help="of training before anything is measured")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which a setting is cut off; 0: 1.5 traces")
    parser.add_argument("--threads", type=int, default=2, help="of each side on the CPU")
    parser.add_argument("--batch-tokens", type=int, default=0, help="rows of one step of the engine; 0: 512 (CPU), 8192")
    parser.add_argument("--kv-tokens", type=int, default=0, help="of the engine's KV pool; 0: 65536 (CPU), the memory left")
    parser.add_argument("--trace-path", type=Path, help="a Chrome / Perfetto trace of the engine with the target")
    parser.add_argument("--peft-batch", type=int, default=64, help="sequences that PEFT generates at once")
    parser.add_argument("--peft-turns", type=int, default=8, help="generation steps of PEFT between two mini-batches of training")
    parser.add_argument("--peft-checkpointing", action="store_true", help="PEFT recomputes activations: less memory, more time")
    parser.add_argument("--out", type=Path, help="write figures and records as JSON to this file")
    parser.add_argument("--plot", type=Path, help="draw the runs as PNG to this file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    workload.add_arguments(parser, **CPU_DEFAULTS.get(shape, {}))
    args = parser.parse_args()
    for name in ("ttft_ms", "tpot_ms", "train_seconds", "threads", "peft_batch", "peft_turns"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: expected > 0, got {getattr(args, name)}")
    return args


def worker(args: argparse.Namespace, trace: workload.Workload) -> None:
    if args.worker == "peft":
        from _replay_peft import PeftSide  # torch only where it is used

        replay.run_settings(PeftSide(args, trace), args, trace)
    else:
        from _replay_engine import EngineSide

        replay.run_settings(EngineSide(args, trace, with_target=args.worker == "loquetier"), args, trace)


def run_side(side: str, args: argparse.Namespace) -> dict:
    """The side's results from a process of its own, started with the same arguments."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(args.threads)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{side}: {' '.join(command)} exited with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def figures_of(runs: dict[str, dict[str, metrics.RunRecord]], args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """By setting, then side."""
    ttft, tpot = replay.targets(args)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for side, settings in runs.items():
        alone = metrics.training_rate(settings["training"]) if "training" in settings else None
        for setting, run in settings.items():
            figures = metrics.summarise(run, ttft, tpot)
            if alone and setting == "unified":
                figures["training_share"] = figures.get("training_tokens_per_second", 0.0) / alone
            table.setdefault(setting, {})[side] = figures
    return table


def main() -> None:
    args = parse_args()
    try:
        trace = workload.make_workload(workload.from_arguments(args))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    if args.worker:
        worker(args, trace)
        return
    if args.plot:
        plot.require_matplotlib()  # before an hour of measuring, not after
    sides = SIDES if not args.side or "all" in args.side else tuple(args.side)
    load = os.getloadavg()[0]
    results = {side: run_side(side, args) for side in sides}
    runs = {
        side: {setting: replay.load_record(record) for setting, record in result["settings"].items()}
        for side, result in results.items()
    }
    table = figures_of(runs, args)
    device = next(iter(results.values()))["device"]
    where = f"{common.cpu_name()}, {args.threads} threads, f32" if device == "cpu" else f"{device}, bf16"
    title = f"{args.shape} on {where}; target {args.ttft_ms:g} ms first token, {args.tpot_ms:g} ms per token"
    print(f"{title}\n{trace.describe()}")
    for setting, columns in table.items():
        print(f"\n{setting}\n{metrics.format_columns(columns)}")
    if args.out:
        record = {
            "benchmark": "unified", "commit": common.commit(), "device": where, "load_before": round(load, 2),
            "versions": common.versions(), "shape": replay.SHAPES[args.shape],
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "workload": trace.describe(), "figures": table,
            "peak_mb": {side: result["peak_mb"] for side, result in results.items()},
            "records": {side: result["settings"] for side, result in results.items()},
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(metrics.plain(record), indent=1) + "\n")
    if args.plot:
        shown = {f"{side}, {setting}": run for side, settings in runs.items() for setting, run in settings.items()}
        plot.plot_runs(args.plot, f"{title}\n{trace.describe()}", shown, *replay.targets(args))


if __name__ == "__main__":
    main()
