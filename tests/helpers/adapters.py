"""PEFT adapters that between them use every option which changes the maths: ranks, alphas, rsLoRA, lists, a regex, all-linear,
exclusions, layers_to_transform, rank_pattern, alpha_pattern, and lm_head as a target.

Values are random and far from zero in A and B. Read next: oracle.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

CONFIGS = {
    "attn": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "wide": dict(
        r=8, lora_alpha=16, target_modules="all-linear", rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.down_proj": 11},
        alpha_pattern={"up_proj": 5, r"layers\.0\.self_attn\.o_proj": 3},
    ),
    "gated": dict(r=16, lora_alpha=4, use_rslora=True, target_modules=r".*\.layers\.\d+\.mlp\.(gate|down)_proj"),
    "vocab": dict(
        r=5, lora_alpha=5, target_modules=["lm_head", "o_proj", "k_proj"], exclude_modules=r".*layers\.0\.self_attn\.k_proj",
    ),
    "upper": dict(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "up_proj"], layers_to_transform=[1]),
    "head_only": dict(r=2, lora_alpha=3, target_modules=["lm_head"]),
    "deep": dict(r=37, lora_alpha=20, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}  # fmt: skip
NAMES = list(CONFIGS)


def attach(model, names=NAMES, seed: int = 0) -> PeftModel:
    """A PeftModel over `model` with these adapters, values random."""
    tuned = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings with lm_head as a target: meant
        for name in names:
            config = LoraConfig(**CONFIGS[name])
            if tuned is None:
                tuned = get_peft_model(model, config, adapter_name=name)
            else:
                tuned.add_adapter(name, config)
    generator = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if ".lora_A." in key:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
            elif ".lora_B." in key:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return tuned.eval()


def save(tuned: PeftModel, folder: Path, **options) -> dict[str, Path]:
    """One PEFT folder per adapter, as PEFT writes them; options go to save_pretrained."""
    folder = Path(folder)
    options.setdefault("save_embedding_layers", False)
    for name in tuned.peft_config:
        # A PeftModel writes an adapter called "default" into the folder itself and any other into a subfolder of its name.
        tuned.save_pretrained(folder, selected_adapters=[name], **options)
    return {name: folder / name for name in tuned.peft_config}


def state(tuned: PeftModel, name: str, what=lambda p: p) -> dict[str, torch.Tensor]:
    """Tensors of one adapter by PEFT key ("base_model.model.….lora_A.weight"); what: taken of each parameter."""
    found = {}
    for key, p in tuned.named_parameters():
        for ab in ("lora_A", "lora_B"):
            if f".{ab}.{name}.weight" in key:
                value = what(p)
                if value is not None:
                    found[key.replace(f".{ab}.{name}.", f".{ab}.")] = value.detach().clone()
    return found
