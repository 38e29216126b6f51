"""Bad input, each case: the error's class, that its message names what and where, and that the engine works on exactly as before.

Files of models and adapters are in test_bad_files.py. Read next: helpers/refusals.py, test_threads.py (re-entered step, use after
close).
"""

from __future__ import annotations

import json

import loquetier_core as lq
import numpy as np
import pytest
from helpers import drive
from helpers.oracle import make_examples
from helpers.refusals import PROMPT, assert_refused

pytest_plugins = ["helpers.fixtures", "helpers.refusals"]

# ---------------------------------------------------------------- requests

REQUESTS = {
    "token id too large": ([5, 131], {}, {}, ["prompt_ids[1]", 131, 130]),
    "token id negative": ([-1], {}, {}, ["prompt_ids[0]", -1]),
    "empty prompt": ([], {}, {}, ["prompt_ids", "at least one"]),
    "prompt beyond the context": ([5] * 512, {}, {}, ["prompt_ids", 512]),
    "negative temperature": (PROMPT, dict(temperature=-0.5), {}, ["temperature", -0.5]),
    "temperature NaN": (PROMPT, dict(temperature=float("nan")), {}, ["temperature", "nan"]),
    "top_p 0": (PROMPT, dict(top_p=0.0), {}, ["top_p", "(0, 1]"]),
    "top_p above 1": (PROMPT, dict(top_p=1.5), {}, ["top_p", 1.5]),
    "top_k below -1": (PROMPT, dict(top_k=-2), {}, ["top_k", -2]),
    "min_p above 1": (PROMPT, dict(min_p=1.01), {}, ["min_p", 1.01]),
    "max_tokens 0": (PROMPT, dict(max_tokens=0), {}, ["max_tokens", 0]),
    "min_tokens above max_tokens": (PROMPT, dict(max_tokens=3, min_tokens=4), {}, ["min_tokens", 4]),
    "presence_penalty": (PROMPT, dict(presence_penalty=2.5), {}, ["presence_penalty", 2.5]),
    "frequency_penalty": (PROMPT, dict(frequency_penalty=-3.0), {}, ["frequency_penalty", -3]),
    "repetition_penalty 0": (PROMPT, dict(repetition_penalty=0.0), {}, ["repetition_penalty"]),
    "too many logprobs": (PROMPT, dict(logprobs=21), {}, ["logprobs", 21]),
    "stop token": (PROMPT, dict(stop_token_ids=[200]), {}, ["stop_token_ids", 200]),
    "bias token": (PROMPT, dict(logit_bias={-3: 1.0}), {}, ["logit_bias", -3]),
    "bias NaN": (PROMPT, dict(logit_bias={7: float("nan")}), {}, ["logit_bias", 7]),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_request(unharmed, case):
    prompt, sampling, more, words = REQUESTS[case]
    assert_refused(lq.InvalidArgument, words, lambda: unharmed.submit_infer(prompt, sampling=lq.SamplingParams(**sampling), **more))


def test_prompt_beyond_the_kv_pool(bench):
    engine = bench.engine(kv_cache_tokens=64)
    assert_refused(lq.InvalidArgument, ["prompt_ids", 70, "kv_cache_tokens"], lambda: engine.submit_infer([5] * 70))
    assert drive.generate(engine, [(None, [5] * 40)], drive.greedy(6)) == [bench.oracle.greedy(None, [5] * 40, 6)]


def test_prompt_of_other_types(unharmed):
    for prompt in ("abc", [1.5, 2.0], [[1, 2]], None, np.ones((2, 2), np.int64), np.array([0.5])):
        with pytest.raises((TypeError, ValueError)):
            unharmed.submit_infer(prompt)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        unharmed.submit_infer([2**40])


def test_unknown_keywords(unharmed):
    for call in (
        lambda: unharmed.submit_infer(PROMPT, temprature=1.0),
        lambda: lq.SamplingParams(temprature=1.0),
        lambda: lq.LoraConfig(rank=8),
        lambda: lq.AdamW(learning_rate=1.0),
        lambda: lq.Example(input_ids=[1, 2], mask=[1, 1]),
    ):
        with pytest.raises(TypeError):
            call()


def test_unknown_and_removed_adapters(unharmed, benches):
    example = drive.to_examples([{"input_ids": [5, 6]}])
    unharmed.add_adapter("gone", benches("llama31").adapter_folders["attn"])
    unharmed.remove_adapter("gone")
    drive.run(unharmed)  # gives its memory back
    for name in ("nobody", "gone"):
        for call in (
            lambda n=name: unharmed.submit_infer(PROMPT, adapter=n),
            lambda n=name: unharmed.submit_train(n, example),
            lambda n=name: unharmed.submit_eval(n, example),
            lambda n=name: unharmed.remove_adapter(n),
            lambda n=name: unharmed.save_adapter(n, "nowhere"),
            lambda n=name: unharmed.export_adapter(n),
            lambda n=name: unharmed.adapter_state(n, "weights"),
            lambda n=name: unharmed.adapter(n),
            lambda n=name: unharmed.clone_adapter(n, "x"),
        ):
            assert_refused(lq.NotFound, [name], call)


def test_cancel(unharmed):
    request = unharmed.submit_infer(PROMPT, sampling=drive.greedy(2))
    drive.run(unharmed)
    assert unharmed.cancel(request) is False, "it has ended"
    assert_refused(lq.NotFound, ["cancel", 10**9], lambda: unharmed.cancel(10**9))


def test_queue_full(unharmed):
    ids = [unharmed.submit_infer(PROMPT, sampling=drive.greedy(1)) for _ in range(100)]
    assert_refused(lq.QueueFull, ["full", 100], lambda: unharmed.submit_infer(PROMPT))
    assert set(drive.run(unharmed).finished) == set(ids)


# ---------------------------------------------------------------- training

IDS = [5, 6, 7, 8]
TRAINING = {
    "no examples": ([], {}, ["examples", "none"]),
    "no target": ([dict(input_ids=IDS, labels=[-100] * 4)], {}, ["examples[0]", "labels", "target"]),
    "only the first is a target": ([dict(input_ids=IDS, labels=[5, -100, -100, -100])], {}, ["examples[0]", "target"]),
    "one token": ([dict(input_ids=IDS), dict(input_ids=[5])], {}, ["examples[1]", "input_ids"]),
    "empty": ([dict(input_ids=[])], {}, ["examples[0]", "input_ids"]),
    "token id": ([dict(input_ids=IDS), dict(input_ids=[5, 6, 999])], {}, ["examples[1]", "input_ids[2]", 999]),
    "label": ([dict(input_ids=IDS, labels=[5, 6, -1, 8])], {}, ["examples[0]", "labels[2]", -1]),
    "labels length": ([dict(input_ids=IDS, labels=[5, 6])], {}, ["examples[0]", "labels", 4, 2]),
    "weights length": ([dict(input_ids=IDS, weights=[1.0] * 5)], {}, ["examples[0]", "weights", 4, 5]),
    "NaN weight": ([dict(input_ids=IDS, weights=[1.0, 1.0, float("nan"), 1.0])], {}, ["examples[0]", "entry 2", "NaN"]),
    "beyond the context": ([dict(input_ids=[5] * 513)], {}, ["examples[0]", 512, 513]),
    "policy without log-probabilities": ([dict(input_ids=IDS)], dict(loss="ppo"), ["examples[0]", "ppo", "logprobs"]),
    "unknown loss": ([dict(input_ids=IDS)], dict(loss="hinge"), ["loss", "hinge", "cross_entropy"]),
    "unknown reduction": ([dict(input_ids=IDS)], dict(reduction="max"), ["reduction", "max"]),
    "negative clip": ([dict(input_ids=IDS)], dict(clip_low=-0.1), ["clip_low"]),
    "negative lr": ([dict(input_ids=IDS)], dict(optimizer=dict(lr=-1.0)), ["lr", -1]),
    "lr NaN": ([dict(input_ids=IDS)], dict(optimizer=dict(lr=float("nan"))), ["lr", "nan"]),
    "beta 1": ([dict(input_ids=IDS)], dict(optimizer=dict(betas=(0.9, 1.0))), ["betas", 1]),
    "negative eps": ([dict(input_ids=IDS)], dict(optimizer=dict(eps=-1e-8)), ["eps"]),
    "negative decay": ([dict(input_ids=IDS)], dict(optimizer=dict(weight_decay=-0.1)), ["weight_decay"]),
    "norm 0": ([dict(input_ids=IDS)], dict(optimizer=dict(max_grad_norm=0.0)), ["max_grad_norm"]),
    "LoRA+ ratio 0": ([dict(input_ids=IDS)], dict(optimizer=dict(loraplus_lr_ratio=0.0)), ["loraplus_lr_ratio"]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training(unharmed, case):
    examples, options, words = TRAINING[case]
    options = {k: lq.AdamW(**v) if k == "optimizer" else v for k, v in options.items()}
    assert_refused(lq.InvalidArgument, words, lambda: unharmed.submit_train("attn", drive.to_examples(examples), **options))
    assert not unharmed.adapter("attn").training


def test_training_the_base(unharmed):
    with pytest.raises((lq.InvalidArgument, TypeError)):
        unharmed.submit_train(None, drive.to_examples([{"input_ids": IDS}]))


def test_example_beyond_the_batch(bench):
    engine = bench.engine(["attn"], max_batch_tokens=16)
    example = drive.to_examples([{"input_ids": [5] * 20}])
    assert_refused(lq.InvalidArgument, ["examples[0]", 16, "max_batch_tokens"], lambda: engine.submit_train("attn", example))
    assert_refused(lq.InvalidArgument, ["examples[0]", 16, "max_batch_tokens"], lambda: engine.submit_eval("attn", example))
    drive.train(engine, "attn", [{"input_ids": [5] * 17}])  # the last token is only a target


# ---------------------------------------------------------------- adapters


FRESH = {
    "rank 0": (dict(r=0), ["r", 0]),
    "rank over the limit": (dict(r=65), [65, 64]),
    "dropout 1": (dict(lora_dropout=1.0), ["lora_dropout"]),
    "no such module": (dict(target_modules=["nope"]), ["target_modules", "nope"]),
    "broken regex": (dict(target_modules="(.*"), ["target_modules", "(.*"]),
    "initialisation": (dict(init_lora_weights="orthogonal"), ["init_lora_weights", "orthogonal"]),
    "alpha NaN": (dict(lora_alpha=float("nan")), ["lora_alpha"]),
    "no such layer": (dict(layers_to_transform=[9]), ["layers_to_transform"]),
    "everything excluded": (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), ["exclude_modules"]),
}


@pytest.mark.parametrize("case", FRESH)
def test_fresh_adapter(unharmed, case):
    options, words = FRESH[case]
    assert_refused(lq.InvalidArgument, words, lambda: unharmed.add_adapter("bad", lq.LoraConfig(**options)))


def test_names(unharmed, benches):
    folder = benches("llama31").adapter_folders["attn"]
    assert_refused(lq.InvalidArgument, ["attn", "taken"], lambda: unharmed.add_adapter("attn", folder))
    assert_refused(lq.InvalidArgument, ["attn", "taken"], lambda: unharmed.add_adapter("attn", lq.LoraConfig()))
    assert_refused(lq.InvalidArgument, ["attn", "taken"], lambda: unharmed.clone_adapter("wide", "attn"))
    assert_refused(lq.InvalidArgument, ["name"], lambda: unharmed.add_adapter("", folder))


def test_adapter_larger_than_the_pool(bench):
    engine = bench.engine(["attn"], adapter_pool_bytes=20000)
    with pytest.raises(lq.OutOfMemory, match="20000"):
        engine.add_adapter("deep", bench.adapter_folders["deep"])
    assert [info.name for info in engine.adapters()] == ["attn"]
    assert drive.generate(engine, [("attn", PROMPT)], drive.greedy(6)) == [bench.oracle.greedy("attn", PROMPT, 6)]


def test_state_of_what(unharmed):
    assert_refused(lq.InvalidArgument, ["adapter_state", "momentum"], lambda: unharmed.adapter_state("attn", "momentum"))
    assert_refused(lq.InvalidArgument, ["attn", "training"], lambda: unharmed.adapter_state("attn", "gradients"))


def test_export_while_jobs_wait(bench):
    engine = bench.engine(["attn"])
    engine.submit_train("attn", drive.to_examples(make_examples(1, bench.vocab_size, 1)))
    assert_refused(lq.InvalidArgument, ["attn", "jobs"], lambda: engine.export_adapter("attn"))
    drive.run(engine)
    assert len(engine.export_adapter("attn")) > 0


def test_import_of_rubbish(unharmed, benches):
    data = unharmed.export_adapter("wide")
    for bad in (b"", b"rubbish", data[:-1], data[:100], data[:8] + b"\xff" + data[9:], b"\xff" * 8 + data[8:]):
        with pytest.raises(lq.FormatError):
            unharmed.import_adapter("bad", bad)
    assert_refused(lq.InvalidArgument, ["wide"], lambda: unharmed.import_adapter("wide", data))
    other = benches("qwen3").engine()
    with pytest.raises((lq.FormatError, lq.InvalidArgument)):
        other.import_adapter("bad", data)


def test_checkpoint_folders(unharmed, tmp_path):
    assert_refused(lq.NotFound, ["checkpoint.json"], lambda: unharmed.load_checkpoint(tmp_path))
    (tmp_path / "checkpoint.json").write_text("[]")
    assert_refused(lq.FormatError, ["checkpoint.json"], lambda: unharmed.load_checkpoint(tmp_path))
    manifest = {"format": "loquetier-checkpoint", "format_version": 1, "adapters": [{"name": "x", "file": "../x.safetensors"}]}
    (tmp_path / "checkpoint.json").write_text(json.dumps(manifest))
    assert_refused(lq.FormatError, ["checkpoint.json"], lambda: unharmed.load_checkpoint(tmp_path))


# ---------------------------------------------------------------- options

OPTIONS = {
    "zero batch": (dict(max_batch_tokens=0), ["max_batch_tokens", 0]),
    "zero sequences": (dict(max_sequences=0), ["max_sequences", 0]),
    "zero KV": (dict(kv_cache_tokens=0), ["kv_cache_tokens", 0]),
    "zero pool": (dict(adapter_pool_bytes=0), ["adapter_pool_bytes", 0]),
    "zero queue": (dict(max_queue=0), ["max_queue", 0]),
    "fraction": (dict(memory_fraction=1.5), ["memory_fraction", 1.5]),
    "rank limit": (dict(max_lora_rank=0), ["max_lora_rank", 0]),
    "page size": (dict(page_size=24), ["page_size", 24]),
    "recompute": (dict(recompute="all"), ["recompute", "all"]),
    "dtype": (dict(dtype="int8"), ["dtype", "int8"]),
    "bf16 on the CPU": (dict(dtype="bf16"), ["dtype", "bf16"]),
    "device": (dict(device="tpu"), ["device", "tpu"]),
    "device index": (dict(device="cuda:x"), ["device", "cuda:x"]),
    "latency": (dict(latency=0.1), ["latency"]),
    "threads": (dict(num_threads=-1), ["num_threads", -1]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_engine_options(bench, case):
    options, words = OPTIONS[case]
    assert_refused(lq.InvalidArgument, words, lambda: lq.Engine(bench.folder, **{"device": "cpu", **options}))


def test_saving_where_it_cannot(unharmed, tmp_path):
    """A failed save leaves what was there before."""
    unharmed.save_adapter("attn", tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    (tmp_path / "file").write_text("x")
    with pytest.raises((lq.Error, OSError)):
        unharmed.save_adapter("attn", tmp_path / "file" / "below")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept"]
