"""Tiny random Hugging Face models of every family that the engine serves, made with transformers.

Weights are drawn wide (standard deviation 1 / sqrt(in), norms around 1, biases not zero), so that logits are spread, greedy
choices are clear, and no norm or bias could be left out unnoticed. Sizes are ugly on purpose. Read next: adapters.py, oracle.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

EOS = 2
_SHAPE = dict(
    vocab_size=131, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=EOS,
)  # fmt: skip


def _rope(rope_type: str = "default", theta: float = 10000.0, **more) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **more}}


# original_max_position_embeddings is small, so that the llama3 rule changes most frequencies of so small a head.
_LLAMA3 = _rope("llama3", 5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)

FAMILIES = {
    "llama2": lambda: LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=False, **_rope()),
    "llama31": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=False, **_LLAMA3),
    "llama32_tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True, **_LLAMA3),
    "llama_linear": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True, **_rope("linear", factor=4.0)),
    "llama_bias": lambda: LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, **_rope()),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None, tie_word_embeddings=False, **_rope(theta=100000.0)),
    "qwen2": lambda: Qwen2Config(**_SHAPE, use_sliding_window=False, tie_word_embeddings=True, **_rope(theta=1000000.0)),
    "qwen2_untied": lambda: Qwen2Config(**_SHAPE, use_sliding_window=False, tie_word_embeddings=False, **_rope()),
    "qwen3": lambda: Qwen3Config(
        **_SHAPE, head_dim=24, use_sliding_window=False, tie_word_embeddings=False, **_rope(theta=1000000.0)
    ),
    "qwen3_tied": lambda: Qwen3Config(**_SHAPE, head_dim=32, use_sliding_window=False, tie_word_embeddings=True, **_rope()),
}
NAMES = list(FAMILIES)


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A transformers model in eval mode. Other dtypes round the f32 values."""
    config = FAMILIES[family]()
    generator = torch.Generator().manual_seed(1000 + seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * noise)
            elif p.dim() == 1:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise / math.sqrt(p.shape[1]))
        model.model.embed_tokens.weight.mul_(4 if not config.tie_word_embeddings else 2)
    return model.to(dtype)


def save_model(model, folder: Path, shard: str | None = None, spelling: str = "rope_parameters") -> Path:
    """A Hugging Face folder. shard: largest file size ("60KB"), spelling: of the rope settings; "rope_theta" is that of
    transformers 4."""
    folder = Path(folder)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if spelling == "rope_theta":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        if parameters["rope_type"] != "default":
            config["rope_scaling"] = parameters
        config["torch_dtype"] = config.pop("dtype")
        path.write_text(json.dumps(config))
    return folder


def prompts(count: int, vocab_size: int, seed: int, shortest: int = 3, longest: int = 40) -> list[list[int]]:
    """Random prompts of mixed lengths, without the special ids 0, 1, 2."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]
