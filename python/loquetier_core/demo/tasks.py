"""The string tasks of the demo: what the small base model was trained on, what its adapters add, and how the data is split.

Every example is one line, `task: word -> answer`, for instance `reverse: kdvma -> amvdk`. A word is 4 to 8 letters drawn uniformly.
Whether a word belongs to the training or to the held-out side is a hash of the word alone, so the two sides are disjoint by
construction: for every task, for every seed, for the base model as well as for its adapters.

Pure Python, shared by `tools/make_demo_model.py`, which trained the model, and by the demo.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LETTERS = string.ascii_lowercase
PRINTABLE = "".join(chr(c) for c in range(33, 127))  # every visible ASCII character
MIN_LENGTH, MAX_LENGTH = 4, 8  # characters of a word
HELD_OUT_SHARE = 8  # one word in this many is never trained on


@dataclass(frozen=True)
class Task:
    """A function from a word to its answer, with the name by which prompts ask for it."""

    name: str
    answer: Callable[[str], str]

    def prompt(self, word: str) -> str:
        """The text up to where the answer begins."""
        return f"{self.name}: {word} -> "


def _shift(word: str, by: int) -> str:
    """Caesar shift: every letter `by` places forward in the alphabet, z wraps to a."""
    return "".join(LETTERS[(LETTERS.index(c) + by) % 26] for c in word)


# What the base model learned from scratch.
BASE_TASKS = (
    Task("copy", lambda w: w),
    Task("reverse", lambda w: w[::-1]),
    Task("upper", lambda w: w.upper()),
    Task("next", lambda w: _shift(w, 1)),
)

# What the ready-made adapters in the folder `adapters` do, one each.
SERVED_TASKS = (
    Task("rotate", lambda w: w[1:] + w[0]),
    Task("spell", lambda w: "-".join(w)),
    Task("shout", lambda w: w.upper() + "!"),
)


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune an adapter for one task. Field names of the adapter are PEFT's."""

    task: Task
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    lr: float = 4e-3  # the highest, see `learning_rate`
    batch: int = 32  # examples of a mini-batch
    steps: int = 240  # optimizer steps


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

SERVED_RECIPES = (
    Recipe(SERVED_TASKS[0], r=8, lora_alpha=16, target_modules=ATTENTION),
    Recipe(SERVED_TASKS[1], r=4, lora_alpha=4, target_modules=ATTENTION + MLP, use_rslora=True),
    Recipe(SERVED_TASKS[2], r=16, lora_alpha=32, target_modules=MLP),
)

# What the demo teaches to fresh adapters, live, while it serves the others.
LIVE_RECIPES = (
    Recipe(Task("caesar", lambda w: _shift(w, 3)), r=16, lora_alpha=32, target_modules=ATTENTION + MLP),
    Recipe(Task("mirror", lambda w: w[::-1].upper()), r=8, lora_alpha=16, target_modules=ATTENTION + MLP),
    Recipe(Task("double", lambda w: "".join(c + c for c in w)), r=16, lora_alpha=32, target_modules=ATTENTION + MLP),
)


def is_held_out(word: str) -> bool:
    """True for the words that nothing is ever trained on: one in `HELD_OUT_SHARE`, by the CRC-32 of the word."""
    return zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0


def words(seed: int | str, *, held_out: bool, alphabet: str = LETTERS) -> Iterator[str]:
    """Endless random words of one side of the split. The same arguments give the same words."""
    rng = random.Random(f"{seed} {held_out} {alphabet}")
    while True:
        word = "".join(rng.choices(alphabet, k=rng.randint(MIN_LENGTH, MAX_LENGTH)))
        if is_held_out(word) == held_out:
            yield word


def distinct_words(seed: int | str, count: int, *, held_out: bool) -> list[str]:
    """The first `count` different words of `words(seed, ...)`."""
    found: dict[str, None] = {}
    for word in words(seed, held_out=held_out):
        found[word] = None
        if len(found) == count:
            return list(found)
    raise AssertionError("words() is endless")


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warm-up over the first 10 steps, level to the middle, then linear to a tenth. `step` counts from 0."""
    warm_up = min(1.0, (step + 1) / 10)
    past_middle = max(0.0, 2 * step / recipe.steps - 1)
    return recipe.lr * warm_up * (1 - 0.9 * past_middle)
