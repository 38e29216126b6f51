"""This engine's side of unified.py: a thread submits each request at its time, another drives step(), training is kept queued.

Open loop: the feeding thread waits for nobody, so a request that comes while a step runs is in the engine's inbox at its time.
Read next: _replay.py.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import threading
import time

import loquetier_core as lq
from _replay import LEARNING_RATE, SHAPES, Clock, Prompts, TrainingData, new_records, warm_trace
from loquetier_core.sizing import metrics, workload

AHEAD = 2  # optimizer steps of training queued for each trainer


def serving(index: int) -> str | None:
    return None if index < 0 else f"serve{index}"


class Feeder(threading.Thread):
    """Submits the requests of a trace, each at its time."""

    def __init__(self, engine: lq.Engine, trace: workload.Workload, prompts: list, clock: Clock, wake: threading.Event) -> None:
        super().__init__(daemon=True)
        self.engine, self.trace, self.prompts, self.clock, self.wake = engine, trace, prompts, clock, wake
        self.index_of: dict[int, int] = {}  # request id -> index in the trace
        self.submitted = [math.nan] * len(trace)
        self.error: BaseException | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        try:
            for i, at in enumerate(self.trace.arrivals):
                delay = float(at) - self.clock.now()
                if self.stopped.wait(delay) if delay > 0 else self.stopped.is_set():
                    return
                sampling = lq.SamplingParams(temperature=0, max_tokens=int(self.trace.outputs[i]), ignore_eos=True)
                self.submitted[i] = self.clock.now()
                adapter = serving(int(self.trace.adapters[i]))
                self.index_of[self.engine.submit_infer(self.prompts[i], adapter=adapter, sampling=sampling)] = i
                self.wake.set()
        except BaseException as error:
            self.error = error
            self.wake.set()


class EngineSide:
    def __init__(self, args: argparse.Namespace, with_target: bool) -> None:
        self.on_cpu, self.device, self.with_target = args.device == "cpu", args.device, with_target
        config = {**SHAPES[args.shape], "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        self.model = lq.BaseModel.random(config, seed=args.seed, dtype="f32" if self.on_cpu else "bf16")
        self.engine: lq.Engine | None = None
        self.made_for: tuple = ()

    def start(self, args: argparse.Namespace, trace: workload.Workload) -> None:
        """An engine with the options of a workload, the last one when they are its, and the adapters."""
        self.args, self.trace = args, trace
        self.prompts = Prompts(args.shape, trace.options.seed)
        o = trace.options
        longest = max((int(lengths.max()) for lengths in trace.examples), default=0)
        options = {"max_batch_tokens": args.batch_tokens or max(512 if self.on_cpu else 8192, longest)}
        if self.with_target:
            options["latency"] = lq.LatencyTarget(ttft_ms=args.ttft_ms, tpot_ms=args.tpot_ms)
        if self.on_cpu:
            options.update(kv_cache_tokens=args.kv_tokens or 65536, adapter_pool_bytes=1 << 30, num_threads=args.threads)
        elif args.kv_tokens:
            options.update(kv_cache_tokens=args.kv_tokens)
        made_for = (args.ttft_ms, args.tpot_ms, args.batch_tokens, args.kv_tokens, longest, o.rank)
        if made_for != self.made_for:
            self.close()
            self.engine = lq.Engine(self.model, device=args.device, prefix_caching=False, **options)
            self.made_for = made_for
        there = {a.name for a in self.engine.adapters()}
        for name in [f"serve{i}" for i in range(o.adapters)] + [f"train{i}" for i in range(o.trainers)]:
            if name not in there:
                lora = lq.LoraConfig(r=o.rank, lora_alpha=2 * o.rank, target_modules="all-linear", seed=o.seed)
                self.engine.add_adapter(name, lora)
        self.data = [TrainingData(trace, i, self.prompts) for i in range(o.trainers)]

    def warm_up(self, train: bool) -> None:
        if len(self.trace):
            self.run(warm_trace(self.trace), True, train, 60.0)
        if train:
            self.run(self.trace, False, True, self.args.warm_seconds)
        if len(self.trace):
            self.run(warm_trace(self.trace), True, train, 60.0)

    def run(self, trace: workload.Workload, serve: bool, train: bool, seconds: float) -> metrics.RunRecord:
        """`trace` is that of start(), or the one that warms up."""
        traced = self.with_target and self.args.trace_path and serve and train and trace is self.trace
        if traced:
            self.engine.start_trace(str(self.args.trace_path))
        try:
            return Run(self, trace, serve, train, seconds).run()
        finally:
            if traced:
                self.engine.stop_trace()

    def device_name(self) -> str:
        if self.on_cpu:
            return "cpu"
        names = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout.splitlines()
        return names[0] if names else self.device

    def cost_model(self) -> str:
        return self.engine.stats().cost_model

    def close(self) -> None:
        if self.engine:
            self.engine.close()
        self.engine, self.made_for = None, ()


class Run:
    """One setting: requests of the trace and training until the last request ended, or for so many seconds."""

    def __init__(self, side: EngineSide, trace: workload.Workload, serve: bool, train: bool, seconds: float) -> None:
        self.side, self.engine, self.trace = side, side.engine, trace
        self.serve, self.train, self.seconds = serve and len(trace) > 0, train, seconds
        self.records = new_records(trace) if self.serve else []
        self.prompts = [side.prompts.request(i, r.prompt) for i, r in enumerate(self.records)]
        self.tokens: list[tuple[float, int]] = []  # (time, request id)
        self.finished: list = []  # InferResult
        self.jobs: dict[int, tuple[int, int]] = {}  # job id -> (trainer, tokens)
        self.queued = [0] * len(side.data)  # mini-batches of each trainer
        self.trained: list[tuple[float, int]] = []
        self.updates = 0

    def top_up(self) -> None:
        optimizer = lq.AdamW(lr=LEARNING_RATE)
        for i, data in enumerate(self.side.data):
            while self.queued[i] < AHEAD * data.accumulation:
                examples, update = data.mini_batch()
                job = self.engine.submit_train(f"train{i}", examples, optimizer=optimizer if update else None)
                self.jobs[job] = (i, sum(len(e) for e in examples))
                self.queued[i] += 1

    def take(self, result: lq.StepResult, at: float) -> None:
        self.tokens.extend((at, token.request_id) for token in result.tokens)
        self.finished.extend(result.finished)
        for r in result.trained:
            trainer, tokens = self.jobs.pop(r.job_id)
            self.queued[trainer] -= 1
            if r.reason not in ("", "accumulated"):
                raise RuntimeError(f"training job of train{trainer} ended with: {r.reason}")
            self.trained.append((at, tokens))
            self.updates += r.applied

    def run(self) -> metrics.RunRecord:
        wake = threading.Event()
        before = self.engine.stats()
        clock = Clock()
        feeder = Feeder(self.engine, self.trace, self.prompts, clock, wake) if self.serve else None
        if feeder:
            feeder.start()
        steps, in_steps = 0, 0.0
        while clock.now() < self.seconds:
            if feeder and (feeder.error or len(self.finished) == len(self.records)):
                break
            if self.train:
                self.top_up()
            if self.engine.has_work():
                begin = time.perf_counter()
                result = self.engine.step()
                in_steps += time.perf_counter() - begin
                steps += 1
                self.take(result, clock.now())
            else:
                wake.wait(0.05)
            wake.clear()
        window = clock.now() if self.serve or not self.trained else self.trained[-1][0]
        self.drain(feeder)
        extra = {"steps": steps, "busy": in_steps / window}
        extra |= self.engine_figures(before)
        return metrics.RunRecord(self.records, window, self.trained, self.updates, extra)

    def drain(self, feeder: Feeder | None) -> None:
        """Ends what is left, so that the next setting begins with an empty engine, and fills in the records."""
        if feeder:
            feeder.stopped.set()
            feeder.join()
            if feeder.error:
                raise feeder.error
        ended = {r.request_id for r in self.finished}
        left = [*self.jobs, *(id for id in (feeder.index_of if feeder else ()) if id not in ended)]
        for id in left:
            self.engine.cancel(id)
        while self.engine.has_work():
            self.engine.step()
        if not feeder:
            return
        for at, id in self.tokens:
            self.records[feeder.index_of[id]].token(at)
        for r in self.finished:
            index = feeder.index_of[r.request_id]
            record = self.records[index]
            if r.finish_reason == "error":
                raise RuntimeError(f"request {index} ended with an error: {r.error}")
            if hasattr(r, "queue_seconds"):
                record.queued = r.queue_seconds + feeder.submitted[index] - record.arrived

    def engine_figures(self, before: lq.EngineStats) -> dict[str, float]:
        """What the engine says of itself, where it does."""
        after = self.engine.stats()
        figures = {"preemptions": float(after.preemptions - before.preemptions)}
        for name in after:
            if name.startswith("prediction_error"):
                figures[name] = float(after[name])
        return figures
