"""The package as a user meets it: what is installed, import time, types, command line, and a C++ program over it."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import loquetier_core as lq
import pytest
from test_cpp import tool

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(lq.__file__).resolve().parent
pytest_plugins = ["helpers.fixtures"]


def python(*arguments, **options):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done


def test_installed_files():
    expected = [
        "_native.pyi",
        "py.typed",
        "include/loquetier/engine.h",
        "include/loquetier/options.h",
        "include/loquetier/base_model.h",
        "include/loquetier/error.h",
        "lib/libloquetier.so",
        "lib/cmake/loquetier/loquetier-config.cmake",
        "lib/cmake/loquetier/loquetier-config-version.cmake",
        "lib/cmake/loquetier/loquetier-targets.cmake",
    ]
    assert [name for name in expected if not (PACKAGE / name).is_file()] == []
    assert len(list(PACKAGE.glob("_native*.so"))) == 1
    installed = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file()}
    assert not [name for name in installed if name.endswith((".cpp", ".cu")) or name.startswith("tests/")]


def test_version_and_dependencies():
    assert importlib.metadata.version("loquetier-core") == lq.__version__
    runtime = [r for r in importlib.metadata.requires("loquetier-core") if "extra ==" not in r]
    assert [r for r in runtime if not r.startswith("numpy")] == []


def test_import_is_light():
    """Under 0.3 s beyond numpy, without torch: the best of five, so that a busy machine does not decide."""
    code = (
        "import time, numpy; t = time.perf_counter(); import loquetier_core; print(time.perf_counter() - t); "
        "import sys; assert 'torch' not in sys.modules"
    )
    seconds = min(float(python("-c", code, cwd="/").stdout) for _ in range(5))
    assert seconds < 0.3


def test_stub_is_checked(tmp_path):
    """The API as users write it passes a strict type check; wrong uses do not."""
    script = tmp_path / "user.py"
    script.write_text("""
import loquetier_core as lq

engine = lq.Engine("model", device="cpu", max_batch_tokens=512, kv_cache_tokens=None)
engine.add_adapter("support", "folder")
engine.add_adapter("legal", lq.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", rank_pattern={"q_proj": 4}))
request: int = engine.submit_infer([1, 2, 3], adapter="support", sampling=lq.SamplingParams(max_tokens=64, stop_token_ids=[7]))
job: int = engine.submit_train(
    "legal",
    [lq.Example([1, 2, 3], labels=[-100, 2, 3]), {"input_ids": [1, 2]}, [1, 2]],
    optimizer=lq.AdamW(1e-4),
)
engine.submit_eval(None, [[1, 2, 3]])
while engine.has_work():
    result = engine.step()
    for event in result.tokens:
        token: int = event.token_id
        reason: str | None = event.finish_reason
    for trained in result.trained:
        loss: float = trained.loss
for key, array in engine.adapter_state("legal", "master").items():
    total = float(array.sum())
steps: int = engine.stats().steps


async def serve() -> None:
    async with lq.AsyncEngine(engine) as aio:
        async for event in aio.stream([1, 2], adapter="support"):
            print(event.adapter)
        print((await aio.train("legal", [[1, 2]], optimizer=lq.AdamW(lr=1e-4))).loss)
""")
    # In another folder, so that the installed package is what mypy sees.
    python("-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", script, cwd=tmp_path)
    script.write_text('import loquetier_core as lq\nlq.SamplingParams(temprature=1)\nx: str = lq.Engine("m").submit_infer([1])\n')
    wrong = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert "temprature" in wrong.stdout and "Found 2 errors" in wrong.stdout


def test_every_public_name_is_documented():
    undocumented = [name for name in lq.__all__ if not name.startswith("__") and not getattr(lq, name).__doc__]
    undocumented += [
        f"Engine.{name}" for name in vars(lq.Engine) if not name.startswith("_") and not getattr(lq.Engine, name).__doc__
    ]
    assert undocumented == []
    assert {getattr(lq, name).__module__ for name in lq.__all__ if isinstance(getattr(lq, name), type)} == {
        "loquetier_core",
        "loquetier_core.aio",
    }


def test_command_line():
    assert python("-m", "loquetier_core", "--version").stdout.strip() == lq.__version__
    assert python("-m", "loquetier_core", "--cmake-dir").stdout.strip() == str(PACKAGE / "lib" / "cmake" / "loquetier")
    report = python("-m", "loquetier_core").stdout
    assert lq.__version__ in report and "cuda" in report
    wrong = subprocess.run([sys.executable, "-m", "loquetier_core", "dance"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "dance" in wrong.stderr


@pytest.mark.parametrize("where", ["wheel", "prefix"])
def test_cpp_consumer(where, bench, tmp_path):
    """examples/cpp, built against the installed wheel and against a plain CMake install of it, serves and trains."""
    if where == "wheel":
        package = lq.cmake_dir()
    else:  # what `cmake --install` writes has the same layout; a moved copy proves that no path is baked in
        for part in ("lib", "include"):
            python("-c", f"import shutil; shutil.copytree({str(PACKAGE / part)!r}, {str(tmp_path / 'prefix' / part)!r})")
        package = tmp_path / "prefix" / "lib" / "cmake" / "loquetier"
    build = tmp_path / "build"
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(tool("ninja")).parent), os.environ["PATH"]])}
    for command in (
        [tool("cmake"), "-S", ROOT / "examples" / "cpp", "-B", build, "-G", "Ninja", f"-Dloquetier_DIR={package}"],
        [tool("cmake"), "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
    name = next(iter(bench.adapter_folders))
    done = subprocess.run(
        [build / "serve_and_train", bench.folder, bench.adapter_folders[name], "8"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "8 updates, loss" in done.stdout and "(served):" in done.stdout and "(base):" in done.stdout
    refused = subprocess.run(
        [build / "serve_and_train", tmp_path / "nothing", bench.adapter_folders[name]], capture_output=True, text=True
    )
    assert refused.returncode == 1 and "nothing" in refused.stderr
