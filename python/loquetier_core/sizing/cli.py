"""`python -m loquetier_core simulate`: what a model on a device serves and trains, and how much of both fits under a target.

The engine's own planner decides every step of the trace, a cost model says how long each takes. The first table has the three
settings of the workload (inference-only, fine-tune-only, unified); with --search a second one has what more requests a second do,
up to the most that keeps the target. Read next: deployment.py, workload.py, metrics.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native
from . import deployment, metrics, plot, workload

SEARCH_SECONDS = 60.0  # of arrivals at each rate
SEARCH_REQUESTS = (200, 20000)  # at least, at most
SEARCH_PRECISION = 1.03  # between a rate that keeps the target and one that does not
HIGHEST_RATE = 1e5


def simulate(where: deployment.Deployment, trace: workload.Workload, serve: bool, train: bool, seconds: float) -> metrics.RunRecord:
    """One setting; `seconds` bounds it, and is its length when nothing is served."""
    o = trace.options
    n = len(trace) if serve else 0
    result = _native.simulate(
        arrivals=trace.arrivals[:n], adapters=trace.adapters[:n], prompts=trace.prompts[:n], outputs=trace.outputs[:n],
        serving=o.adapters, examples=[e.tolist() for e in trace.examples] if train else [], batch=o.batch,
        accumulation=o.accumulation, rank=o.rank,
        seconds=seconds, until_served=serve, seed=o.seed, noise=where.options.noise, **where.simulate_arguments(),
    )  # fmt: skip
    requests = []
    columns = [result[name].tolist() for name in ("scheduled", "first", "last", "longest_gap", "tokens")]
    for i, (scheduled, first, last, gap, tokens) in enumerate(zip(*columns, strict=True)):
        at = float(trace.arrivals[i])
        r = metrics.RequestRecord(at, int(trace.prompts[i]), int(trace.outputs[i]), tokens=tokens, longest_gap=gap)
        r.first, r.last = (first, last) if tokens else (math.nan, math.nan)
        r.queued = scheduled - at if scheduled >= 0 else math.nan
        requests.append(r)
    trained = list(zip(result["trained_at"].tolist(), result["trained_tokens"].tolist(), strict=True))
    window = float(result["seconds"])
    if not serve and trained:
        window = trained[-1][0]
    extra = {
        "steps": float(result["steps"]),
        "busy": result["busy"] / result["seconds"],
        "preemptions": float(result["preemptions"]),
    }
    return metrics.RunRecord(requests, window, trained, int(np.sum(result["trained_update"])), extra)


def settings(where: deployment.Deployment, trace: workload.Workload, seconds: float) -> dict[str, metrics.RunRecord]:
    runs = {}
    if len(trace):
        runs["inference"] = simulate(where, trace, True, False, seconds)
    if trace.options.trainers:
        runs["training"] = simulate(where, trace, False, True, min(seconds, max(60.0, trace.duration)))
    if len(runs) == 2:
        runs["unified"] = simulate(where, trace, True, True, seconds)
    return runs


def figures_of(runs: dict[str, metrics.RunRecord], ttft: float, tpot: float) -> dict[str, dict[str, float]]:
    figures = {setting: metrics.summarise(run, ttft, tpot) for setting, run in runs.items()}
    if "unified" in figures:
        alone = figures["training"].get("training_tokens_per_second", math.nan)
        figures["unified"]["training_share"] = figures["unified"].get("training_tokens_per_second", 0.0) / alone
    return figures


def search(where: deployment.Deployment, options: workload.WorkloadOptions, wanted: float, alone: float) -> list[dict[str, float]]:
    """Every rate that was tried, ascending, with its figures: doubling until the target is missed, then halving the gap."""
    ttft, tpot = where.options.ttft_ms / 1e3, where.options.tpot_ms / 1e3
    arrivals = options.arrivals if options.arrivals in ("even", "poisson", "gamma") else "poisson"
    tried: dict[float, dict[str, float]] = {}

    def meets(rate: float) -> bool:
        n = int(min(max(rate * SEARCH_SECONDS, SEARCH_REQUESTS[0]), SEARCH_REQUESTS[1]))
        trace = workload.make_workload(dataclasses.replace(options, arrivals=arrivals, rate=rate, requests=n, speed=1.0, scale=1.0))
        run = simulate(where, trace, True, options.trainers > 0, 2 * trace.duration + 60)
        figures = metrics.summarise(run, ttft, tpot)
        if alone:
            figures["training_share"] = figures.get("training_tokens_per_second", 0.0) / alone
        tried[rate] = {"rate": rate, **figures}
        return figures["attained"] >= wanted

    low, high = 0.0, 1.0
    while high < HIGHEST_RATE and meets(high):
        low, high = high, 2 * high
    if not low:  # it serves less than one a second: downwards
        low = high / 2
        while low > 1e-3 and not meets(low):
            low, high = low / 2, low
    while high / low > SEARCH_PRECISION and high < HIGHEST_RATE and low > 1e-3:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return [tried[rate] for rate in sorted(tried)]


def format_search(tried: list[dict[str, float]], wanted: float) -> str:
    lines = [("requests", "inside", "first token p99", "per token p99", "generated", "training", "of alone")]
    for point in tried:
        lines.append((
            f"{point['rate']:.2f}/s", f"{100 * point['attained']:.1f} %", f"{1e3 * point['ttft_p99']:,.0f} ms",
            f"{1e3 * point['tpot_p99']:,.1f} ms", f"{point['output_tokens_per_second']:,.0f} tok/s",
            metrics.show(point.get("training_tokens_per_second"), "tok/s", 1), metrics.show(point.get("training_share"), "%", 100),
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    best = [point for point in tried if point["attained"] >= wanted]
    if not best:
        return f"{table}\nno rate keeps {100 * wanted:g} % of the requests inside the targets"
    text = f"{table}\nup to {best[-1]['rate']:.1f} requests a second with {100 * wanted:g} % of them inside the targets"
    if "training_tokens_per_second" in best[-1]:
        text += f"; training then has {best[-1]['training_tokens_per_second']:,.0f} tokens a second"
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loquetier_core simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    deployment.add_arguments(parser)
    workload.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=86400.0, help="simulated at most (default: %(default)g)")
    parser.add_argument("--noise", type=float, default=0.0, help="relative deviation of step times from the model (default: 0)")
    parser.add_argument("--search", action="store_true", help="find the most requests a second that keep the target")
    parser.add_argument(
        "--wanted", type=float, default=0.99, help="share of the requests inside the targets (default: %(default)g)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--plot", type=Path, help="draw the runs (with --search: the rates) as PNG to this file")
    options = parser.parse_args(arguments)
    if not options.seconds > 0 or options.noise < 0 or not 0 < options.wanted <= 1:
        parser.error(
            f"expected --seconds > 0, --noise >= 0, --wanted in (0, 1], got {options.seconds}, {options.noise}, {options.wanted}"
        )
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.plot:
        plot.require_matplotlib()
    try:
        trace = workload.make_workload(workload.from_arguments(options))
        o = trace.options
        where = deployment.make_deployment(options, o.adapters, o.trainers, o.rank)
        runs = settings(where, trace, options.seconds)
        figures = figures_of(runs, options.ttft_ms / 1e3, options.tpot_ms / 1e3)
        alone = figures.get("training", {}).get("training_tokens_per_second", 0.0)
        tried = search(where, o, options.wanted, alone) if options.search and len(trace) else []
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    d = where.device
    target = "no target" if options.no_target else f"target {options.ttft_ms:g} ms first token, {options.tpot_ms:g} ms per token"
    rates = (
        "a learned cost model"
        if options.cost_model
        else f"{d.bytes_per_second / 1e9:,.0f} GB/s, {d.flops_per_second / 1e12:,.1f} TFLOP/s"
    )
    title = f"{options.model} ({where.sizes['parameters'] / 1e9:.1f} B, {d.dtype}) on {options.device} ({rates}); {target}"
    shares = ", ".join(f"{name} {size / deployment.GIB:.1f}" for name, size in where.memory.items())
    print(f"{title}\n{trace.describe()}\nGiB: {shares} ({where.kv_tokens:,} tokens)\n\n{metrics.format_columns(figures)}")
    if tried:
        print(f"\n{format_search(tried, options.wanted)}")
    if options.out:
        record: dict[str, Any] = {
            "title": title, "workload": trace.describe(), "memory": where.memory, "kv_tokens": where.kv_tokens,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}, "figures": figures,
            "search": tried,
        }  # fmt: skip
        options.out.write_text(json.dumps(metrics.plain(record), indent=1) + "\n")
    if options.plot and tried:
        plot.plot_search(options.plot, f"{title}\n{trace.describe()}", tried, options.wanted)
    elif options.plot:
        plot.plot_runs(options.plot, f"{title}\n{trace.describe()}", runs, options.ttft_ms / 1e3, options.tpot_ms / 1e3)
    return 0
