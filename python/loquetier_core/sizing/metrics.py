"""From what happened to figures: percentiles, throughput, attainment of latency targets, and their table.

Conventions: every latency counts from the moment the trace says a request came, not from when somebody took it in. TTFT is the
time to the first token; TPOT the mean time of a request's tokens after the first, so a request of one token has none and meets
any such target. Attainment is over all requests: one that never ended meets nothing. "So far" it does while what was seen of it
before the run was cut off does, its first token and the mean time of its tokens up to there; one without a token meets nothing.
Training counts real tokens (no padding) of mini-batches whose backward ended inside the window, optimizer steps in their time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

TTFT_TARGETS = (6.0, 1.0)  # seconds
TPOT_TARGETS = (0.030, 0.050, 0.100)
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass
class RequestRecord:
    """Seconds on the trace's clock; NaN: it did not happen."""

    arrived: float
    prompt: int
    wanted: int  # tokens
    first: float = math.nan  # token
    last: float = math.nan
    tokens: int = 0
    longest_gap: float = 0.0  # between two of its tokens
    queued: float = math.nan  # seconds before its first row was computed

    @property
    def done(self) -> bool:
        return self.tokens >= self.wanted

    @property
    def ttft(self) -> float:
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan

    def token(self, at: float) -> None:
        if self.tokens:
            self.longest_gap = max(self.longest_gap, at - self.last)
        else:
            self.first = at
        self.last = at
        self.tokens += 1

    def meets(self, ttft: float = math.inf, tpot: float = math.inf) -> bool:
        return self.done and self.meets_so_far(ttft, tpot)

    def meets_so_far(self, ttft: float = math.inf, tpot: float = math.inf) -> bool:
        return self.ttft <= ttft and (self.tokens <= 1 or self.tpot <= tpot)


@dataclasses.dataclass
class RunRecord:
    """What one setting of one side did."""

    requests: list[RequestRecord]
    window: float  # seconds: requests and training count inside it
    trained: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # (time, real tokens) of every mini-batch
    updates: int = 0
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


def percentile(values: Iterable[float], q: float) -> float:
    kept = [v for v in values if math.isfinite(v)]
    return float(np.percentile(kept, q)) if kept else math.nan


def attainment(requests: Sequence[RequestRecord], ttft: float = math.inf, tpot: float = math.inf) -> float:
    """Share of all requests that ended inside both targets; NaN without requests."""
    return sum(r.meets(ttft, tpot) for r in requests) / len(requests) if requests else math.nan


def attainment_so_far(requests: Sequence[RequestRecord], ttft: float = math.inf, tpot: float = math.inf) -> float:
    """Share of all requests inside both targets as far as they ran; NaN without requests."""
    return sum(r.meets_so_far(ttft, tpot) for r in requests) / len(requests) if requests else math.nan


def training_rate(run: RunRecord) -> float:
    """Real tokens a second over the window."""
    return sum(tokens for at, tokens in run.trained if at <= run.window) / run.window if run.window > 0 else math.nan


def live_window(requests: Sequence[RequestRecord]) -> tuple[float, float] | None:
    """While every request was running: from the last first token to the first last one. None: there was no such time."""
    if not requests or not all(r.tokens for r in requests):
        return None
    begin, end = max(r.first for r in requests), min(r.last for r in requests)
    return (begin, end) if begin < end else None


def training_rate_between(run: RunRecord, begin: float, end: float) -> float:
    """Real tokens a second from the first end of a mini-batch in the window to the last one; NaN with fewer than two."""
    times = [at for at, _ in run.trained if begin <= at <= end]
    if not times or times[-1] <= times[0]:
        return math.nan
    return sum(tokens for at, tokens in run.trained if times[0] < at <= times[-1]) / (times[-1] - times[0])


