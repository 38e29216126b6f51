"""Files and live weights in and out: checkpoints of every dtype, shards, both spellings of the rope settings, state dicts, PEFT
folders bit for bit, adapters in motion, engine checkpoints.

Hostile and broken files are in test_bad_input.py. Read next: helpers/models.py.
"""

from __future__ import annotations

import json

import loquetier_core as lq
import numpy as np
import pytest
import torch
from helpers import adapters, drive, models
from helpers.oracle import Oracle, make_examples
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest_plugins = ["helpers.fixtures"]

SEED = 71
PROMPT = [11, 12, 90, 45, 3, 77]


def base_tokens(model, prompt, count) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def small_engine(model, **options):
    return lq.Engine(model, device="cpu", num_threads=1, kv_cache_tokens=1024, max_batch_tokens=512, **options)


# ---------------------------------------------------------------- base models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama31", "qwen2", "qwen3"])
def test_half_checkpoints(tmp_path, family, dtype):
    """The CPU computes in f32: what comes out is the upcast model."""
    folder = models.save_model(models.make_model(family, dtype=dtype), tmp_path / "model")
    upcast = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # its rope frequencies were never rounded
    oracle = Oracle(adapters.attach(upcast, ["wide", "vocab"]))
    folders = adapters.save(oracle.tuned, tmp_path / "adapters")
    engine = small_engine(folder)
    for name, path in folders.items():
        engine.add_adapter(name, path)
    requests = [(name, PROMPT) for name in (None, "wide", "vocab")]
    assert drive.generate(engine, requests, drive.greedy(20)) == [oracle.greedy(name, PROMPT, 20) for name, _ in requests]
    examples = make_examples(2, 131, SEED)
    drive.train(engine, "wide", examples)
    drive.assert_states_close(engine.adapter_state("wide", "gradients"), oracle.gradients("wide", [examples]), 1e-4, "gradient of")


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("family", ["llama31", "llama_linear", "qwen3"])
def test_shards_and_rope_spellings(tmp_path, family, spelling):
    model = models.make_model(family)
    folder = models.save_model(model, tmp_path / "model", shard="60KB", spelling=spelling)
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").exists()
    assert ("rope_theta" in json.loads((folder / "config.json").read_text())) == (spelling == "rope_theta")
    engine = small_engine(folder)
    assert drive.generate(engine, [(None, PROMPT)], drive.greedy(20)) == [base_tokens(model, PROMPT, 20)]


@pytest.mark.parametrize("kind", ["torch", "numpy", "bf16"])
def test_from_state_dict(kind):
    """Weights of a live model, by DLPack or the buffer of an array. The engine sees the tensors themselves where it need not
    convert."""
    model = models.make_model("llama31", dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    state = {k: v.detach().numpy() if kind == "numpy" else v.detach() for k, v in model.state_dict().items()}
    options = dict(device="cpu", num_threads=1, kv_cache_tokens=512)
    engine = lq.Engine.from_state_dict(model.config.to_dict(), state, **options)
    upcast = models.make_model("llama31")
    upcast.load_state_dict(model.state_dict())
    assert drive.generate(engine, [(None, PROMPT)], drive.greedy(16)) == [base_tokens(upcast, PROMPT, 16)]


def test_from_state_dict_copies_nothing_in_f32():
    model = models.make_model("llama2")
    engine = lq.Engine.from_state_dict(
        model.config, {k: v.detach() for k, v in model.state_dict().items()}, device="cpu", num_threads=1, kv_cache_tokens=512
    )
    assert engine.stats().weight_bytes < 4096, "only the table of rope frequencies is the engine's own"
    with torch.no_grad():  # seen by the engine, because it is the same memory
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())
    assert drive.generate(engine, [(None, PROMPT)], drive.greedy(8)) == [base_tokens(model, PROMPT, 8)]


def test_state_dict_outlives_its_owner():
    model = models.make_model("llama2")
    want = base_tokens(model, PROMPT, 8)
    options = dict(device="cpu", num_threads=1, kv_cache_tokens=512)
    engine = lq.Engine.from_state_dict(model.config, {k: v.detach().clone() for k, v in model.state_dict().items()}, **options)
    del model
    torch.empty(1 << 16).fill_(7)  # would reuse freed memory
    assert drive.generate(engine, [(None, PROMPT)], drive.greedy(8)) == [want]


