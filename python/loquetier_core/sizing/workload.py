"""Workloads: timed arrivals of requests, their adapters and lengths, and what is trained meanwhile.

A workload is a pure function of its options and its seed; arrivals, adapters, lengths and training data come from generators of
their own, so that changing one leaves the others as they were. Times are seconds from the start of the trace, lengths tokens.
Read next: metrics.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ARRIVALS = ("even", "poisson", "gamma", "piecewise", "burst", "file")
PIECES = "120@1,150@2.5,240@2,120@1"  # requests at requests a second
# Log-normal lengths: (median, sigma of the logarithm, shortest, longest). Prompts reach 2k at the 99th percentile.
CHAT_PROMPT = (200.0, 0.99, 4, 2048)
CHAT_OUTPUT = (150.0, 0.9, 1, 2048)
INSTRUCTION = (120.0, 0.85, 8, 1024)
DRAWN_EXAMPLES = 4096  # of each trainer; then they come round again


@dataclasses.dataclass(frozen=True)
class WorkloadOptions:
    arrivals: str = "poisson"
    rate: float = 2.0  # requests a second: even, poisson, gamma
    gamma_shape: float = 0.5  # of the gaps: 1 is Poisson, smaller is burstier
    pieces: str = PIECES
    timestamps: str = ""  # a file, one number of seconds a line
    requests: int = 200  # even, poisson, gamma, burst
    burst_at: float = 0.0  # when all of a burst come
    speed: float = 1.0  # the trace's clock runs so many times faster
    scale: float = 1.0  # share of the requests that is kept, rates unchanged: a shorter trace
    adapters: int = 4  # that serve; 0: the base model alone
    zipf: float = 0.0  # exponent of the adapters' popularity; 0: uniform
    lengths: str = "chat"  # or "fixed"
    prompt: int = 200  # median, or fixed
    output: int = 150
    max_length: int = 4096  # of prompt and output together: longer ones are cut
    trainers: int = 1
    train_data: str = "instruction"  # or "packed"
    train_length: int = 0  # median, or of every packed sequence; 0: 120, or 2048
    batch: int = 4  # examples of a mini-batch
    accumulation: int = 4  # mini-batches of an optimizer step
    rank: int = 16  # of every adapter
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    options: WorkloadOptions
    arrivals: Floats  # [n] ascending
    adapters: Ints  # [n] 0 .. adapters - 1, or -1: base model
    prompts: Ints  # [n] tokens
    outputs: Ints  # [n] tokens
    examples: list[Ints]  # per trainer: tokens of its examples, to be used in turn
    full_requests: int  # before `scale` shortened the trace

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def duration(self) -> float:
        """Seconds until the last arrival."""
        return float(self.arrivals[-1]) if len(self) else 0.0

    def describe(self) -> str:
        o = self.options
        text = f"{len(self)} requests in {self.duration:.1f} s ({o.arrivals}), "
        text += f"{o.adapters} adapters" + (f" (Zipf {o.zipf:g})" if o.zipf else "")
        if len(self):
            text += f", prompts of {np.median(self.prompts):.0f} and outputs of {np.median(self.outputs):.0f} tokens (medians)"
        if o.trainers:
            length = np.median(np.concatenate(self.examples))
            text += f"; {o.trainers} trainers on {o.train_data} data of {length:.0f} tokens (median)"
            text += f", batch {o.batch} x {o.accumulation}"
        if len(self) != self.full_requests:
            text += f"; trace shortened from {self.full_requests} requests"
        return text


def fail(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"[workload] {name}: expected {expected}, got {got!r}")


def parse_pieces(text: str) -> list[tuple[int, float]]:
    """ "120@1,150@2.5" -> [(120, 1.0), (150, 2.5)]"""
    pieces = []
    for part in text.split(","):
        count, at, rate = part.partition("@")
        try:
            piece = (int(count), float(rate))
        except ValueError:
            piece = (0, 0.0)
        if not at or piece[0] < 1 or not 0 < piece[1] < math.inf:
            raise fail("pieces", "requests@rate,… with both > 0", text)
        pieces.append(piece)
    return pieces


def read_timestamps(path: str) -> Floats:
    """One number of seconds a line; sorted, and shifted to begin at 0."""
    times = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            seconds = float(line)
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds):
            raise fail(f"{path}, line {number}", "a number of seconds", line)
        times.append(seconds)
    if not times:
        raise fail(f"timestamps {path}", "at least one number of seconds", "none")
    return np.sort(np.array(times)) - min(times)


def check(o: WorkloadOptions) -> None:
    for name, choices in (("arrivals", ARRIVALS), ("lengths", ("chat", "fixed")), ("train_data", ("instruction", "packed"))):
        if getattr(o, name) not in choices:
            raise fail(name, f"one of {', '.join(choices)}", getattr(o, name))
    positive = ("rate", "gamma_shape", "speed", "prompt", "output", "batch", "accumulation", "rank")
    for name in positive:
        if not 0 < getattr(o, name) < math.inf:
            raise fail(name, "> 0", getattr(o, name))
    for name in ("requests", "burst_at", "adapters", "zipf", "trainers", "train_length", "seed"):
        if not 0 <= getattr(o, name) < math.inf:
            raise fail(name, ">= 0", getattr(o, name))
    if not 0 < o.scale <= 1:
        raise fail("scale", "in (0, 1]", o.scale)
    if o.max_length < 8:
        raise fail("max_length", ">= 8", o.max_length)
    if o.arrivals == "file" and not o.timestamps:
        raise fail("timestamps", "a file for arrivals from a file", o.timestamps)


def arrival_times(o: WorkloadOptions, random: np.random.Generator) -> tuple[Floats, int]:
    """Times of the kept requests, and how many the whole trace has."""

    def kept(n: int) -> int:
        return max(1, round(n * o.scale)) if n else 0

    if o.arrivals == "file":
        every = read_timestamps(o.timestamps)
        times, full = every[: kept(len(every))], len(every)
    elif o.arrivals == "burst":
        times, full = np.full(kept(o.requests), o.burst_at), o.requests
    elif o.arrivals == "piecewise":  # Poisson inside a piece
        pieces = parse_pieces(o.pieces)
        gaps = np.concatenate([random.exponential(1 / rate, kept(n)) for n, rate in pieces])
        times, full = np.cumsum(gaps), sum(n for n, _ in pieces)
    else:
        n, full = kept(o.requests), o.requests
        if o.arrivals == "even":
            gaps = np.full(n, 1 / o.rate)
        elif o.arrivals == "poisson":
            gaps = random.exponential(1 / o.rate, n)
        else:
            gaps = random.gamma(o.gamma_shape, 1 / (o.rate * o.gamma_shape), n)
        times = np.cumsum(gaps)
    return times / o.speed, full


def log_normal(parameters: tuple[float, float, int, int], n: int, random: np.random.Generator) -> Ints:
    median, sigma, low, high = parameters
    return np.clip(np.rint(random.lognormal(math.log(median), sigma, n)), low, high).astype(np.int64)


def popularity(adapters: int, zipf: float) -> Floats:
    """Share of the requests of each adapter, [adapters]."""
    weights = 1.0 / np.arange(1, adapters + 1) ** zipf
    return np.asarray(weights / weights.sum())


def make_workload(options: WorkloadOptions) -> Workload:
    check(options)
    o = options
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(o.seed).spawn(4)]
    times, full = arrival_times(o, streams[0])
    n = len(times)
    if o.adapters:
        adapters = streams[1].choice(o.adapters, size=n, p=popularity(o.adapters, o.zipf)).astype(np.int64)
    else:
        adapters = np.full(n, -1, dtype=np.int64)
    if o.lengths == "fixed":
        prompts, outputs = np.full(n, o.prompt, dtype=np.int64), np.full(n, o.output, dtype=np.int64)
    else:
        prompts = log_normal((o.prompt, *CHAT_PROMPT[1:]), n, streams[2])
        outputs = log_normal((o.output, *CHAT_OUTPUT[1:]), n, streams[2])
    prompts = np.minimum(prompts, o.max_length - 1)
    outputs = np.minimum(outputs, o.max_length - prompts)
    examples = []
    for _ in range(o.trainers):
        if o.train_data == "packed":
            examples.append(np.full(DRAWN_EXAMPLES, min(o.train_length or 2048, o.max_length), dtype=np.int64))
        else:
            drawn = log_normal((o.train_length or INSTRUCTION[0], *INSTRUCTION[1:]), DRAWN_EXAMPLES, streams[3])
            examples.append(np.minimum(drawn, o.max_length))
    return Workload(o, times, adapters, prompts, outputs, examples, full)


# ---------------------------------------------------------------- command line

HELP = {
    "arrivals": "when requests come: even, poisson, gamma (bursts), piecewise, burst (all at once), or a file of timestamps",
    "rate": "requests a second (even, poisson, gamma)",
    "gamma_shape": "of the gaps of gamma arrivals, 0.25 .. 1: smaller is burstier",
    "pieces": "of piecewise arrivals: requests@rate,…",
    "timestamps": "file with one number of seconds a line; sets --arrivals file",
    "requests": "how many (even, poisson, gamma, burst)",
    "burst_at": "seconds at which a burst comes",
    "speed": "the trace's clock runs so many times faster",
    "scale": "share of the requests that is kept, rates unchanged",
    "adapters": "that serve; 0 is the base model alone",
    "zipf": "exponent of the adapters' popularity; 0 is uniform",
    "lengths": "chat (log-normal around the medians) or fixed",
    "prompt": "tokens of a prompt: median, or fixed",
    "output": "tokens of an answer: median, or fixed",
    "max_length": "of prompt and answer together, and of a training example",
    "trainers": "adapters in training",
    "train_data": "instruction (log-normal lengths) or packed",
    "train_length": "tokens of an example: median, or packed; 0 is 120 or 2048",
    "batch": "examples of a mini-batch",
    "accumulation": "mini-batches of an optimizer step",
    "rank": "of every adapter",
    "seed": "of the trace",
}
CHOICES = {"arrivals": ARRIVALS, "lengths": ("chat", "fixed"), "train_data": ("instruction", "packed")}


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options of a workload as a group of `parser`; `defaults` replace those of WorkloadOptions."""
    group = parser.add_argument_group("workload")
    for field in dataclasses.fields(WorkloadOptions):
        default = defaults.get(field.name, field.default)
        group.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=default, choices=CHOICES.get(field.name),
            help=f"{HELP[field.name]} (default: {default})" if default != "" else HELP[field.name],
        )  # fmt: skip


def from_arguments(arguments: argparse.Namespace) -> WorkloadOptions:
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(WorkloadOptions)}
    if values["timestamps"]:
        values["arrivals"] = "file"
    return WorkloadOptions(**values)
