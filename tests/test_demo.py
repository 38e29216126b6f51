"""The demo: its split and its files are what they claim, and a short run of it really serves and trains."""

import itertools
import json
import string
from pathlib import Path

import pytest
from loquetier_core import demo
from loquetier_core.demo import tasks

ALL_TASKS = [*tasks.BASE_TASKS, *tasks.SERVED_TASKS, *(recipe.task for recipe in tasks.LIVE_RECIPES)]
FOLDER = Path(demo.__file__).resolve().parent


def test_answers():
    answers = {task.name: task.answer("kdvz") for task in ALL_TASKS}
    assert answers == {
        "copy": "kdvz",
        "reverse": "zvdk",
        "upper": "KDVZ",
        "next": "lewa",
        "rotate": "dvzk",
        "spell": "k-d-v-z",
        "shout": "KDVZ!",
        "caesar": "ngyc",
        "mirror": "ZVDK",
        "double": "kkddvvzz",
    }


def test_answers_fit_the_request():
    longest = max(len(task.answer("w" * tasks.MAX_LENGTH)) for task in ALL_TASKS)
    assert demo.GREEDY.max_tokens > longest  # one more for the end of sequence


def test_the_split_is_disjoint_and_repeatable():
    train, again, held_out = (
        list(itertools.islice(tasks.words(seed, held_out=side), 5_000)) for seed, side in [(7, False), (7, False), (7, True)]
    )
    assert train == again
    assert not set(train) & set(held_out)
    assert all(tasks.is_held_out(word) for word in held_out) and not any(map(tasks.is_held_out, train))
    for word in itertools.chain(train, held_out):
        assert tasks.MIN_LENGTH <= len(word) <= tasks.MAX_LENGTH and set(word) <= set(string.ascii_lowercase)
    assert len(set(tasks.distinct_words(7, 500, held_out=True))) == 500


def test_learning_rate_schedule():
    recipe = tasks.LIVE_RECIPES[0]
    rates = [tasks.learning_rate(step, recipe) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(recipe.lr / 10)
    assert max(rates) == rates[recipe.steps // 2] == recipe.lr
    assert recipe.lr / 10 < rates[-1] < recipe.lr / 8


def test_the_files_are_small_and_name_no_machine():
    card = json.loads((FOLDER / "model" / "demo_model_card.json").read_text())
    assert all(accuracy >= 0.9 for accuracy in card["base_accuracy"]["base"].values())
    assert all(card["base_accuracy"][kind][name] < 0.05 for kind in ("served", "live") for name in card["base_accuracy"][kind])
    assert all(accuracy >= 0.9 for accuracy in card["adapter_accuracy"].values())
    assert set(card["adapter_accuracy"]) == {path.name for path in (FOLDER / "adapters").iterdir()}

    files = [path for path in (*(FOLDER / "model").iterdir(), *(FOLDER / "adapters").rglob("*")) if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 << 20
    assert not any("/home/" in path.read_text() or "/tmp/" in path.read_text() for path in files if path.suffix == ".json")


def test_quick_run(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    path = tmp_path / "report.json"
    assert demo.main(["--quick", "--device", "cpu", "--seed", "1", "--json", str(path)]) == 0

    report = json.loads(path.read_text())
    rows = {row["adapter"]: row for row in report["rows"]}
    assert set(rows) == {None, "rotate", "spell", "shout", "caesar", "mirror", "double"}
    for task in tasks.SERVED_TASKS:
        row = rows[task.name]
        assert row["accuracy_before"] >= 0.9 and row["answers_changed"] == 0 and row["tokens_served"] > 0
    assert rows[None]["accuracy_before"] >= 0.9 and rows[None]["answers_changed"] == 0 and rows[None]["tokens_served"] > 0
    for recipe in tasks.LIVE_RECIPES:
        training = rows[recipe.task.name]["training"]
        assert training["loss_last"] < training["loss_first"] / 2
        assert training["skipped_updates"] == [] and training["training_tokens"] > 0
    assert rows["mirror"]["accuracy_before"] < 0.1 < 0.5 < rows["mirror"]["accuracy_after"]  # the quickest to learn
    assert report["requests_right"] >= 0.9 * report["requests_served"] > 0 and report["requests_failed"] == 0
    assert report["steps_that_trained_and_served"] > report["steps"] / 2
    assert all(report["checks"].values())
    assert "generated meanwhile" in capsys.readouterr().out


def test_says_what_to_install_without_tokenizers(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)  # import raises ModuleNotFoundError
    assert demo.main(["--quick"]) == 2
    assert "loquetier-core[hf]" in capsys.readouterr().err


def test_bad_options():
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
