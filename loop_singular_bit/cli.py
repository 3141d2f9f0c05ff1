"""The command `loop-singular-bit`: parses, calls the library, prints. One module per subcommand, `cli_<name>.py`.

Libraries load inside the subcommands: `compress` must stay small in memory and never imports Transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import (
    __version__,
    cli_benchmark,
    cli_chat,
    cli_compress,
    cli_environment,
    cli_evaluate,
    cli_generate,
    cli_inspect,
    cli_run_plan,
    cli_verify,
)
from .errors import CheckpointError, MemoryBudgetExceeded, OutputExistsError, QualityRefusedError

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "loop-singular-bit"

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_BAD_CHECKPOINT = 3
EXIT_MEMORY_BUDGET = 4
EXIT_QUALITY = 5
EXIT_INTERRUPTED = 130

_FILE_WIDTH = 160

_COMMANDS = {
    "compress": cli_compress,
    "inspect": cli_inspect,
    "verify": cli_verify,
    "evaluate": cli_evaluate,
    "benchmark": cli_benchmark,
    "generate": cli_generate,
    "chat": cli_chat,
    "run-plan": cli_run_plan,
    "env": cli_environment,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code: int = parsed.run(parsed)
            return code
    except KeyboardInterrupt:
        resumable = hasattr(parsed, "resume")
        return _fail(parsed, "interrupted" + "; continue with --resume" * resumable, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except MemoryBudgetExceeded as error:
        return _fail(parsed, str(error), EXIT_MEMORY_BUDGET)
    except QualityRefusedError as error:
        return _fail(parsed, str(error), EXIT_QUALITY)
    except CheckpointError as error:
        return _fail(parsed, str(error), EXIT_BAD_CHECKPOINT)
    except OutputExistsError as error:
        return _fail(parsed, str(error), EXIT_USAGE)
    except (OSError, ImportError) as error:
        return _fail(parsed, str(error), EXIT_FAILURE)
    except ValueError as error:
        return _fail(parsed, str(error), EXIT_USAGE)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compress language models to 1.2 to 4.5 bits per weight, check the result, and use it.",
        epilog="Exit codes: 0 done, 1 failure (disk, permissions, missing package), 2 wrong usage, 3 bad checkpoint, "
        "4 memory budget exceeded, 5 quality below the threshold, or a preset that needs --force.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, progress on stderr")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def make_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def _fail(parsed: argparse.Namespace, message: str, code: int) -> int:
    if getattr(parsed, "json", False):
        print_json({"error": message, "exit_code": code})
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)
