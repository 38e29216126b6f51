"""Writes _native.pyi, the type stub of the extension in the folder given, with pybind11-stubgen. The build runs this.

A signature that cannot be expressed, or a name that is not defined, fails the build: a stub with holes would be worse than none.
"""

import os
import pathlib
import subprocess
import sys


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    command = [sys.executable, "-m", "pybind11_stubgen", "_native", "--output-dir", str(folder), "--exit-code"]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))  # pip's isolated build lives in PYTHONPATH
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode != 0:
        sys.exit(f"pybind11-stubgen failed:\n{done.stdout}{done.stderr}")
    stub = folder / "_native.pyi"
    text = stub.read_text()
    # Modules that only annotations name.
    needed = [
        m for m in ("collections.abc", "os", "typing", "numpy", "numpy.typing") if f"{m}." in text and f"import {m}\n" not in text
    ]
    lines = text.split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")) and "__future__" not in line)
    lines[at:at] = [f"import {m}" for m in needed]
    stub.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
