"""The C++ tests: built once per session with the project's own CMake, then each executable runs as one test here.

LOQUETIER_CPP_BUILD names a finished build folder to use instead (a sanitizer build, for example).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP = ROOT / "tests" / "cpp"
NEEDS_CUDA = {"cuda_engine_tests", "fused_schedule_tests"}  # a GPU, or a build with the CUDA library
TESTS = sorted({path.stem for path in CPP.glob("*_tests.cpp")} - NEEDS_CUDA)
FUZZ = sorted(path.stem for path in (CPP / "fuzz").glob("fuzz_*.cpp"))


def tool(name: str) -> str:
    """A program of this interpreter's environment, else of the PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert found, f"{name} is missing: pip install '.[test]'"
    return found


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> Path:
    given = os.environ.get("LOQUETIER_CPP_BUILD")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("cpp-build")
    configure = [
        tool("cmake"),
        "-S",
        ROOT,
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DLOQUETIER_TESTS=ON",
        "-DLOQUETIER_FUZZ=ON",
        "-DLOQUETIER_CUDA=OFF",
        "-DLOQUETIER_WERROR=ON",
    ]
    for command in (configure, [tool("cmake"), "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-8000:]}"
    return folder


@pytest.mark.parametrize("name", TESTS)
def test_executable(build, name):
    done = subprocess.run([build / "tests" / "cpp" / name], capture_output=True, text=True, timeout=900)
    print(done.stdout[-4000:])
    assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-8000:]}"
    closing = re.search(r"^(\d+) passed, (\d+) failed$", done.stdout.strip().splitlines()[-1])
    assert closing and int(closing[1]) > 0 and int(closing[2]) == 0


@pytest.mark.parametrize("name", FUZZ)
def test_fuzz_corpus(build, name):
    """Every file of the seed corpus, and damaged copies of each, through a parser's fuzz target."""
    corpus = CPP / "fuzz" / "corpus" / name.removeprefix("fuzz_")
    assert any(corpus.iterdir())
    done = subprocess.run(
        [build / "tests" / "cpp" / name, corpus, "--mutations", "200", "--seed", "1"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-8000:]}"


def test_every_file_is_built():
    """The lists in CMakeLists.txt name every source there is: a forgotten test would pass by not running."""
    listed = (
        (ROOT / "CMakeLists.txt").read_text()
        + (CPP / "CMakeLists.txt").read_text()
        + (ROOT / "bindings" / "CMakeLists.txt").read_text()
    )
    listed += "".join(path.read_text() for path in (ROOT / "third_party").glob("*.cmake"))
    sources = [
        *(ROOT / "cpp").rglob("*.cpp"),
        *(ROOT / "cuda").rglob("*.cpp"),
        *(ROOT / "cuda").rglob("*.cu"),
        *(ROOT / "bindings").glob("*.cpp"),
    ]
    words = set(re.split(r"[^\w.]+", listed))
    missing = [str(path.relative_to(ROOT)) for path in sources if not {path.name, path.stem} & words]
    missing += [name for name in TESTS if name not in words]
    missing += [name for name in FUZZ if name.removeprefix("fuzz_") not in words]
    assert not missing
