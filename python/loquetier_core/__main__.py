"""Command line of the package: `python -m loquetier_core [report [model folder] | demo | simulate] [--cmake-dir] [--version]`."""

import argparse
import sys

from . import DeviceError, Engine, Error, __version__, build_report, cmake_dir

# What the report divides a GPU's memory for when no model is named.
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def memory_report(model: str | None) -> str:
    """How an engine with default options divides the memory of GPU 0 (or, for a named model, of the default device)."""
    try:
        plan = Engine.plan_memory(model, device="auto") if model else Engine.plan_memory(LLAMA_8B, device="cuda:0")
    except DeviceError:
        return ""  # no GPU: the report has said so
    except Error as error:
        if model:
            raise
        return f"memory:    {error}\n"
    return f"memory of an engine with default options, {model or 'a model of the shape of Llama-3-8B'}\n{plan}"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m loquetier_core", description="Tools of loquetier-core.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--cmake-dir", action="store_true", help="print the folder of the CMake package and exit")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["report", "demo", "simulate"],
        default="report",
        help="report: what this build can do, and how an engine (for the model in a folder, if given) divides the device's "
        "memory (default); demo: serve and fine-tune a small model; simulate: size a deployment",
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cmake_dir:
        print(cmake_dir())
        return 0
    if options.command == "demo":
        from .demo import main as demo_main  # it imports more than a report needs

        return int(demo_main(options.rest) or 0)
    if options.command == "simulate":
        from .sizing.cli import main as simulate_main

        return simulate_main(options.rest)
    if len(options.rest) > 1:
        parser.error(f"report takes at most one argument, a model folder, got {' '.join(options.rest)}")
    print(build_report())
    try:
        memory = memory_report(options.rest[0] if options.rest else None)
    except Error as error:
        parser.error(str(error))
    if memory:
        print(memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
