"""Writes the seed corpus of the fuzz targets: corpus/<target>/<name>, a few small valid and broken inputs each.

Run it from anywhere: python3 make_corpus.py. Its output is committed; it needs nothing but Python.
"""

import json
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent / "corpus"
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "F64": 8}


def safetensors(tensors, metadata=None, tail=b""):
    """tensors: name -> (dtype, shape); values are a ramp of small f32 numbers, or zeros."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape) in tensors.items():
        count = 1
        for n in shape:
            count *= n
        if dtype == "F32":
            payload = b"".join(struct.pack("<f", 0.125 * (i % 7)) for i in range(count))
        else:
            payload = bytes(count * SIZES[dtype])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data + tail


def write(target, name, data):
    folder = HERE / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


# The model of models.h: hidden 4, intermediate 6, 2 layers, 2 query heads and 1 key/value head of size 2, vocabulary 5.
SHAPES = {
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (4, 2),
    "self_attn.v_proj": (4, 2),
    "self_attn.o_proj": (4, 4),
    "mlp.gate_proj": (4, 6),
    "mlp.up_proj": (4, 6),
    "mlp.down_proj": (6, 4),
}


def lora(modules, rank=1, dtype="F32", prefix="", layers=(0, 1)):
    tensors = {}
    for layer in layers:
        for module in modules:
            inside, outside = SHAPES[module]
            key = f"{prefix}base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = (dtype, [rank, inside])
            tensors[f"{key}.lora_B.weight"] = (dtype, [outside, rank])
    return tensors


def peft_config(**changes):
    return json.dumps(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]} | changes
    )


def main():
    write("safetensors", "empty", b"")
    write("safetensors", "no_tensors", safetensors({}))
    write(
        "safetensors",
        "mixed",
        safetensors({"a": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("I64", []), "d": ("U8", [0, 5])}, {"k": "v"}),
    )
    write("safetensors", "other_dtype", safetensors({"a": ("F64", [2]), "b": ("F16", [1])}))
    write("safetensors", "tail", safetensors({"a": ("U8", [2])}, tail=b"xx"))
    write("safetensors", "huge_header", struct.pack("<Q", 1 << 62) + b"{}")
    text = b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[8,4]}}'
    write("safetensors", "hostile", struct.pack("<Q", len(text)) + text + bytes(4))

    base = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    write(
        "config",
        "llama2",
        json.dumps(
            base
            | {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "rope_theta": 10000.0,
                "eos_token_id": 2,
                "torch_dtype": "float16",
                "rope_scaling": None,
            }
        ),
    )
    write(
        "config",
        "llama3",
        json.dumps(
            base
            | {
                "model_type": "llama",
                "rope_theta": 500000.0,
                "eos_token_id": [1, 2],
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            }
        ),
    )
    write(
        "config",
        "linear",
        json.dumps(
            base
            | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 2}}
        ),
    )
    write("config", "mistral", json.dumps(base | {"model_type": "mistral", "sliding_window": 64, "head_dim": 8}))
    write(
        "config",
        "qwen2",
        json.dumps(
            base
            | {
                "model_type": "qwen2",
                "use_sliding_window": False,
                "tie_word_embeddings": True,
                "layer_types": ["full_attention", "full_attention"],
            }
        ),
    )
    write(
        "config",
        "qwen3",
        json.dumps(
            base
            | {
                "model_type": "qwen3",
                "head_dim": 8,
                "dtype": "bfloat16",
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            }
        ),
    )
    write(
        "config",
        "refused",
        json.dumps(base | {"model_type": "llama", "quantization_config": {"bits": 4}, "partial_rotary_factor": 0.5}),
    )

    weights = safetensors(lora(["self_attn.q_proj"]), {"format": "pt"})
    write("peft", "q", b"\0" + peft_config().encode() + b"\0" + weights)
    write("peft", "all_linear", b"\0" + peft_config(target_modules="all-linear").encode() + b"\0" + safetensors(lora(SHAPES)))
    write(
        "peft",
        "regex",
        b"\1"
        + peft_config(
            target_modules=r"model\.layers\.(0|[1-9]+)\.(?!mlp).*(q|k)_proj$", exclude_modules=["1.self_attn.k_proj"]
        ).encode(),
    )
    write(
        "peft",
        "patterns",
        b"\1"
        + peft_config(
            rank_pattern={"^model.layers.0.self_attn.q_proj": 2, "q_proj": 3},
            alpha_pattern={r"layers\.\d+.*": 5.5},
            layers_to_transform=[1],
            layers_pattern="layers",
            use_rslora=True,
        ).encode(),
    )
    write(
        "peft",
        "options",
        b"\0"
        + peft_config(
            lora_dropout=0.1,
            init_lora_weights="gaussian",
            bias="none",
            exclude_modules=".*k_proj",
            modules_to_save=None,
            megatron_core="megatron.core",
            use_dora=False,
            loftq_config={},
        ).encode(),
    )
    write("peft", "refused", b"\0" + peft_config(use_dora=True, layer_replication=[[0, 1]]).encode())

    state = {
        "format": "loquetier-adapter-1",
        "config": peft_config(),
        "seed": "7",
        "version": "3",
        "stored_dtype": "f32",
        "has_training_state": "0",
        "optimizer_steps": "0",
        "dropout_counter": "0",
    }
    modules = ["self_attn.q_proj"]
    write("snapshot", "weights", safetensors(lora(modules, prefix="master."), state))
    trained = {}
    for section in ("master.", "exp_avg.", "exp_avg_sq.", "gradients."):
        trained |= lora(modules, prefix=section)
    write(
        "snapshot",
        "training",
        safetensors(trained, state | {"has_training_state": "1", "optimizer_steps": "3", "dropout_counter": "12"}),
    )
    write("snapshot", "no_metadata", weights)


if __name__ == "__main__":
    main()