def test_random_weights_from_a_config():
    config = models.FAMILIES["llama31"]().to_dict()
    tokens = [drive.generate(small_engine(config), [(None, PROMPT)], drive.greedy(8)) for _ in range(2)]
    assert tokens[0] == tokens[1] and len(tokens[0][0]) == 8


def test_engines_share_a_base_model(bench):
    base = lq.BaseModel.load(bench.folder)
    assert (base.family, base.vocab_size, base.num_layers) == ("llama", bench.vocab_size, 2)
    assert base.num_parameters == sum(p.numel() for p in models.make_model("llama31").parameters())
    engines = [small_engine(base) for _ in range(2)]
    del base
    engines[0].close()
    assert drive.generate(engines[1], [(None, PROMPT)], drive.greedy(8)) == [bench.oracle.greedy(None, PROMPT, 8)]


# ---------------------------------------------------------------- PEFT folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", adapters.NAMES)
def test_peft_round_trip_is_bit_exact(bench, tmp_path, name, dtype):
    """PEFT → engine → folder → PEFT: the same bytes per tensor, the same configuration, the same logits."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {k: v.to(dtype) for k, v in load_file(bench.adapter_folders[name] / "adapter_model.safetensors").items()}
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    (source / "adapter_config.json").write_text((bench.adapter_folders[name] / "adapter_config.json").read_text())
    engine = bench.engine()
    engine.add_adapter("x", source)
    engine.save_adapter("x", tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert set(saved) == set(tensors)
    for key, want in tensors.items():
        assert saved[key].dtype == dtype and torch.equal(saved[key].view(torch.uint8), want.view(torch.uint8)), key
    config, original = (LoraConfig.from_pretrained(f) for f in (tmp_path / "saved", source))
    module_names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "layers_to_transform", "bias")
    assert {f: getattr(config, f) for f in module_names} == {f: getattr(original, f) for f in module_names}
    tuned = PeftModel.from_pretrained(models.make_model("llama31"), tmp_path / "saved", adapter_name="x").eval()
    with torch.no_grad():
        got = Oracle(tuned).logits("x", PROMPT)
        if dtype == torch.float32:
            assert torch.equal(got, bench.oracle.logits(name, PROMPT))
    assert drive.generate(engine, [("x", PROMPT)], drive.greedy(12)) == [Oracle(tuned).greedy("x", PROMPT, 12)]


def test_peft_default_save_with_lm_head(bench, tmp_path):
    """PEFT's save_pretrained adds the frozen lm_head weight beside the adapter when lm_head is a target: it is the base's own."""
    tuned = adapters.attach(models.make_model("llama31"), ["vocab"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        folders = adapters.save(tuned, tmp_path, save_embedding_layers="auto")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folders["vocab"] / "adapter_model.safetensors")
    engine = bench.engine()
    engine.add_adapter("vocab", folders["vocab"])
    assert drive.generate(engine, [("vocab", PROMPT)], drive.greedy(12)) == [Oracle(tuned).greedy("vocab", PROMPT, 12)]


@pytest.mark.parametrize("name", adapters.NAMES)
def test_trained_adapter_loads_in_peft(bench, tmp_path, name):
    engine = bench.engine([name])
    for i in range(3):
        drive.train(engine, name, make_examples(2, bench.vocab_size, SEED + i), optimizer=lq.AdamW(lr=1e-2))
    engine.save_adapter(name, tmp_path / "saved")
    tuned = PeftModel.from_pretrained(models.make_model("llama31"), tmp_path / "saved", adapter_name="trained").eval()
    drive.assert_states_equal(engine.adapter_state(name, "master"), adapters.state(tuned, "trained"), "weight")
    examples = make_examples(2, bench.vocab_size, SEED)
    with torch.no_grad():
        want = Oracle(tuned).loss("trained", examples).item()
    assert drive.evaluate(engine, name, examples).loss == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", adapters.NAMES)
def test_fresh_adapter_targets_what_peft_targets(bench, name):
    """The engine's own LoraConfig resolves to the same modules and ranks, at PEFT's distribution of initial values."""
    options = dict(adapters.CONFIGS[name])
    engine = bench.engine()
    engine.add_adapter("fresh", lq.LoraConfig(**options, seed=5))
    state = engine.adapter_state("fresh", "weights")
    want = bench.oracle.weights(name)
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: tuple(v.shape) for k, v in want.items()}
    assert engine.adapter("fresh").parameters == sum(v.numel() for v in want.values())
    for key, value in state.items():
        if "lora_B" in key:
            assert not value.any(), key
        else:  # Kaiming uniform with a = sqrt(5): the bound is 1 / sqrt(in)
            bound = value.shape[1] ** -0.5
            assert np.abs(value).max() <= bound and np.abs(value).max() > 0.9 * bound, key
    values = np.concatenate([(v * v.shape[1] ** 0.5).ravel() for k, v in state.items() if "lora_A" in k])
    assert abs(values.mean()) < 5 / (3 * values.size) ** 0.5 and abs((values**2).mean() - 1 / 3) < 5 * (4 / 45 / values.size) ** 0.5


def test_initialisations(bench):
    states = {}
    for kind in (True, False, "gaussian"):
        engine = bench.engine()
        engine.add_adapter("x", lq.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=kind, seed=1))
        engine.add_adapter("y", lq.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=kind, seed=2))
        states[kind] = engine.adapter_state("x", "weights")
        other = engine.adapter_state("y", "weights")
        assert all(not np.array_equal(v, other[k]) for k, v in states[kind].items() if "lora_A" in k), "another seed, other values"
    assert all(v.any() for v in states[False].values())
    assert all(v.any() == ("lora_A" in k) for k, v in states["gaussian"].items())
    a = np.concatenate([v.ravel() for k, v in states["gaussian"].items() if "lora_A" in k])
    assert a.std() == pytest.approx(1 / 16, rel=0.02), "normal with standard deviation 1 / r"


def test_default_targets_are_pefts(bench):
    engine = bench.engine()
    engine.add_adapter("x", lq.LoraConfig())
    modules = {key.split(".self_attn.")[-1].split(".")[0] for key in engine.adapter_state("x", "weights")}
    assert modules == {"q_proj", "v_proj"}


# ---------------------------------------------------------------- adapters in motion


def training_losses(engine, name, first, last, vocab_size):
    options = dict(optimizer=lq.AdamW(lr=3e-3, weight_decay=0.01))
    return [drive.train(engine, name, make_examples(2, vocab_size, SEED + i), **options).loss for i in range(first, last)]


@pytest.mark.parametrize("way", ["export", "checkpoint"])
def test_training_goes_on_elsewhere(bench, tmp_path, way):
    """Moved in the middle of an accumulation, with dropout on: the same losses and weights as without the move."""
    config = lq.LoraConfig(r=6, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False, seed=9)
    stay, source = bench.engine(), bench.engine()
    half = make_examples(2, bench.vocab_size, 600)
    for engine in (stay, source):
        engine.add_adapter("x", config)
        training_losses(engine, "x", 0, 4, bench.vocab_size)
        drive.train(engine, "x", half)  # gradients wait for the next optimizer step
    target = bench.engine()
    if way == "export":
        data = source.export_adapter("x")
        assert isinstance(data, bytes)
        target.import_adapter("moved", data)
    else:
        source.add_adapter("served", bench.adapter_folders["wide"])
        source.save_checkpoint(tmp_path / "checkpoint")
        target.load_checkpoint(tmp_path / "checkpoint")
        assert drive.generate(target, [("served", PROMPT)], drive.greedy(8)) == [bench.oracle.greedy("wide", PROMPT, 8)]
    source.close()
    name = "moved" if way == "export" else "x"
    assert target.adapter(name).version == 4 and target.adapter(name).training
    for kind in ("weights", "master", "gradients", "exp_avg", "exp_avg_sq"):
        drive.assert_states_equal(target.adapter_state(name, kind), stay.adapter_state("x", kind), kind)
    assert training_losses(target, name, 4, 8, bench.vocab_size) == training_losses(stay, "x", 4, 8, bench.vocab_size)
    drive.assert_states_equal(target.adapter_state(name, "master"), stay.adapter_state("x", "master"), "master")


def test_checkpoint_replaces_the_one_before(bench, tmp_path):
    engine = bench.engine(["attn"])
    engine.save_checkpoint(tmp_path / "c")
    training_losses(engine, "attn", 0, 1, bench.vocab_size)
    engine.remove_adapter("attn")
    engine.add_adapter("wide", bench.adapter_folders["wide"])
    engine.save_checkpoint(tmp_path / "c")
    other = bench.engine()
    other.load_checkpoint(tmp_path / "c")
    assert [info.name for info in other.adapters()] == ["wide"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "temporary folders are gone"
    with pytest.raises(lq.InvalidArgument, match="wide"):
        other.load_checkpoint(tmp_path / "c")  # the name is taken
    assert drive.generate(other, [("wide", PROMPT)], drive.greedy(4)) == [bench.oracle.greedy("wide", PROMPT, 4)]
