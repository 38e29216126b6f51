"""What is sized: a model, a device, and how the device's memory is shared out. Numbers only; nothing is loaded.

Device rates are measured ones (see benchmarks/results and the README), not those of a data sheet. Read next: cli.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from .. import _native

GIB = float(1 << 30)


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, **more,
    }  # fmt: skip


MODELS = {  # shapes of public models
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256, head_dim=128),
    "llama-3-70b": llama(8192, 28672, 80, 64, 8, 128256, head_dim=128),
    "mistral-7b": llama(4096, 14336, 32, 32, 8, 32768, head_dim=128),
    "qwen2.5-7b": llama(3584, 18944, 28, 28, 4, 152064, head_dim=128),
    "qwen3-8b": llama(4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "100m": llama(768, 2048, 12, 12, 4, 32000, head_dim=64, tie_word_embeddings=True),
}


@dataclasses.dataclass(frozen=True)
class Device:
    bytes_per_second: float
    flops_per_second: float
    launch_seconds: float  # of a layer
    step_seconds: float
    memory: float  # bytes
    dtype: str


DEVICES = {
    "h100": Device(2.55e12, 7.0e14, 2e-5, 1e-4, 79 * GIB, "bf16"),
    "h200": Device(4.1e12, 7.2e14, 2e-5, 1e-4, 140 * GIB, "bf16"),
    "cpu": Device(2e10, 2.1e11, 5e-6, 5e-5, 16 * GIB, "f32"),  # two Zen 4 cores
}
RESIDENT = 64  # adapters that the pool has room for, when there are so many
STATE_BYTES = 16.0  # of a trained parameter: master, gradient, two moments, f32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("deployment")
    group.add_argument(
        "--model", default="llama-3-8b", help=f"{', '.join(MODELS)}, or a folder with a config.json (default: %(default)s)"
    )
    group.add_argument("--device", choices=DEVICES, default="h100", help="its measured rates (default: %(default)s)")
    group.add_argument("--bytes-per-second", type=float, help="of memory, instead of the device's")
    group.add_argument("--flops-per-second", type=float, help="of products, instead of the device's")
    group.add_argument("--memory-gib", type=float, help="instead of the device's")
    group.add_argument("--cost-model", type=Path, help="text of a cost model that an engine has learned, instead of the rates")
    group.add_argument("--ttft-ms", type=float, default=1000.0, help="target of the first token (default: %(default)g)")
    group.add_argument("--tpot-ms", type=float, default=50.0, help="target of the time per token after it (default: %(default)g)")
    group.add_argument("--no-target", action="store_true", help="throughput mode: training is not pre-empted")
    group.add_argument("--max-batch-tokens", type=int, default=8192, help="rows of one step (default: %(default)s)")
    group.add_argument("--max-sequences", type=int, default=256, help="running requests (default: %(default)s)")
    group.add_argument("--kv-tokens", type=int, help="of the KV pool, instead of what the memory leaves")
    group.add_argument("--max-queue", type=int, default=100000, help="waiting requests; more are refused (default: %(default)s)")
    group.add_argument(
        "--reject-late", action="store_true", help="requests that cannot meet their first token any more are rejected"
    )


@dataclasses.dataclass(frozen=True)
class Deployment:
    config: dict[str, Any]
    device: Device
    options: argparse.Namespace
    sizes: dict[str, float]
    pool_bytes: float
    kv_tokens: int
    memory: dict[str, float]  # bytes by what they are for

    def simulate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of _native.simulate that say what runs, and where."""
        o, d = self.options, self.device
        return {
            "config": self.config, "dtype": d.dtype, "bytes_per_second": d.bytes_per_second, "flops_per_second": d.flops_per_second,
            "launch_seconds": d.launch_seconds, "step_seconds": d.step_seconds,
            "cost_model": o.cost_model.read_text().strip() if o.cost_model else "",
            "goal": None if o.no_target else (o.ttft_ms / 1e3, o.tpot_ms / 1e3), "max_batch_tokens": o.max_batch_tokens,
            "max_sequences": o.max_sequences, "kv_tokens": self.kv_tokens, "adapter_pool_bytes": int(self.pool_bytes),
            "max_queue": o.max_queue, "reject_late": o.reject_late,
        }  # fmt: skip


def load_config(model: str) -> dict[str, Any]:
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"[simulate] model: expected one of {', '.join(MODELS)}, or a folder with a config.json, got {model!r}")
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"[simulate] {file}: expected an object, got {type(config).__name__}")
    return config


def make_deployment(options: argparse.Namespace, adapters: int, trainers: int, rank: int) -> Deployment:
    """Shares out the memory: weights, adapters, training, and KV pages from what is left. Raises ValueError when nothing is."""
    for name in (
        "bytes_per_second",
        "flops_per_second",
        "memory_gib",
        "ttft_ms",
        "tpot_ms",
        "max_batch_tokens",
        "max_sequences",
        "kv_tokens",
    ):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"[simulate] {name}: expected > 0, got {value}")
    known = DEVICES[options.device]
    device = dataclasses.replace(
        known,
        bytes_per_second=options.bytes_per_second or known.bytes_per_second,
        flops_per_second=options.flops_per_second or known.flops_per_second,
        memory=options.memory_gib * GIB if options.memory_gib else known.memory,
    )
    config = load_config(options.model)
    sizes: dict[str, float] = _native.model_sizes(config, dtype=device.dtype, rank=rank)
    pool = 1.1 * sizes["adapter_bytes"] * max(1, min(adapters, RESIDENT) + trainers)
    memory = {"weights": sizes["weight_bytes"], "adapters": pool}
    if trainers:
        memory["training state"] = trainers * STATE_BYTES * sizes["adapter_parameters"]
        memory["training rows"] = options.max_batch_tokens * sizes["training_row_bytes"]
    left = 0.9 * device.memory - sum(memory.values())
    tokens = options.kv_tokens or int(left // sizes["kv_token_bytes"])
    memory["KV pages"] = tokens * sizes["kv_token_bytes"]
    if tokens < 16 or sum(memory.values()) > device.memory:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items() if size > 0)
        raise ValueError(f"[simulate] memory: expected to fit {device.memory / GIB:.1f} GiB, got GiB of {parts}")
    return Deployment(config, device, options, sizes, pool, tokens, memory)
