"""Serving while training: replays timed arrivals, open loop, against this engine and against transformers + PEFT.

    python benchmarks/unified.py --shape 100m --scale 0.1 --out benchmarks/results/unified_cpu.json --plot unified.png
    python benchmarks/unified.py --shape llama-3-8b --device cuda --arrivals piecewise --adapters 4 --trainers 2
    python benchmarks/unified.py --shape llama-3-8b --device cuda --cases benchmarks/unified_h200.txt --out unified.json

Three settings, one after another: inference-only, fine-tune-only, unified. Three sides, each in a process of its own (one for all
cases, so that the model is loaded once) on the same trace: loquetier (with the latency target), throughput (this engine without
one: training is not pre-empted), peft. Weights are random, so tokens mean nothing and every request runs to its length; times are
those of a model of that shape. What each figure means: loquetier_core/sizing/metrics.py. Read next: _replay.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
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


def make_parser(shape: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=replay.SHAPES, default="quick", help="of the model; random weights")
    parser.add_argument("--device", default="cpu", help="of every side: cpu, cuda, cuda:1")
    parser.add_argument("--setting", choices=replay.SETTINGS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--side", choices=SIDES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--cases", type=Path, help="a file of several workloads, one a line: a name, a colon, more arguments")
    parser.add_argument("--case", action="append", help="of the file; may be repeated (default: all)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="target of the first token")
    parser.add_argument("--tpot-ms", type=float, default=50.0, help="target of the time per token after it")
    parser.add_argument("--train-seconds", type=float, default=30.0, help="of the fine-tune-only setting")
    parser.add_argument("--warm-seconds", type=float, default=5.0, help="of training before anything is measured")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which a setting is cut off; 0: 1.5 traces")
    parser.add_argument("--threads", type=int, default=2, help="of each side on the CPU")
    parser.add_argument("--batch-tokens", type=int, default=0, help="rows of one step of the engine; 0: 512 (CPU), 8192")
    parser.add_argument("--kv-tokens", type=int, default=0, help="of the engine's KV pool; 0: 65536 (CPU), the memory left")
    parser.add_argument("--trace-path", type=Path, help="a Chrome / Perfetto trace of the unified setting, engine with the target")
    parser.add_argument("--peft-batch", type=int, default=64, help="sequences that PEFT generates at once")
    parser.add_argument("--peft-turns", type=int, default=8, help="generation steps of PEFT between two mini-batches of training")
    parser.add_argument("--peft-checkpointing", action="store_true", help="PEFT recomputes activations: less memory, more time")
    parser.add_argument("--out", type=Path, help="write figures as JSON to this file, beside what it has of other cases")
    parser.add_argument("--records", action="store_true", help="every request's times in it too")
    parser.add_argument("--plot", type=Path, help="draw the runs as PNG to this file (with several cases: their names added)")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    workload.add_arguments(parser, **CPU_DEFAULTS.get(shape, {}))
    return parser


@dataclasses.dataclass
class Case:
    name: str
    args: argparse.Namespace
    trace: workload.Workload
    sides: tuple[str, ...]


def chosen(wanted: list[str] | None, of: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in of if not wanted or name in wanted)


def parse_cases() -> tuple[argparse.Namespace, list[Case]]:
    """The common arguments, and what is to run."""
    shapes = argparse.ArgumentParser(add_help=False)
    shapes.add_argument("--shape", default="quick")
    parser = make_parser(shapes.parse_known_args()[0].shape)
    common_args = parser.parse_args()
    lines = [("default", "")]
    if common_args.cases:
        text = [line.strip() for line in common_args.cases.read_text().splitlines()]
        lines = [(name.strip(), more) for name, _, more in (t.partition(":") for t in text if t and not t.startswith("#"))]
        if unknown := set(common_args.case or ()) - {name for name, _ in lines}:
            parser.error(f"--case: not in {common_args.cases}: {', '.join(sorted(unknown))}")
    cases = []
    for name, more in lines:
        if common_args.cases and common_args.case and name not in common_args.case:
            continue
        own = parser.parse_args(shlex.split(more))
        args = parser.parse_args([*sys.argv[1:], *shlex.split(more)])
        for field in ("shape", "device", "threads"):  # one model for all
            if getattr(args, field) != getattr(common_args, field):
                parser.error(f"--cases: {name}: --{field} is for all cases")
        for field in ("ttft_ms", "tpot_ms", "train_seconds", "threads", "peft_batch", "peft_turns"):
            if not getattr(args, field) > 0:
                parser.error(f"--{field.replace('_', '-')}: expected > 0, got {getattr(args, field)}")
        args.setting = chosen(own.setting or common_args.setting, replay.SETTINGS)
        sides = tuple(s for s in chosen(own.side, SIDES) if s in chosen(common_args.side, SIDES))
        cases.append(Case(name, args, workload.make_workload(workload.from_arguments(args)), sides))
    return common_args, cases


def worker(args: argparse.Namespace, cases: list[Case]) -> None:
    """Runs one side of every case on one loaded model; prints a line of JSON for each."""
    if args.worker == "peft":
        from _replay_peft import PeftSide as Side  # torch only where it is used
    else:
        from _replay_engine import EngineSide as Side

    side = Side(args, with_target=args.worker == "loquetier")
    for case in cases:
        if args.worker in case.sides:
            side.start(case.args, case.trace)
            print(json.dumps({"case": case.name, **replay.run_settings(side, case.args, case.trace)}), flush=True)
    side.close()


def run_side(side: str, args: argparse.Namespace, take) -> bool:
    """Hands every result of the side to take(), from a process of its own that has the same arguments; True: it went well."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(args.threads)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                take(json.loads(line))
    if process.returncode != 0:
        print(f"{side}: {' '.join(command)} exited with {process.returncode}", file=sys.stderr)
    return process.returncode == 0


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
                if "live_training_tokens_per_second" in figures:
                    figures["live_training_share"] = figures["live_training_tokens_per_second"] / alone
            table.setdefault(setting, {})[side] = figures
    return {setting: table[setting] for setting in replay.SETTINGS if setting in table}