def summarise(run: RunRecord, ttft: float, tpot: float) -> dict[str, float]:
    """The figures of a run; `ttft` and `tpot`: the targets in force, seconds."""
    figures: dict[str, float] = {}
    rs = run.requests
    if rs:
        figures["requests"] = len(rs)
        figures["unfinished"] = sum(not r.done for r in rs)
        figures["requests_per_second"] = sum(r.done for r in rs) / run.window
        figures["output_tokens_per_second"] = sum(r.tokens for r in rs) / run.window
        figures["prompt_tokens_per_second"] = sum(r.prompt for r in rs if r.tokens) / run.window
        for name, values in (
            ("ttft", [r.ttft for r in rs]),
            ("tpot", [r.tpot for r in rs]),
            ("longest_gap", [r.longest_gap for r in rs if r.tokens > 1]),
            ("queued", [r.queued for r in rs]),
        ):
            for q in PERCENTILES:
                figures[f"{name}_p{q}"] = percentile(values, q)
        figures["first_queued"] = next((r.queued for r in rs if math.isfinite(r.queued)), math.nan)
        for target in TTFT_TARGETS:
            figures[f"attained_ttft_{target:g}s"] = attainment(rs, ttft=target)
        for target in TPOT_TARGETS:
            figures[f"attained_tpot_{1000 * target:g}ms"] = attainment(rs, tpot=target)
        figures["attained"] = attainment(rs, ttft, tpot)
        figures["attained_so_far"] = attainment_so_far(rs, ttft, tpot)
    if run.trained or run.updates:
        figures["training_tokens_per_second"] = training_rate(run)
        figures["optimizer_steps"] = run.updates
        if live := live_window(rs):
            figures["live_training_tokens_per_second"] = training_rate_between(run, *live)
    figures["window"] = run.window
    return {**figures, **run.extra}


# ---------------------------------------------------------------- table

# (name in the figures, label, unit, factor)
ROWS = (
    ("requests", "requests", "", 1),
    ("unfinished", "unfinished", "", 1),
    ("requests_per_second", "requests", "/s", 1),
    ("output_tokens_per_second", "generated", "tok/s", 1),
    ("ttft_p50", "first token, p50", "ms", 1e3),
    ("ttft_p90", "first token, p90", "ms", 1e3),
    ("ttft_p99", "first token, p99", "ms", 1e3),
    ("tpot_p50", "time per token, p50", "ms", 1e3),
    ("tpot_p90", "time per token, p90", "ms", 1e3),
    ("tpot_p99", "time per token, p99", "ms", 1e3),
    ("longest_gap_p99", "longest gap, p99", "ms", 1e3),
    ("first_queued", "first request queued", "ms", 1e3),
    ("queued_p99", "queued, p99", "ms", 1e3),
    *((f"attained_ttft_{t:g}s", f"first token <= {t:g} s", "%", 100) for t in TTFT_TARGETS),
    *((f"attained_tpot_{1000 * t:g}ms", f"time per token <= {1000 * t:g} ms", "%", 100) for t in TPOT_TARGETS),
    ("attained", "both targets", "%", 100),
    ("attained_so_far", "both, as far as they ran", "%", 100),
    ("training_tokens_per_second", "training, real tokens", "tok/s", 1),
    ("training_share", "of stand-alone training", "%", 100),
    ("live_training_tokens_per_second", "while all requests ran", "tok/s", 1),
    ("live_training_share", "of stand-alone training", "%", 100),
    ("optimizer_steps", "optimizer steps", "", 1),
    ("prediction_error_median", "step time predicted, error p50", "%", 100),
    ("prediction_error_p95", "step time predicted, error p95", "%", 100),
    ("steps", "steps", "", 1),
    ("busy", "busy", "%", 100),
    ("window", "window", "s", 1),
)


def show(value: float | None, unit: str, factor: float) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    scaled = value * factor
    whole = float(scaled).is_integer() and not unit
    text = f"{scaled:,.0f}" if whole or abs(scaled) >= 1000 else f"{scaled:,.1f}" if abs(scaled) >= 10 else f"{scaled:,.2f}"
    return f"{text} {unit}".strip() if unit not in ("/s", "%") else text + (unit if unit == "/s" else " %")


def format_columns(columns: dict[str, dict[str, float]]) -> str:
    """A table with one column a run and one line for every figure that some run has."""
    lines = [("", *columns)]
    for name, label, unit, factor in ROWS:
        values = [figures.get(name) for figures in columns.values()]
        if any(v is not None and math.isfinite(v) for v in values):
            lines.append((label, *(show(v, unit, factor) for v in values)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def plain(value: Any) -> Any:
    """For JSON: NaN is null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
