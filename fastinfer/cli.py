"""The command line, `fastinfer …`. Each command imports what it needs when it is run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastinfer

REQUIRED = ("torch", "transformers", "safetensors", "tokenizers", "tqdm")


def _run_doctor(args: argparse.Namespace) -> int:
    from fastinfer import doctor

    return doctor.main(as_json=args.json)


def _run_demo(args: argparse.Namespace) -> int:
    from fastinfer import demo

    return demo.main(args)


def _run_tune(args: argparse.Namespace) -> int:
    from fastinfer import tuning

    return tuning.main(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastinfer", description="Makes Hugging Face transformers models fast in place."
    )
    parser.add_argument("--version", action="version", version=f"fastinfer {fastinfer.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    doctor = commands.add_parser("doctor", help="what is installed, what runs where, what to do about what is missing")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.set_defaults(run=_run_doctor)

    demo = commands.add_parser("demo", help="a real model before and after patching: speed, size, quality")
    importlib.import_module("fastinfer.demo").add_arguments(demo)  # imports no torch
    demo.set_defaults(run=_run_demo)

    tune = commands.add_parser("tune", help="find the fastest way to run a model's matmuls on this GPU, for later runs")
    importlib.import_module("fastinfer.tuning").add_arguments(tune)  # imports no torch
    tune.set_defaults(run=_run_tune)
    return parser


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0: done, 1: done and not well (doctor, tune), 2: an error of the caller's making, in one line."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except ModuleNotFoundError as error:
        if args.traceback or error.name not in REQUIRED:
            raise
        print(f"fastinfer: {error.name} is not installed: pip install {error.name}", file=sys.stderr)
    except (OSError, ValueError) as error:  # fastinfer's own errors are ValueErrors
        if args.traceback:
            raise
        print(f"fastinfer: {_one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
