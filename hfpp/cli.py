"""The command line: finds the command, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from hfpp.commands import check, plan, profile, show, train
from hfpp.errors import PipelineConfigError
from hfpp.train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

__all__ = ["main"]

# What the shell is told; argparse itself ends with 2 for options that it cannot read.
_FAILED, _BAD_OPTIONS, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    A script that calls this does so under `if __name__ == "__main__":`: the processes of a run
    import the script.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 for a run that failed, or a model whose pipeline is not exact; 2 for
        options that cannot work, such as the path of a file that is not there; 3 for a model that
        is refused; 130 for Ctrl-C.
    """
    given = _parser().parse_args(arguments)
    command: str = given.command
    try:
        code: int = _COMMANDS[command].run(given)
        return code
    except KeyboardInterrupt:
        return _end(command, _INTERRUPTED, "interrupted")
    except (PipelineConfigError, FileNotFoundError, OverflowError) as error:
        # Missing files are those that the caller named; sizes overflow that are beyond the core's.
        return _end(command, _BAD_OPTIONS, f"error: {error}")
    except (TrainingError, OSError) as error:  # such as a full disk
        return _end(command, _FAILED, f"error: {error}")


_COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "check": check,
    "profile": profile,
    "plan": plan,
    "show": show,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfpp",
        description="Pipeline parallelism for Hugging Face models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    for command in _COMMANDS.values():
        command.add_to(commands)
    return parser


def _end(command: str, code: int, message: str) -> int:
    sys.stderr.write(f"hfpp {command}: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
