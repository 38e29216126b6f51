"""Training beside transformers + PEFT: tokens a second on packed 512-token sequences with 1 and 4 adapters, and peak memory of
each.

    python benchmarks/train.py --out benchmarks/results/train.json

A step is 4 sequences of 512 tokens, forward, backward and AdamW: all of one adapter, or one of each of 4 adapters. PEFT trains
its adapters in turns on one shared base, its sequences as one padding-free batch; the engine cuts its own into micro-batches.
Neither side recomputes activations. Every case runs in its own process, so that its peak is its own. Read next: _common.py.
"""

from __future__ import annotations

import os

import _common as common

SEQUENCES, LENGTH = 4, 512
ROWS = 512  # of a micro-batch of the engine; 2048 at once: 3 % faster, 570 MiB more
CASES = (1, 4)  # adapters
LEARNING_RATE = 1e-4


def batches(case: int, vocab: int) -> list[list[list[int]]]:
    """Per adapter its sequences of one step."""
    ids = common.random_ids(SEQUENCES, LENGTH, vocab, 3)
    each = SEQUENCES // case
    return [ids[i * each : (i + 1) * each] for i in range(case)]


def worker_peft(args, case: int) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    imported = common.memory_mb("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, args.folder / "adapter0", adapter_name="adapter0", is_trainable=True)
    for i in range(1, case):
        tuned.load_adapter(args.folder / f"adapter{i}", adapter_name=f"adapter{i}", is_trainable=True)
    tuned.train()
    inputs = [torch.tensor(part) for part in batches(case, common.SHAPES[args.shape]["vocab_size"])]
    optimizers = [
        torch.optim.AdamW((p for n, p in tuned.named_parameters() if f".adapter{i}." in n), lr=LEARNING_RATE) for i in range(case)
    ]
    losses = []

    def step() -> None:
        for i, ids in enumerate(inputs):
            tuned.set_adapter(f"adapter{i}")
            loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            losses.append(loss.item())

    timings = common.Timings()
    timings.measure(args.repeats, [("step", step)])
    common.finish_worker(timings, imported_mb=imported, losses=losses)


def worker_loquetier(args, case: int) -> None:
    import loquetier_core as lq

    imported = common.memory_mb("VmRSS")
    engine = lq.Engine(
        args.folder / "model", device=args.device, num_threads=args.threads, kv_cache_tokens=1024,
        max_batch_tokens=ROWS,
    )  # fmt: skip
    for i in range(case):
        engine.add_adapter(f"adapter{i}", args.folder / f"adapter{i}")
    inputs = batches(case, common.SHAPES[args.shape]["vocab_size"])
    losses = []

    def step() -> None:
        trained = []
        for i, sequences in enumerate(inputs):
            examples = [lq.Example(input_ids=ids) for ids in sequences]
            engine.submit_train(f"adapter{i}", examples, optimizer=lq.AdamW(lr=LEARNING_RATE, weight_decay=0.01))
        while engine.has_work():
            trained += engine.step().trained
        if [result.applied for result in trained] != [True] * case:
            raise RuntimeError(f"train: expected {case} applied updates, got {trained}")
        losses.extend(result.loss for result in sorted(trained, key=lambda result: result.adapter))

    timings = common.Timings()
    timings.measure(args.repeats, [("step", step)])
    common.finish_worker(timings, imported_mb=imported, losses=losses)


def summarise(results):
    rows = []
    for case in CASES:
        label = f"{case} adapter{'s' if case > 1 else ''}"
        per_side = {side: result[str(case)] for side, result in results.items()}
        speed = {side: common.median_rate(result, "step", SEQUENCES * LENGTH) for side, result in per_side.items()}
        rows.append((f"training, {label}", "tok/s", speed, (">=", 1.3)))
        peak = {side: result["peak_mb"] for side, result in per_side.items()}
        rows.append((f"peak memory of the process, {label}", "MiB", peak, ("<=", 0.5)))
    for case in CASES:  # the same mathematics on both sides, or the figures compare nothing
        losses = [result[str(case)]["losses"] for result in results.values()]
        if len(losses) == 2 and max(abs(a - b) for a, b in zip(*losses, strict=True)) > 1e-3:
            raise SystemExit(f"losses differ, {case} adapters: {losses}")
    return rows


def worker(args) -> None:
    """Runs each case in a child, so that the peak of one does not hide the other's."""
    import json
    import subprocess
    import sys

    results = {}
    for case in CASES:
        done = subprocess.run(
            [sys.executable, *sys.argv], env={**os.environ, "TRAIN_CASE": str(case)}, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"case {case} exited with {done.returncode}")
        results[case] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    arguments = common.parse_args(__doc__)
    case_text = os.environ.get("TRAIN_CASE")
    if arguments.worker and case_text:
        {"peft": worker_peft, "loquetier": worker_loquetier}[arguments.worker](arguments, int(case_text))
    elif arguments.worker:
        worker(arguments)
    else:
        common.run_benchmark(
            __file__, arguments, summarise, dict(sequences=SEQUENCES, length=LENGTH, rows=ROWS, learning_rate=LEARNING_RATE)
        )
