"""The demo: one engine answers requests for ready-made adapters while it fine-tunes fresh ones, in the same steps.

    python -m loquetier_core demo

A small Llama-family model and three PEFT adapters come with the package (`model/`, `adapters/`; made by tools/make_demo_model.py).
The demo serves them, teaches three new tasks to three fresh adapters meanwhile (`tasks.py` has the tasks and the recipes), and then
checks what it claims: the new adapters answer held-out words, and the served ones answer exactly as before. Read `run` first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import loquetier_core as lq

from . import tasks

HERE = Path(__file__).resolve().parent
QUEUED_JOBS = 2  # mini-batches kept waiting per adapter in training, so that no step lacks one
IN_FLIGHT = 12  # inference requests kept in flight
GREEDY = lq.SamplingParams(temperature=0, max_tokens=2 * tasks.MAX_LENGTH + 4)
REQUIRED_ACCURACY = 0.95


def run(engine: lq.Engine, text: Text, recipes: list[tasks.Recipe], *, seed: int, held_out: int) -> dict:
    """Serves and trains on `engine`; returns the measured figures. `held_out`: words per accuracy."""
    # Who answers: the base model (None) and the ready-made adapters, each with the tasks it knows.
    served: dict[str | None, list[tasks.Task]] = {None: list(tasks.BASE_TASKS)}
    for task in tasks.SERVED_TASKS:
        engine.add_adapter(task.name, HERE / "adapters" / task.name)
        served[task.name] = [task]
    # Who learns: fresh adapters, named after their task. A LoRA starts as no change at all, so these begin as the base model.
    for recipe in recipes:
        config = lq.LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            target_modules=list(recipe.target_modules),
            use_rslora=recipe.use_rslora,
            seed=seed,
        )
        engine.add_adapter(recipe.task.name, config)

    exams = {adapter: make_exam(f"exam {seed}", known, held_out) for adapter, known in served.items()}
    exams |= {recipe.task.name: make_exam(f"exam {seed}", [recipe.task], held_out) for recipe in recipes}
    print(f"before: {held_out} held-out words for the base model and each adapter", flush=True)
    before = {adapter: greedy_answers(engine, text, adapter, exam) for adapter, exam in exams.items()}

    names = ", ".join(recipe.task.name for recipe in recipes)
    print(f"now: training {names} while the base model, {', '.join(filter(None, served))} answer requests", flush=True)
    trainings = {recipe.task.name: Training(text, recipe, seed) for recipe in recipes}
    traffic = Traffic(text, served, seed)
    progress = Progress(trainings, traffic)
    steps = shared_steps = 0
    while not all(training.finished for training in trainings.values()):
        for training in trainings.values():
            training.submit(engine)
        traffic.submit(engine)
        rows_before = engine.stats().train_tokens
        result = engine.step()  # training, prefill and decode rows together
        for job in result.trained:
            trainings[job.adapter].record(job)
        traffic.record(result)
        steps += 1
        shared_steps += bool(result.tokens) and engine.stats().train_tokens > rows_before
        progress.show()
    progress.show(last=True)
    while engine.has_work():  # the requests still in flight
        engine.step()

    print("after: the same words again", flush=True)
    after = {adapter: greedy_answers(engine, text, adapter, exam) for adapter, exam in exams.items()}

    return {
        "rows": [
            {
                "adapter": adapter,
                "example": example(*exam[0]),
                "accuracy_before": accuracy(text, exam, before[adapter]),
                "accuracy_after": accuracy(text, exam, after[adapter]),
                "answers": len(exam),
                "answers_changed": sum(x != y for x, y in zip(before[adapter], after[adapter], strict=True)),
                "tokens_served": traffic.tokens[adapter],
                "training": trainings[adapter].summary() if adapter in trainings else None,
            }
            for adapter, exam in exams.items()
        ],
        "steps": steps,
        "steps_that_trained_and_served": shared_steps,
        "seconds_of_training": progress.seconds,
        "requests_served": traffic.finished,
        "requests_right": traffic.right,
        "requests_failed": traffic.failed,
    }


# ---------------------------------------------------------------- asking and grading


class Text:
    """The model's tokenizer: prompts and answers to token ids, answers back to text."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer  # the extra [hf]; main says so when it is missing

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._eos = self._tokenizer.token_to_id("</s>")

    def prompt(self, task: tasks.Task, word: str) -> list[int]:
        return self._tokenizer.encode(task.prompt(word)).ids

    def answer(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def example(self, task: tasks.Task, word: str) -> lq.Example:
        """Prompt and answer; the loss is on the answer and on the end of sequence."""
        prompt = self.prompt(task, word)
        answer = [*self._tokenizer.encode(task.answer(word), add_special_tokens=False).ids, self._eos]
        return lq.Example(prompt + answer, labels=[-100] * len(prompt) + answer)


Exam = list[tuple[tasks.Task, str]]


def make_exam(seed: str, known: list[tasks.Task], count: int) -> Exam:
    """`count` different held-out words, over the tasks in turn."""
    return list(zip(itertools.cycle(known), tasks.distinct_words(seed, count, held_out=True)))


def greedy_answers(engine: lq.Engine, text: Text, adapter: str | None, exam: Exam) -> list[list[int]]:
    """The answers (token ids) of an adapter (None: the base model) to an exam, all requests in flight together."""
    ids = [engine.submit_infer(text.prompt(task, word), adapter=adapter, sampling=GREEDY) for task, word in exam]
    answers = {}
    while engine.has_work():
        for request in engine.step().finished:
            if request.finish_reason == "error":
                raise RuntimeError(f"request {request.request_id} of adapter {adapter}: {request.error}")
            answers[request.request_id] = list(request.token_ids)
    return [answers[i] for i in ids]


def example(task: tasks.Task, word: str) -> str:
    """Prompt and right answer, for people to read."""
    return task.prompt(word) + task.answer(word)


def accuracy(text: Text, exam: Exam, answers: list[list[int]]) -> float:
    """Share of exact matches."""
    pairs = zip(exam, answers, strict=True)
    return sum(text.answer(answer) == task.answer(word) for (task, word), answer in pairs) / len(exam)


# ---------------------------------------------------------------- the two kinds of work


class Training:
    """Fine-tuning of one adapter: keeps mini-batches queued until its recipe's steps are done."""

    def __init__(self, text: Text, recipe: tasks.Recipe, seed: int):
        self.recipe = recipe
        self.losses: list[float] = []  # one per optimizer step
        self.tokens = 0  # rows trained on
        self.skipped: list[str] = []  # why the engine refused an update, one reason each
        self._text = text
        self._words = tasks.words(f"{recipe.task.name} {seed}", held_out=False)
        self._pending: dict[int, int] = {}  # job id -> its tokens
        self._submitted = 0

    @property
    def finished(self) -> bool:
        return len(self.losses) == self.recipe.steps

    def submit(self, engine: lq.Engine) -> None:
        while len(self._pending) < QUEUED_JOBS and self._submitted < self.recipe.steps:
            task = self.recipe.task
            examples = [self._text.example(task, next(self._words)) for _ in range(self.recipe.batch)]
            optimizer = lq.AdamW(lr=tasks.learning_rate(self._submitted, self.recipe), max_grad_norm=1.0)
            job = engine.submit_train(task.name, examples, optimizer=optimizer)
            self._pending[job] = sum(len(example) for example in examples)
            self._submitted += 1

    def record(self, job: lq.TrainResult) -> None:
        self.tokens += self._pending.pop(job.job_id)
        self.losses.append(job.loss)
        if not job.applied:
            self.skipped.append(job.reason)

    def summary(self) -> dict:
        edge = max(1, len(self.losses) // 10)  # the mean over a tenth of the steps
        return {
            "optimizer_steps": len(self.losses),
            "training_tokens": self.tokens,
            "loss_first": mean(self.losses[:edge]),
            "loss_last": mean(self.losses[-edge:]),
            "skipped_updates": self.skipped,
            "recipe": dataclasses.asdict(self.recipe) | {"task": self.recipe.task.name},
        }


class Traffic:
    """Users of what is served: keeps greedy requests on held-out words in flight, over the adapters and their tasks in turn."""

    def __init__(self, text: Text, served: dict[str | None, list[tasks.Task]], seed: int):
        self.tokens: Counter[str | None] = Counter()  # generated, by adapter
        self.finished = self.right = self.failed = 0  # requests
        self._text = text
        turns = itertools.cycle((adapter, itertools.cycle(known)) for adapter, known in served.items())
        self._next = ((adapter, next(known)) for adapter, known in turns)
        self._words = tasks.words(f"traffic {seed}", held_out=True)
        self._expected: dict[int, str] = {}  # request id -> right answer

    @property
    def in_flight(self) -> int:
        return len(self._expected)

    def submit(self, engine: lq.Engine) -> None:
        while self.in_flight < IN_FLIGHT:
            (adapter, task), word = next(self._next), next(self._words)
            request = engine.submit_infer(self._text.prompt(task, word), adapter=adapter, sampling=GREEDY)
            self._expected[request] = task.answer(word)

    def record(self, result: lq.StepResult) -> None:
        self.tokens.update(token.adapter for token in result.tokens)
        for request in result.finished:
            expected = self._expected.pop(request.request_id)
            self.finished += 1
            self.right += self._text.answer(request.token_ids) == expected
            self.failed += request.finish_reason == "error"


# ---------------------------------------------------------------- what the user sees


class Progress:
    """One line: rewritten in place on a terminal, else a new one every second.

    Tokens served, tokens trained on, and the loss of each adapter in training (mean over its last 5 steps).
    """

    def __init__(self, trainings: dict[str, Training], traffic: Traffic):
        self.seconds = 0.0  # since the beginning
        self._trainings, self._traffic = trainings, traffic
        self._in_place = sys.stdout.isatty()
        self._started, self._due = time.monotonic(), 0.0

    def show(self, *, last: bool = False) -> None:
        self.seconds = time.monotonic() - self._started
        if self.seconds < self._due and not last:
            return
        self._due = self.seconds + (0.2 if self._in_place else 1.0)
        trainings = self._trainings.values()
        done = sum(len(t.losses) for t in trainings) / sum(t.recipe.steps for t in trainings)
        losses = [f"{t.recipe.task.name} {mean(t.losses[-5:]):.2f}" for t in trainings if t.losses]
        served, trained = sum(self._traffic.tokens.values()), sum(t.tokens for t in trainings)
        line = f"{self.seconds:2.0f} s {done:4.0%} served {served:,} trained {trained:,} loss {' '.join(losses) or '-'}"
        if self._in_place:
            columns = shutil.get_terminal_size().columns - 1
            print("\r" + line[:columns].ljust(columns), end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


def print_table(report: dict) -> None:
    header = ["adapter", "task", "before", "after", "trained", "served", "changed"]
    lines = []
    for row in report["rows"]:
        training = row["training"]
        lines.append(
            [
                row["adapter"] or "(base model)",
                row["example"],
                f"{row['accuracy_before']:.1%}",
                f"{row['accuracy_after']:.1%}",
                f"{training['training_tokens']:,}" if training else "-",
                "-" if training else f"{row['tokens_served']:,}",
                "it learned" if training else f"{row['answers_changed']} of {row['answers']}",
            ]
        )
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    print()
    for line in [header, ["-" * width for width in widths], *lines]:
        cells = (cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())
    print(
        f"\nbefore, after: exact match of greedy answers on {report['held_out']} held-out words, which nothing was trained on"
        "\ntrained, served: tokens trained on, and tokens generated meanwhile; changed: answers that differ afterwards\n"
    )


def checks(report: dict, *, quick: bool) -> list[tuple[str, bool]]:
    """What the demo claims, and whether it is so."""
    trained = [row for row in report["rows"] if row["training"]]
    served = [row for row in report["rows"] if not row["training"]]
    steps, shared = report["steps"], report["steps_that_trained_and_served"]
    results = [
        ("the served adapters and the base model answer as before training", not any(row["answers_changed"] for row in served)),
        ("every loss fell below half", all(r["training"]["loss_last"] < r["training"]["loss_first"] / 2 for r in trained)),
        ("no update was skipped", not any(row["training"]["skipped_updates"] for row in trained)),
        (f"training and serving shared steps ({shared:,} of {steps:,})", shared > 0),
        (
            f"requests were answered meanwhile ({report['requests_right']:,} of {report['requests_served']:,} right, "
            f"{report['requests_failed']} failed)",
            report["requests_served"] > 0 and not report["requests_failed"],
        ),
    ]
    if not quick:
        enough = all(row["accuracy_after"] >= REQUIRED_ACCURACY for row in trained)
        results.append((f"every trained adapter is right on at least {REQUIRED_ACCURACY:.0%} of the held-out words", enough))
        results.append(("none could do its task before (under 5%)", all(row["accuracy_before"] < 0.05 for row in trained)))
    return results


def main(argv: list[str] | None = None) -> int:
    """Runs the demo. Returns 0 when every check holds, 1 when one fails, 2 when the demo cannot run."""
    parser = argparse.ArgumentParser(prog="python -m loquetier_core demo", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help='"cpu", "cuda", "cuda:1" (default: cuda where usable, else cpu)')
    parser.add_argument("--seed", type=int, default=0, help="of the fresh adapters and of all words")
    parser.add_argument("--steps", type=int, help="optimizer steps per adapter (default: the recipe's)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the measured figures there too")
    parser.add_argument("--quick", action="store_true", help="a short run that shows the losses fall; accuracies are not required")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error("--steps: expected at least 1")
    try:
        text = Text(HERE / "model")
    except ModuleNotFoundError as error:
        print(f"the demo needs the package {error.name}: pip install 'loquetier-core[hf]'", file=sys.stderr)
        return 2

    steps = args.steps or (40 if args.quick else None)
    recipes = [dataclasses.replace(r, steps=steps) if steps else r for r in tasks.LIVE_RECIPES]
    started = time.monotonic()
    # 1024 rows a step at most, so that training never keeps the requests waiting for long; ample memory for a small model.
    with lq.Engine(
        HERE / "model",
        device=args.device,
        seed=args.seed,
        max_batch_tokens=1024,
        kv_cache_tokens=16384,
        adapter_pool_bytes=64 << 20,
    ) as engine:
        model = engine.base_model
        print(
            f"base model: {model.family}, {model.num_layers} layers, {model.num_parameters:,} parameters, on {engine.device}",
            flush=True,
        )
        held_out = 40 if args.quick else 200
        report = run(engine, text, recipes, seed=args.seed, held_out=held_out)
        report |= {"device": engine.device, "seed": args.seed, "quick": args.quick, "held_out": held_out}
    report["seconds"] = time.monotonic() - started

    print_table(report)
    results = checks(report, quick=args.quick)
    for claim, holds in results:
        print(f"{'ok    ' if holds else 'FAILED'}  {claim}")
    print(f"{report['seconds']:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(report | {"checks": dict(results)}, indent=2) + "\n")
    return 0 if all(holds for _, holds in results) else 1
