"""The `effdet-fast` command: finds the subcommand, imports only that one, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from effdet_fast.cpu_tuning import tune_cpu
from effdet_fast.version import __version__

COMMANDS = {
    "train": "train a detector on COCO-format data",
    "eval": "COCO metrics of a checkpoint on COCO-format data",
    "predict": "detections and pictures with boxes for images",
    "convert": "a checkpoint under another project's names",
    "export": "a checkpoint as an ONNX file or a program of torch.export",
    "summary": "parameters, multiply-adds, activations and anchors of a model",
    "doctor": "what is installed, what was built, and whether each op works",
}
USER_ERRORS = (ValueError, TypeError, OSError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints the whole usage before it."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 for a run that failed; 2 for wrong input; 128 + signal for an interrupted run.
    """
    tune_cpu()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(next((word for word in arguments if word in COMMANDS), None))
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    warnings.showwarning = _one_line_warning
    try:
        return _module(options.command).run(options)
    except KeyboardInterrupt:
        return _report(130, "interrupted", options.command)
    except Exception as error:
        told = None if options.traceback else _told(error)
        if told is None:
            raise
        return _report(*told, options.command)


def _told(error: Exception) -> tuple[int, str] | None:
    """Exit status and message; None for a defect, which keeps its traceback."""
    if isinstance(error, USER_ERRORS):
        return 2, f"error: {_own_words(error)}"
    if isinstance(error, MemoryError):
        return 1, "failed: out of memory"
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported here
        return 1, "failed: out of GPU memory; start anew with a smaller --batch-size or --image-size, or --amp bf16"
    # Only the failures this package names itself.
    if isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] == "effdet_fast":
        return 1, f"failed: {error}"
    return None


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the named command's module is imported, so that --help is instant."""
    parser = _Parser(prog="effdet-fast", description="Train, evaluate and run detectors on fast, exact operators.")
    parser.add_argument("--version", action="version", version=f"effdet-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == command:
            _module(name).add_arguments(subparser)
        subparser.add_argument("--traceback", action="store_true", default=False, help="show where an error came from")
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"effdet_fast.cli.{command}_command")


def _own_words(error: Exception) -> str:
    """The error's message; of one that PyTorch passes on from a data-loading process, without the traceback round it."""
    message = str(error)
    if "Original Traceback" not in message:
        return message
    return message.strip().rpartition(f"\n{type(error).__name__}: ")[2]


def _report(status: int, message: str, command: str) -> int:
    message = message.replace(f"error: {command}: ", "error: ", 1)  # the command's name is there already
    rank = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"effdet-fast {command}{rank}: {message}", file=sys.stderr, flush=True)
    return status


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"effdet-fast: warning: {message}", file=file or sys.stderr)
