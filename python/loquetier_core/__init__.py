"""Serve many LoRA adapters over one shared base model and fine-tune LoRA adapters at the same time, in the same batch.

    import loquetier_core as lq

    engine = lq.Engine("path/to/hf-model")
    engine.add_adapter("support", "path/to/peft-folder")
    request = engine.submit_infer(prompt_ids, adapter="support", sampling=lq.SamplingParams(max_tokens=64))
    job = engine.submit_train("support", examples, optimizer=lq.AdamW(lr=1e-4))
    while engine.has_work():
        result = engine.step()

The classes are those of the C++ API (loquetier/engine.h, options.h, error.h), name by name. AsyncEngine (aio.py) drives an engine
from asyncio. `python -m loquetier_core` tells what this build can do.
"""

from pathlib import Path

from ._native import (
    AdamW,
    AdapterInfo,
    BaseModel,
    DeviceError,
    Engine,
    EngineStats,
    Error,
    EvalResult,
    Example,
    FormatError,
    InferResult,
    InvalidArgument,
    LatencyTarget,
    LoraConfig,
    MemoryPlan,
    NotFound,
    OutOfMemory,
    QueueFull,
    SamplingParams,
    StepResult,
    TokenEvent,
    TokenLogprob,
    TrainResult,
    __version__,
    build_report,
)
from .aio import AsyncEngine

__all__ = [
    "AdamW",
    "AdapterInfo",
    "AsyncEngine",
    "BaseModel",
    "DeviceError",
    "Engine",
    "EngineStats",
    "Error",
    "EvalResult",
    "Example",
    "FormatError",
    "InferResult",
    "InvalidArgument",
    "LatencyTarget",
    "LoraConfig",
    "MemoryPlan",
    "NotFound",
    "OutOfMemory",
    "QueueFull",
    "SamplingParams",
    "StepResult",
    "TokenEvent",
    "TokenLogprob",
    "TrainResult",
    "__version__",
    "build_report",
    "cmake_dir",
]


def cmake_dir() -> Path:
    """The folder of the CMake package, for -Dloquetier_DIR=: find_package(loquetier CONFIG) then finds what pip installed."""
    return Path(__file__).resolve().parent / "lib" / "cmake" / "loquetier"


# Messages and pickles name the classes as users import them.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").endswith("_native"):
        globals()[_name].__module__ = __name__
del _name
