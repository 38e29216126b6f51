"""Bad files of adapters and base models, the whole way from Python: the error's class, what and where in its message, nothing
changed.

The readers have many more cases of their own in tests/cpp/io_tests.cpp and the fuzz targets. Read next: helpers/refusals.py,
test_bad_input.py.
"""

from __future__ import annotations

import json
import shutil
import struct

import loquetier_core as lq
import pytest
import torch
from helpers import models
from helpers.refusals import assert_refused
from safetensors.torch import load_file, save_file

pytest_plugins = ["helpers.fixtures", "helpers.refusals"]

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

# ---------------------------------------------------------------- adapters


def edited(folder, source, config=None, tensors=None):
    """A copy of a PEFT folder with changed configuration keys (dict) and tensors (function of the dict of tensors)."""
    folder.mkdir()
    settings = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}))
    state = load_file(source / "adapter_model.safetensors")
    save_file((tensors or (lambda t: t))(state), folder / "adapter_model.safetensors")
    return folder


def poisoned(value):
    def change(tensors):
        tensors[KEY][1, 2] = value
        return tensors

    return change


ADAPTERS = {
    "DoRA": (lq.InvalidArgument, dict(use_dora=True), None, ["use_dora"]),
    "bias": (lq.InvalidArgument, dict(bias="all"), None, ["bias", "all"]),
    "modules_to_save": (lq.InvalidArgument, dict(modules_to_save=["lm_head"]), None, ["modules_to_save"]),
    "lora_bias": (lq.InvalidArgument, dict(lora_bias=True), None, ["lora_bias"]),
    "trainable tokens": (lq.InvalidArgument, dict(trainable_token_indices=[3]), None, ["trainable_token_indices"]),
    "layer replication": (lq.InvalidArgument, dict(layer_replication=[[0, 2]]), None, ["layer_replication"]),
    "PiSSA": (lq.InvalidArgument, dict(init_lora_weights="pissa"), None, ["init_lora_weights", "pissa"]),
    "another method": (None, dict(peft_type="IA3"), None, ["peft_type", "IA3"]),
    "a key of the future": (lq.InvalidArgument, dict(use_something_new=True), None, ["use_something_new"]),
    "rank over the limit": (lq.InvalidArgument, dict(r=65), None, [65, 64]),
    "rank 0": (None, dict(r=0), None, ["r"]),
    "unsupported module": (lq.InvalidArgument, dict(target_modules=["embed_tokens"]), None, ["embed_tokens"]),
    "no module matches": (lq.InvalidArgument, dict(target_modules=["c_attn"]), None, ["target_modules", "c_attn"]),
    "NaN": (lq.FormatError, None, poisoned(float("nan")), [KEY, "adapter_model.safetensors"]),
    "infinity": (lq.FormatError, None, poisoned(float("inf")), [KEY]),
    "missing tensor": (lq.FormatError, None, lambda t: {k: v for k, v in t.items() if k != KEY}, [KEY]),
    "unknown tensor": (lq.FormatError, None, lambda t: {**t, "base_model.model.extra": torch.ones(2)}, ["base_model.model.extra"]),
    "another rank": (lq.FormatError, dict(r=5), None, ["lora_", 5]),
    "another model": (
        lq.FormatError,
        None,
        lambda t: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in t.items()},
        ["lora_A", 64, 128],
    ),
    "integers": (lq.FormatError, None, lambda t: {**t, KEY: t[KEY].to(torch.int32)}, [KEY]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_folder(unharmed, benches, tmp_path, case):
    error, config, tensors, words = ADAPTERS[case]
    folder = edited(tmp_path / "adapter", benches("llama31").adapter_folders["attn"], config, tensors)
    with pytest.raises(lq.Error) as caught:
        unharmed.add_adapter("bad", folder)
    assert_refused(error or type(caught.value), words, lambda: unharmed.add_adapter("bad", folder))
    assert isinstance(caught.value, lq.FormatError | lq.InvalidArgument)


def test_adapter_with_more_layers_than_the_model(unharmed, benches, tmp_path):
    def deeper(tensors):
        return {**tensors, **{k.replace("layers.1.", "layers.7."): v.clone() for k, v in tensors.items() if "layers.1." in k}}

    folder = edited(tmp_path / "adapter", benches("llama31").adapter_folders["attn"], None, deeper)
    assert_refused(lq.FormatError, ["layers.7."], lambda: unharmed.add_adapter("bad", folder))


def test_adapter_folder_files(unharmed, benches, tmp_path):
    source = benches("llama31").adapter_folders["attn"]
    assert_refused(lq.NotFound, ["nowhere"], lambda: unharmed.add_adapter("bad", tmp_path / "nowhere"))
    for missing in ("adapter_config.json", "adapter_model.safetensors"):
        folder = tmp_path / f"without-{missing}"
        shutil.copytree(source, folder)
        (folder / missing).unlink()
        assert_refused(lq.NotFound, [missing], lambda f=folder: unharmed.add_adapter("bad", f))
    folder = edited(tmp_path / "json", source)
    (folder / "adapter_config.json").write_text("{")
    assert_refused(lq.FormatError, ["adapter_config.json"], lambda: unharmed.add_adapter("bad", folder))
    pickled = tmp_path / "pickle"
    shutil.copytree(source, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    words = ["adapter_model.bin", "adapter_model.safetensors"]
    assert_refused(lq.InvalidArgument, words, lambda: unharmed.add_adapter("bad", pickled))


# ---------------------------------------------------------------- base models

CONFIGS = {
    "another family": (lq.InvalidArgument, dict(model_type="gpt2", architectures=["GPT2LMHeadModel"]), ["model_type", "gpt2"]),
    "no hidden_size": (lq.FormatError, dict(hidden_size=None), ["hidden_size"]),
    "hidden_size 0": (lq.FormatError, dict(hidden_size=0), ["hidden_size", 0]),
    "hidden_size negative": (lq.FormatError, dict(hidden_size=-64), ["hidden_size", -64]),
    "hidden_size absurd": (lq.FormatError, dict(hidden_size=2**60), ["hidden_size"]),
    "hidden_size text": (lq.FormatError, dict(hidden_size="big"), ["hidden_size"]),
    "heads": (lq.FormatError, dict(num_attention_heads=3), ["num_attention_heads", 3]),
    "kv heads": (lq.FormatError, dict(num_key_value_heads=3), ["num_key_value_heads", 3]),
    "activation": (lq.InvalidArgument, dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    "rope type": (lq.InvalidArgument, dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), ["yarn"]),
    "quantization": (lq.InvalidArgument, dict(quantization_config={"quant_method": "gptq"}), ["quantization_config"]),
}


@pytest.fixture(scope="module")
def model_folder(benches):
    return benches("llama31").folder


def copied_model(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_model_config(model_folder, tmp_path, case):
    error, changes, words = CONFIGS[case]
    folder = copied_model(model_folder, tmp_path)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert_refused(error, [*words, "config.json"], lambda: lq.BaseModel.load(folder))


def test_sliding_window_in_use(benches, tmp_path):
    folder = copied_model(benches("mistral").folder, tmp_path)
    config = {**json.loads((folder / "config.json").read_text()), "sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(lq.InvalidArgument, ["sliding_window", 64], lambda: lq.BaseModel.load(folder))


def test_model_files(model_folder, tmp_path):
    assert_refused(lq.NotFound, ["nowhere"], lambda: lq.Engine(tmp_path / "nowhere"))
    for missing in ("config.json", "model.safetensors"):
        folder = tmp_path / f"without-{missing}"
        shutil.copytree(model_folder, folder)
        (folder / missing).unlink()
        assert_refused(lq.NotFound, [missing], lambda f=folder: lq.BaseModel.load(f))


def rewritten(path, change):
    """Rewrites a safetensors file's header: change(header) edits the dict; offsets and bytes stay."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    text = change(header, body)
    if isinstance(text, tuple):
        text, body = text
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


NORM = "model.norm.weight"


def edit(**fields):
    def change(header, body):
        header[NORM].update(fields)

    return change


def overlapping(header, body):
    begin, end = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    header[NORM]["data_offsets"] = [begin, end]


def renamed(header, body):
    header["model.final_norm.weight"] = header.pop(NORM)


TENSORS = {
    "overlapping": (overlapping, []),
    "offset beyond the file": (edit(data_offsets=[10**12, 10**12 + 256]), [NORM]),
    "negative offset": (edit(data_offsets=[-256, 0]), [NORM]),
    "reversed offsets": (edit(data_offsets=[512, 256]), [NORM]),
    "shape against bytes": (edit(shape=[65]), [NORM]),
    "negative shape": (edit(shape=[-64]), [NORM]),
    "shape overflow": (edit(shape=[2**62, 2**62]), [NORM]),
    "dtype against bytes": (edit(dtype="F16"), [NORM]),
    "another name": (renamed, ["model.norm.weight"]),
    "transposed": (lambda h, b: h["lm_head.weight"].update(shape=[64, 131]), ["lm_head.weight"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_model_tensors(model_folder, tmp_path, case):
    change, words = TENSORS[case]
    folder = copied_model(model_folder, tmp_path)
    rewritten(folder / "model.safetensors", change)
    assert_refused(lq.FormatError, [str(folder), *words], lambda: lq.BaseModel.load(folder))


HEADERS = {
    "truncated": lambda data: data[:-100],
    "truncated in the header": lambda data: data[:200],
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "huge header": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of the whole file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header of nothing": lambda data: struct.pack("<Q", 0) + data[8:],
    "not JSON": lambda data: data[:8] + b"x" + data[9:],
    "bytes behind the last tensor": lambda data: data + b"\0" * 64,
}


@pytest.mark.parametrize("case", HEADERS)
def test_model_headers(model_folder, tmp_path, case):
    folder = copied_model(model_folder, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(HEADERS[case](path.read_bytes()))
    assert_refused(lq.FormatError, ["model.safetensors"], lambda: lq.BaseModel.load(folder))


def test_shard_index(tmp_path):
    folder = models.save_model(models.make_model("llama31"), tmp_path / "model", shard="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    shard = folder / index["weight_map"][first]
    moved = {**index, "weight_map": {**index["weight_map"], first: "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(moved))
    with pytest.raises(lq.Error, match=r"outside|index"):
        lq.BaseModel.load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard.unlink()
    assert_refused(lq.NotFound, [shard.name], lambda: lq.BaseModel.load(folder))


def test_state_dicts():
    model = models.make_model("llama31")
    state = {k: v.detach() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    assert_refused(
        lq.InvalidArgument, [NORM], lambda: lq.Engine.from_state_dict(config, {k: v for k, v in state.items() if k != NORM})
    )
    assert_refused(
        lq.InvalidArgument, [NORM, 64, 63], lambda: lq.Engine.from_state_dict(config, {**state, NORM: state[NORM][:63].clone()})
    )
    with pytest.raises((lq.Error, TypeError), match=r"norm|int"):
        lq.Engine.from_state_dict(config, {**state, NORM: torch.ones(64, dtype=torch.int32)})
