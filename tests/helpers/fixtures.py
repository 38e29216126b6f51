"""Fixtures of the tests that run a model: the device, the bench of one family (model, adapters, folders, oracle) and engines over
it.

A test module names this file in `pytest_plugins`. Read next: models.py, adapters.py, oracle.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import loquetier_core as lq
import pytest
import torch

from helpers import adapters, models
from helpers.oracle import Oracle

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """The backends; a test that takes it runs on every one that is there."""
    if request.param == "cuda":
        try:
            lq.Engine(models.FAMILIES["llama31"]().to_dict(), device="cuda", kv_cache_tokens=64, adapter_pool_bytes=1 << 20)
        except lq.DeviceError as error:
            pytest.skip(str(error))
    return request.param


@dataclass
class Bench:
    """One tiny model with its adapters, on disk and in the oracle."""

    family: str
    folder: Path
    adapter_folders: dict[str, Path]
    oracle: Oracle
    vocab_size: int

    def engine(self, names=(), **options):
        """An engine over the model with these PEFT adapters. Small limits by default, so that it costs little memory."""
        options = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "max_batch_tokens": 1024, **options}
        engine = lq.Engine(self.folder, **options)
        for name in names:
            engine.add_adapter(name, self.adapter_folders[name])
        return engine


@pytest.fixture(scope="session")
def benches(tmp_path_factory):
    """benches(family) makes a bench once per session."""
    made: dict[str, Bench] = {}

    def get(family: str) -> Bench:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            model = models.make_model(family)
            folder = models.save_model(model, root / "model")
            tuned = adapters.attach(model)
            folders = adapters.save(tuned, root / "adapters")
            made[family] = Bench(family, folder, folders, Oracle(tuned), model.config.vocab_size)
        return made[family]

    return get


@pytest.fixture
def bench(benches) -> Bench:
    """The default bench: a tiny Llama 3.1 with grouped-query attention."""
    return benches("llama31")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """The oracle is tiny: more threads only get in each other's way."""
    torch.set_num_threads(1)
