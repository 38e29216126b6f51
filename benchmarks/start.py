"""Time from the start of a process to its first token, for a checkpoint folder of Llama-3-8B shape on local storage.

    python benchmarks/start.py --folder /data/llama --out benchmarks/results/start_h200.json

A folder without a config.json is filled with random bf16 weights first (16 GB of safetensors in four files). Each measurement is a
new Python process: import, load, Engine on the device, an adapter, a prompt of 16 tokens, its first token. "Cold" means that the
files' pages were dropped from the page cache before (posix_fadvise); where the storage is another host's memory or cache that
cannot be told from here, so the rate at which the files can be read cold is measured too. Read next: model.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from model import SHAPES, weight_shapes

FILES = 4
FIRST_TOKEN = """
import sys, time
begin = float(sys.argv[1])
import loquetier_core as lq
marks = {"imported_s": time.time() - begin}
model = lq.BaseModel.load(sys.argv[2])
engine = lq.Engine(model, device=sys.argv[3])
marks["engine_s"] = time.time() - begin
engine.add_adapter("a", lq.LoraConfig(r=16, target_modules=["all-linear"]))
engine.submit_infer(list(range(3, 19)), adapter="a", sampling=lq.SamplingParams(max_tokens=1, temperature=0))
tokens = []
while not tokens:
    tokens = engine.step().tokens
marks["first_token_s"] = time.time() - begin
import json
print(json.dumps(marks))
"""


def make_checkpoint(folder: Path, config: dict) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shapes = list(weight_shapes(config).items())
    each = -(-len(shapes) // FILES)
    index = {}
    for i in range(FILES):
        name = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        part = {}
        for key, shape in shapes[i * each : (i + 1) * each]:
            values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
            part[key] = values.cpu() if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
            index[key] = name
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def drop_pages(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(folder: Path) -> float:
    """GB/s of a plain sequential read of the first file."""
    path = sorted(folder.glob("*.safetensors"))[0]
    buffer = bytearray(1 << 24)
    size, begin = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            size += n
    return size / (time.perf_counter() - begin) / 1e9


def first_token(folder: Path, device: str) -> dict:
    command = [sys.executable, "-c", FIRST_TOKEN, repr(time.time()), str(folder), device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a checkpoint, or where to make one")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="of the checkpoint that is made")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures: dict = {"shape": args.shape, "device": args.device}
    if not (args.folder / "config.json").exists():
        begin = time.perf_counter()
        make_checkpoint(args.folder, SHAPES[args.shape])
        figures["checkpoint_written_s"] = time.perf_counter() - begin
    figures["bytes"] = sum(p.stat().st_size for p in args.folder.glob("*.safetensors"))
    drop_pages(args.folder)
    figures["read_gbs"] = read_rate(args.folder)
    drop_pages(args.folder)
    figures["cold"] = first_token(args.folder, args.device)
    figures["warm"] = first_token(args.folder, args.device)
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