def saved(out: Path, shape: str, device: str) -> dict:
    """What the file has of the same model on the same device; nothing when there is none."""
    if not out.exists():
        return {}
    record = json.loads(out.read_text())
    for name, value in (("benchmark", "unified"), ("shape", replay.SHAPES[shape]), ("device", device)):
        if record.get(name) != value:
            raise SystemExit(f"--out {out}: expected a file with {name} {value!r}, got {record.get(name)!r}")
    return record["cases"]


def write(out: Path, shape: str, device: str, load: float, case: Case, results: dict[str, dict], figures: dict) -> None:
    """Puts a case into the file. Sides and settings that it has of the case and that did not run now stay."""
    every = saved(out, shape, device)
    entry = every.setdefault(case.name, {})
    if entry.get("workload", case.trace.describe()) != case.trace.describe():
        entry = every[case.name] = {}
    merged = entry.get("figures", {})
    for setting, sides in figures.items():
        merged.setdefault(setting, {}).update(sides)
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(case.args).items() if k not in ("out", "plot", "worker")}
    entry |= {"commit": common.commit(), "versions": common.versions(), "load_before": round(load, 2), "arguments": shown,
              "workload": case.trace.describe(), "figures": merged}  # fmt: skip
    entry["peak_mb"] = {**entry.get("peak_mb", {}), **{side: result["peak_mb"] for side, result in results.items()}}
    if "cost_model" in results.get("loquetier", {}):
        entry["cost_model"] = results["loquetier"]["cost_model"]
    if case.args.records:
        entry["records"] = {**entry.get("records", {}), **{side: result["settings"] for side, result in results.items()}}
    record = {"benchmark": "unified", "device": device, "shape": replay.SHAPES[shape], "cases": every}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(metrics.plain(record), indent=1) + "\n")


def report(args: argparse.Namespace, case: Case, results: dict[str, dict], load: float, several: bool) -> None:
    """Prints, writes and draws one case with the sides that are in."""
    runs = {
        side: {setting: replay.load_record(record) for setting, record in result["settings"].items()}
        for side, result in results.items()
    }
    figures = figures_of(runs, case.args)
    device = next(iter(results.values()))["device"]
    where = f"{common.cpu_name()}, {args.threads} threads, f32" if device == "cpu" else f"{device}, bf16"
    title = f"{args.shape} on {where}; target {case.args.ttft_ms:g} ms first token, {case.args.tpot_ms:g} ms per token"
    print(f"\n{f'{case.name}: ' if several else ''}{title}\n{case.trace.describe()}")
    for setting, columns in figures.items():
        print(f"\n{setting}\n{metrics.format_columns(columns)}", flush=True)
    if args.out:
        write(args.out, args.shape, where, load, case, results, figures)
    if args.plot:
        path = args.plot.with_stem(f"{args.plot.stem}_{case.name}") if several else args.plot
        shown = {f"{side}, {setting}": run for side, settings in runs.items() for setting, run in settings.items()}
        plot.plot_runs(path, f"{title}\n{case.trace.describe()}", shown, *replay.targets(case.args))


def main() -> None:
    try:
        args, cases = parse_cases()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    if args.worker:
        worker(args, cases)
        return
    if args.plot:
        plot.require_matplotlib()  # before an hour of measuring, not after
    load = os.getloadavg()[0]
    results: dict[str, dict[str, dict]] = {case.name: {} for case in cases}
    well = True
    for side in SIDES:
        if not any(side in case.sides for case in cases):
            continue

        def take(result: dict, side: str = side) -> None:
            case = next(c for c in cases if c.name == result["case"])
            results[case.name][side] = result
            if len(results[case.name]) == len(case.sides):
                report(args, case, results[case.name], load, len(cases) > 1)

        well &= run_side(side, args, take)
    for case in cases:  # of which some side did not end well
        if 0 < len(results[case.name]) < len(case.sides):
            report(args, case, results[case.name], load, len(cases) > 1)
    if not well:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
