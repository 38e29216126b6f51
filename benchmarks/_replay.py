"""What the sides of unified.py share: shapes, the clock of a trace, random tokens, the three settings one after another.

A side is a class with `start(args, trace)`, `warm_up(train)`, `run(trace, serve, train, seconds)` and `close()`; run_settings
drives it through one workload. Read next:
_replay_engine.py, _replay_peft.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time

import _common as common
import numpy as np
from loquetier_core.sizing import metrics, workload

SHAPES = {
    **common.SHAPES,
    "llama-3-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
SETTINGS = ("inference", "training", "unified")
LEARNING_RATE = 1e-4
WARM_REQUESTS, WARM_TOKENS = 16, 32


def targets(args: argparse.Namespace) -> tuple[float, float]:
    """(first token, time per token), seconds."""
    return args.ttft_ms / 1e3, args.tpot_ms / 1e3


def limit_of(args: argparse.Namespace, trace: workload.Workload) -> float:
    """Seconds after which a setting with requests is cut off; what has not ended by then missed its targets (metrics: "so far")."""
    return args.limit or trace.duration + max(30.0, 0.5 * trace.duration)


class Clock:
    """Seconds since the start of a trace."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start


class Prompts:
    """Random token ids: the same for every side."""

    def __init__(self, shape: str, seed: int) -> None:
        self.vocab = SHAPES[shape]["vocab_size"]
        self.seed = seed

    def request(self, index: int, length: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 1, index)).integers(3, self.vocab, length, dtype=np.int32)

    def example(self, trainer: int, index: int, length: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 2, trainer, index)).integers(3, self.vocab, length, dtype=np.int32)


class TrainingData:
    """The endless sequence of mini-batches of one trainer."""

    def __init__(self, trace: workload.Workload, trainer: int, prompts: Prompts) -> None:
        self.trainer, self.prompts = trainer, prompts
        self.lengths, self.batch = trace.examples[trainer], trace.options.batch
        self.accumulation = trace.options.accumulation
        self.next = 0  # mini-batch

    def mini_batch(self) -> tuple[list[np.ndarray], bool]:
        """(its examples, whether an optimizer step follows)"""
        first = self.next * self.batch
        examples = [
            self.prompts.example(self.trainer, i, int(self.lengths[i % len(self.lengths)]))
            for i in range(first, first + self.batch)
        ]
        self.next += 1
        return examples, self.next % self.accumulation == 0


def warm_trace(trace: workload.Workload) -> workload.Workload:
    """A few of its requests at once with short answers."""
    n = min(WARM_REQUESTS, len(trace))
    return dataclasses.replace(
        trace, arrivals=np.zeros(n), adapters=trace.adapters[:n], prompts=trace.prompts[:n],
        outputs=np.minimum(trace.outputs[:n], WARM_TOKENS),
    )  # fmt: skip


def new_records(trace: workload.Workload) -> list[metrics.RequestRecord]:
    return [
        metrics.RequestRecord(float(at), int(prompt), int(output))
        for at, prompt, output in zip(trace.arrivals, trace.prompts, trace.outputs, strict=True)
    ]


def run_settings(side, args: argparse.Namespace, trace: workload.Workload) -> dict:
    """Runs the settings asked for; their records, and what is known of the side."""
    wanted = args.setting if trace.options.trainers else tuple(s for s in args.setting if s == "inference")
    side.warm_up(train="training" in wanted or "unified" in wanted)
    results = {}
    for setting in wanted:
        begin = time.perf_counter()
        serve, train = setting != "training", setting != "inference"
        record = side.run(trace, serve, train, limit_of(args, trace) if serve else args.train_seconds)
        results[setting] = dataclasses.asdict(record)
        print(f"{args.worker}, {setting}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    known = {"peak_mb": common.memory_mb("VmHWM"), "device": side.device_name()}
    if hasattr(side, "cost_model"):
        known["cost_model"] = side.cost_model()  # what `python -m loquetier_core simulate --cost-model` reads
    return {"settings": metrics.plain(results), **known}


def load_record(data: dict) -> metrics.RunRecord:
    def number(value):
        return math.nan if value is None else value

    requests = [metrics.RequestRecord(**{k: number(v) for k, v in r.items()}) for r in data["requests"]]
    trained = [(at, tokens) for at, tokens in data["trained"]]
    extra = {k: number(v) for k, v in data["extra"].items()}
    return metrics.RunRecord(requests, data["window"], trained, data["updates"], extra)
