"""Training as seen from outside: losses, reductions, accumulation, how mini-batches are cut, dropout, recomputation, skipped
updates, evaluation. Families and 20-step runs are in test_parity.py; co-tenants in test_isolation.py.

Where a bound is not the parity tolerance, the comment beside it says why. Read next: helpers/oracle.py.
"""

from __future__ import annotations

import functools
import json
import math

import loquetier_core as lq
import numpy as np
import pytest
import torch
from helpers import drive
from helpers.oracle import make_examples
from safetensors.torch import load_file, save_file

pytest_plugins = ["helpers.fixtures"]

TOLERANCE = 1e-4
ROUNDING = 2e-5  # the same sums in another order, f32
SEED = 31


def gradients(bench, name, batches, engine_options=None, **options):
    """Losses and gradients of an engine of its own after these mini-batches."""
    engine = bench.engine([name], **(engine_options or {}))
    jobs = [engine.submit_train(name, drive.to_examples(examples), **options) for examples in batches]
    done = drive.run(engine)
    return [done.trained[job].loss for job in jobs], engine.adapter_state(name, "gradients")


# ---------------------------------------------------------------- losses and reductions

LOSSES = [
    ("cross_entropy", {}),
    ("weighted_logprob", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low": 0.05, "clip_high": 0.6}),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("loss", "clip"), LOSSES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_losses(bench, loss, clip, reduction):
    print("seed", SEED)
    examples = make_examples(6, bench.vocab_size, SEED, weights=True, policy=True)
    if loss == "weighted_logprob":  # weights of any sign
        for example in examples[::2]:
            example["weights"] = torch.randn(len(example["input_ids"]), generator=torch.Generator().manual_seed(SEED)).tolist()
    if loss in ("ppo", "importance_sampling"):  # ratios around 1, so that some are clipped and some are not
        for example in examples:
            with torch.no_grad():
                p = bench.oracle.logprobs("wide", {"input_ids": example["input_ids"]})
            noise = 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(SEED))
            example["logprobs"] = torch.nan_to_num(p + noise, nan=-1.0).tolist()
    options = dict(loss=loss, reduction=reduction, **clip)
    (got,), state = gradients(bench, "wide", [examples], **options)
    want = bench.oracle.loss("wide", examples, **options).item()
    assert abs(got - want) <= TOLERANCE * max(abs(want), 1e-2), f"loss {got}, expected {want}"
    drive.assert_states_close(state, bench.oracle.gradients("wide", [examples], **options), TOLERANCE, "gradient of")


def test_ppo_clips_something(bench):
    """The case above exercises both branches: the clipped loss differs from the unclipped one."""
    examples = make_examples(3, bench.vocab_size, SEED, policy=True)
    (ppo,), _ = gradients(bench, "wide", [examples], loss="ppo")
    (plain,), _ = gradients(bench, "wide", [examples], loss="importance_sampling")
    assert abs(ppo - plain) > 1e-3


def test_mean_is_over_unmasked_targets(bench):
    """An example with two targets beside one with twenty: every target counts the same."""
    ids = make_examples(2, bench.vocab_size, SEED, masks=False, longest=25)
    ids[0]["labels"] = [-100] * (len(ids[0]["input_ids"]) - 1) + ids[0]["input_ids"][-1:]
    (mean,), _ = gradients(bench, "attn", [ids])
    (total,), _ = gradients(bench, "attn", [ids], reduction="sum")
    targets = 1 + len(ids[1]["input_ids"]) - 1
    assert mean == pytest.approx(total / targets, rel=ROUNDING)


# ---------------------------------------------------------------- accumulation, micro-batches


def test_one_call_of_n_equals_n_calls_of_one(bench):
    examples = make_examples(7, bench.vocab_size, SEED, weights=True)
    (total,), together = gradients(bench, "wide", [examples], reduction="sum")
    losses, apart = gradients(bench, "wide", [[example] for example in examples], reduction="sum")
    assert sum(losses) == pytest.approx(total, rel=ROUNDING)
    drive.assert_states_close(apart, together, ROUNDING, "gradient of")


@pytest.mark.parametrize("name", ["wide", "vocab", "head_only", "upper"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cutting_into_micro_batches_changes_nothing(bench, name, reduction):
    """max_batch_tokens from one example a step to all in one."""
    examples = make_examples(9, bench.vocab_size, SEED, weights=True)
    (want_loss,), want = gradients(bench, name, [examples], reduction=reduction)
    for rows in (30, 47, 100):
        engine = bench.engine([name], max_batch_tokens=rows)
        job = engine.submit_train(name, drive.to_examples(examples), reduction=reduction)
        done = drive.run(engine)
        assert done.steps > 1, "not cut"
        assert done.trained[job].loss == pytest.approx(want_loss, rel=ROUNDING)
        drive.assert_states_close(engine.adapter_state(name, "gradients"), want, ROUNDING, f"{rows} rows a step: gradient of")


def test_order_of_jobs_with_updates(bench):
    """train, eval, train+optimizer, eval, queued at once: each evaluation sees exactly the updates before it."""
    batches = [make_examples(2, bench.vocab_size, SEED + i) for i in range(3)]
    engine = bench.engine(["attn"])
    adamw = dict(lr=5e-3)
    jobs = [
        engine.submit_eval("attn", drive.to_examples(batches[2])),
        engine.submit_train("attn", drive.to_examples(batches[0])),
        engine.submit_train("attn", drive.to_examples(batches[1]), optimizer=lq.AdamW(**adamw)),
        engine.submit_eval("attn", drive.to_examples(batches[2])),
    ]
    done = drive.run(engine)
    oracle = bench.oracle.copy()
    with torch.no_grad():
        before = oracle.loss("attn", batches[2]).item()
    oracle.train_step("attn", oracle.optimizer("attn", adamw), batches[:2])
    with torch.no_grad():
        after = oracle.loss("attn", batches[2]).item()
    assert abs(before - after) > 10 * TOLERANCE, "the update does nothing"
    first, last = done.evaluated[jobs[0]], done.evaluated[jobs[3]]
    assert (first.version, last.version) == (0, 1)
    assert first.loss == pytest.approx(before, rel=TOLERANCE) and last.loss == pytest.approx(after, rel=TOLERANCE)


# ---------------------------------------------------------------- dropout


def with_dropout(bench, tmp_path, name, p, change=None):
    """A copy of a PEFT folder with lora_dropout = p; change(key, tensor) -> tensor."""
    folder = tmp_path / f"dropout-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    source = bench.adapter_folders[name]
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": p}))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({k: change(k, t) if change else t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def dropout_run(bench, folder, examples, steps=1, **options):
    engine = bench.engine(**options)
    engine.add_adapter("dropped", folder)
    losses = [drive.train(engine, "dropped", examples, reduction="sum").loss for _ in range(steps)]
    return losses, engine.adapter_state("dropped", "gradients")


def moved(direction, distance, key, tensor):
    return tensor + distance * torch.from_numpy(direction[key])


@pytest.mark.parametrize("name", ["wide", "vocab"])
def test_dropout_finite_differences(bench, tmp_path, name):
    """A new engine draws the same masks (of seed and examples seen), so the loss is a function of the weights."""
    examples = make_examples(4, bench.vocab_size, SEED, weights=True)
    _, gradient = dropout_run(bench, with_dropout(bench, tmp_path, name, 0.3), examples)
    rng = np.random.default_rng(SEED)
    for trial in range(3):
        if trial == 0:
            direction = {k: np.array(g) for k, g in gradient.items()}
        else:  # the gradient, with the signs lost in half of the tensors: a derivative well above rounding
            direction = {k: np.array(g) if rng.random() < 0.5 else np.abs(g) for k, g in gradient.items()}
        norm = math.sqrt(sum(float((d**2).sum()) for d in direction.values()))
        want = sum(float((g * direction[k]).sum()) for k, g in gradient.items()) / norm
        step = 4e-3  # truncation and rounding of the two losses are both below 1 % of the derivative here
        losses = []
        for distance in (step / norm, -step / norm):
            change = functools.partial(moved, direction, distance)
            losses.append(dropout_run(bench, with_dropout(bench, tmp_path, name, 0.3, change), examples)[0][0])
        got = (losses[0] - losses[1]) / (2 * step)
        assert got == pytest.approx(want, rel=1e-2), f"trial {trial}"


def test_dropout_mask_rate_and_scale(bench, tmp_path):
    """With lm_head alone, dA of one target is ds times the masked input: its zeros are the mask itself."""
    p, kept, total = 0.25, 0, 0
    engine = bench.engine()
    engine.add_adapter("dropped", with_dropout(bench, tmp_path, "head_only", p))
    engine.add_adapter("whole", bench.adapter_folders["head_only"])
    key = "base_model.model.lm_head.lora_A.weight"
    for trial in range(60):
        ids = make_examples(1, bench.vocab_size, SEED + trial, masks=False)[0]["input_ids"]
        labels = [-100] * (len(ids) - 1) + ids[-1:]
        rows = {}
        for name in ("dropped", "whole"):
            drive.train(engine, name, [{"input_ids": ids, "labels": labels}])
            rows[name] = engine.adapter_state(name, "gradients")[key]  # [2, H]
            update = drive.train(engine, name, [{"input_ids": ids}], optimizer=lq.AdamW(lr=0.0))  # empties the gradient only
            assert update.applied
        mask = rows["dropped"] != 0
        assert np.array_equal(mask[0], mask[1]), "the mask is on the input of A: the same for every row of A"
        kept += mask[0].sum()
        total += mask[0].size
        ratio = rows["dropped"][0][mask[0]] / rows["whole"][0][mask[0]]  # ds and 1 / (1 - p): one number for all columns
        assert np.ptp(ratio) <= 1e-3 * np.abs(ratio).max(), "kept entries are not all scaled alike"
    deviation = math.sqrt(p * (1 - p) * total)
    assert abs(kept - (1 - p) * total) < 4.5 * deviation, f"kept {kept} of {total}"


def test_dropout_is_reproducible_and_moves_on(bench, tmp_path):
    folder = with_dropout(bench, tmp_path, "wide", 0.4)
    examples = make_examples(3, bench.vocab_size, SEED)
    losses, gradient = dropout_run(bench, folder, examples, steps=3)
    again, gradient_again = dropout_run(bench, folder, examples, steps=3)
    assert losses == again and len(set(losses)) == 3, "the same seeds give the same masks, and each step new ones"
    drive.assert_states_equal(gradient, gradient_again, "gradient of")
    cut, gradient_cut = dropout_run(bench, folder, examples, steps=3, max_batch_tokens=32)
    assert cut == pytest.approx(losses, rel=ROUNDING), "the mask does not depend on how the mini-batch was cut"
    drive.assert_states_close(gradient_cut, gradient, ROUNDING, "gradient of")


def test_dropout_touches_training_only(bench, tmp_path):
    engine = bench.engine()
    engine.add_adapter("dropped", with_dropout(bench, tmp_path, "wide", 0.5))
    examples = make_examples(3, bench.vocab_size, SEED)
    with torch.no_grad():
        want = bench.oracle.loss("wide", examples).item()
    assert drive.evaluate(engine, "dropped", examples).loss == pytest.approx(want, rel=TOLERANCE)
    assert drive.generate(engine, [("dropped", [5, 6, 7])], drive.greedy(16)) == [bench.oracle.greedy("wide", [5, 6, 7], 16)]
    assert abs(drive.train(engine, "dropped", examples).loss - want) > 1e-3


# ---------------------------------------------------------------- options of the engine


@pytest.mark.parametrize("family", ["llama31", "qwen3", "qwen2"])
def test_recompute_equals_none(benches, tmp_path, family):
    """Dropout included: its mask is drawn again, not stored."""
    bench = benches(family)
    folder = with_dropout(bench, tmp_path, "wide", 0.2)
    examples = make_examples(5, bench.vocab_size, SEED, weights=True)
    results = {}
    for recompute in ("none", "layer"):
        engine = bench.engine(["attn", "vocab"], recompute=recompute)
        engine.add_adapter("dropped", folder)
        names = ("attn", "vocab", "dropped")
        jobs = [engine.submit_train(name, drive.to_examples(examples)) for name in names]
        done = drive.run(engine)
        results[recompute] = [done.trained[job].loss for job in jobs], [engine.adapter_state(name, "gradients") for name in names]
    assert results["layer"][0] == pytest.approx(results["none"][0], rel=ROUNDING)
    for got, want in zip(results["layer"][1], results["none"][1], strict=True):
        drive.assert_states_close(got, want, ROUNDING, "gradient of")


@pytest.mark.parametrize("clip", [None, 1e3, 0.1])
def test_clipping_reports_the_norm_before_it(bench, clip):
    examples = make_examples(3, bench.vocab_size, SEED)
    engine = bench.engine(["attn"])
    result = drive.train(engine, "attn", examples, optimizer=lq.AdamW(lr=1e-3, max_grad_norm=clip))
    want = math.sqrt(sum(float((g**2).sum()) for g in bench.oracle.gradients("attn", [examples]).values()))
    assert result.applied and result.grad_norm == pytest.approx(want, rel=TOLERANCE)
    # m = (1 - beta1) * the clipped gradient
    m = engine.adapter_state("attn", "exp_avg")
    norm = math.sqrt(sum(float((np.asarray(v, np.float64) ** 2).sum()) for v in m.values()))
    assert norm == pytest.approx(0.1 * min(want, clip or math.inf), rel=TOLERANCE)
    assert all(not g.any() for g in engine.adapter_state("attn", "gradients").values())


# ---------------------------------------------------------------- updates that are skipped

POISON = {  # fields of the example, options of the call, the reason reported
    "infinite weight": (dict(weights=math.inf), {}, "non-finite loss"),
    "overflowing ratio": (dict(logprobs=-500.0, advantages=1.0), dict(loss="importance_sampling"), "non-finite loss"),
    "overflowing gradient": (dict(weights=2e37), dict(reduction="sum"), "non-finite gradient"),
}


@pytest.mark.parametrize("case", POISON)
def test_non_finite_update_is_skipped(bench, case):
    """Reported; weights, moments, version as they were; the next update as if it had not been."""
    fields, options, reason = POISON[case]
    good = [make_examples(2, bench.vocab_size, SEED + i) for i in range(2)]
    ids = good[0][0]["input_ids"]
    bad = [{"input_ids": ids, **{k: [v] * len(ids) for k, v in fields.items()}}]
    engine, clean = bench.engine(["attn", "wide"]), bench.engine(["attn"])
    adamw = lq.AdamW(lr=3e-3)
    for e in (engine, clean):
        assert drive.train(e, "attn", good[0], optimizer=adamw).applied
    kinds = ("weights", "master", "exp_avg", "exp_avg_sq")
    before = {kind: engine.adapter_state("attn", kind) for kind in kinds}
    neighbour = engine.submit_train("wide", drive.to_examples(good[0]), optimizer=adamw)
    job = engine.submit_train("attn", drive.to_examples(bad), optimizer=adamw, **options)
    done = drive.run(engine)
    result = done.trained[job]
    assert not result.applied and result.reason == reason and result.version == 1, result
    assert not math.isfinite(result.grad_norm) and math.isfinite(result.loss) == (reason == "non-finite gradient")
    assert done.trained[neighbour].applied, "another adapter in the same step is not touched"
    for kind in kinds:
        drive.assert_states_equal(engine.adapter_state("attn", kind), before[kind], f"{kind} of")
    assert all(not g.any() for g in engine.adapter_state("attn", "gradients").values())
    assert engine.stats().skipped_updates == 1 and engine.adapter("attn").version == 1
    results = [drive.train(e, "attn", good[1], optimizer=adamw) for e in (engine, clean)]
    assert [r.applied for r in results] == [True, True] and results[0].loss == results[1].loss
    drive.assert_states_equal(engine.adapter_state("attn", "master"), clean.adapter_state("attn", "master"), "master of")


def test_cancelled_job_leaves_nothing(bench):
    """A job cancelled after its first micro-batch: its gradients are dropped, the weights stay."""
    examples = make_examples(12, bench.vocab_size, SEED, masks=False)
    engine = bench.engine(["attn"], max_batch_tokens=32)
    before = engine.adapter_state("attn", "weights")
    job = engine.submit_train("attn", drive.to_examples(examples), optimizer=lq.AdamW(lr=1e-2))
    collected = drive.Collected()
    collected.add(engine.step())
    assert engine.cancel(job)
    drive.run(engine, collected)
    result = collected.trained[job]
    assert not result.applied and result.reason == "cancelled"
    assert not engine.cancel(job)
    drive.assert_states_equal(engine.adapter_state("attn", "weights"), before, "weight")
    assert all(not g.any() for g in engine.adapter_state("attn", "gradients").values())


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("rows", [24, 1024])
def test_evaluation(bench, rows):
    """Loss and per-token log-probabilities, for adapters and the base, however it is cut; no training state appears."""
    examples = make_examples(6, bench.vocab_size, SEED, longest=24)
    engine = bench.engine(["wide", "vocab"], max_batch_tokens=rows)
    jobs = {name: engine.submit_eval(name, drive.to_examples(examples)) for name in (None, "wide", "vocab")}
    done = drive.run(engine)
    for name, job in jobs.items():
        result = done.evaluated[job]
        with torch.no_grad():
            assert result.loss == pytest.approx(bench.oracle.loss(name, examples).item(), rel=TOLERANCE)
        for got, example in zip(result.logprobs, examples, strict=True):
            drive.assert_close(got, bench.oracle.logprobs(name, example), TOLERANCE, f"{name} log-probabilities")
    assert not engine.adapter("wide").training and engine.stats().training_state_bytes == 0


def test_training_a_fresh_adapter_lowers_its_loss(bench):
    engine = bench.engine()
    engine.add_adapter("fresh", lq.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", seed=3))
    examples = make_examples(4, bench.vocab_size, SEED, masks=False)
    losses = [drive.train(engine, "fresh", examples, optimizer=lq.AdamW(lr=1e-2)).loss for _ in range(30)]
    with torch.no_grad():
        assert losses[0] == pytest.approx(bench.oracle.loss(None, examples).item(), rel=TOLERANCE), "B is zero at first"
    assert losses[-1] < 0.2 * losses[0]
