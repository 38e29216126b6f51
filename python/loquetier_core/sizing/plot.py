"""Plots of runs and of a sizing search, as PNG. matplotlib is imported here only, and only when a plot is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import RunRecord

STEPS = 120  # bins of a plot over time


def require_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("a plot needs matplotlib: pip install 'loquetier-core[plot]', or leave the plot out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def distribution(axes: Any, values: list[float], label: str, target: float) -> None:
    kept = np.sort([v for v in values if math.isfinite(v)])
    if len(kept):
        axes.plot(1e3 * kept, np.arange(1, len(kept) + 1) / len(kept), label=label)
    axes.axvline(1e3 * target, color="0.6", linewidth=0.8, linestyle="--")


def plot_runs(path: Path, title: str, runs: dict[str, RunRecord], ttft: float, tpot: float) -> None:
    """Distributions of the latencies of every run, and served and trained tokens over time."""
    pyplot = require_matplotlib()
    figure, ((first, per_token), (served, trained)) = pyplot.subplots(2, 2, figsize=(12, 7.5), constrained_layout=True)
    for name, run in runs.items():
        if run.requests:
            distribution(first, [r.ttft for r in run.requests], name, ttft)
            distribution(per_token, [r.tpot for r in run.requests], name, tpot)
            edges = np.linspace(0, max(run.window, 1e-9), STEPS + 1)
            rates = np.zeros(STEPS)
            for r in run.requests:  # a request's tokens, spread between its first and last
                if r.tokens:
                    covered = np.clip(edges, r.first, max(r.last, r.first + 1e-9))
                    rates += r.tokens * np.diff(covered) / max(r.last - r.first, 1e-9)
            served.plot(edges[1:], rates / np.diff(edges), label=name)
        if run.trained:
            times, tokens = np.array(run.trained).T
            order = np.argsort(times)
            trained.plot(times[order], np.cumsum(tokens[order]), label=name)
    for axes, what in ((first, "first token, ms"), (per_token, "time per token, ms")):
        axes.set(xlabel=what, ylabel="share of requests", xscale="log", ylim=(0, 1.02))
    served.set(xlabel="seconds", ylabel="generated tokens a second")
    trained.set(xlabel="seconds", ylabel="real tokens trained")
    for axes in (first, per_token, served, trained):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium", wrap=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_search(path: Path, title: str, tried: list[dict[str, float]], wanted: float) -> None:
    """Attainment and training over the rate of requests."""
    pyplot = require_matplotlib()
    tried = sorted(tried, key=lambda point: point["rate"])
    figure, attained = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    rates = [point["rate"] for point in tried]
    handles = attained.plot(rates, [100 * point["attained"] for point in tried], "o-", label="inside the targets")
    attained.axhline(100 * wanted, color="0.6", linewidth=0.8, linestyle="--")
    attained.set(xlabel="requests a second", ylabel="% of requests inside the targets", xscale="log", ylim=(0, 102))
    attained.grid(alpha=0.3)
    points = [(point["rate"], point["training_tokens_per_second"]) for point in tried if "training_tokens_per_second" in point]
    if points:
        training = attained.twinx()
        handles += training.plot(*zip(*points, strict=True), "s-", color="tab:orange", label="training")
        training.set(ylabel="training, real tokens a second", ylim=(0, None))
    figure.suptitle(title, fontsize="medium", wrap=True)
    attained.legend(handles=handles, loc="center left", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
