"""Command line of the package: `python -m loquetier_core [report | demo | simulate] [--cmake-dir] [--version]`."""

import argparse
import sys

from . import __version__, build_report, cmake_dir


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
        help="report: what this build can do (default); demo: serve and fine-tune a small model; simulate: size a deployment",
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
    if options.rest:
        parser.error(f"report takes no arguments, got {' '.join(options.rest)}")
    print(build_report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
