"""The command line, `wavlm-fast` and `python -m wavlm_fast`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from . import __version__
from ._signals import INTERRUPTED, TERMINATED, Terminated, raising
from .backends import BackendUnavailable, current
from .errors import UserError, show_everything

# Each is a module of this package with add_arguments(parser) and run(args) -> exit status, imported when asked for.
COMMANDS = {
    "demo": "run transformers' WavLM and ours on real speech: errors against float64, times, memory, what ran where",
    "doctor": "say what is installed, what this machine can do, and what will run where",
    "parity": "prove every op and every model class equal to transformers on this machine",
    "bench": "how much faster, how much memory, how equal: ours against transformers and other runtimes",
    "gpu": "what a GPU says of all this, measured within so many minutes: results, speed, and better configurations",
    "batches": "what becomes of an utterance that is padded into a batch: transformers, and ours in both modes",
    "extract": "write the hidden states of audio files",
    "convert": "take a WavLM from transformers, Microsoft's code or torchaudio to another of them, checked",
}
_USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of one subcommand filled in."""
    root = _Parser(prog="wavlm-fast", description="WavLM from transformers, unchanged for its users and much faster.")
    root.add_argument("--version", action="version", version=f"wavlm-fast {__version__}")
    subparsers = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        added = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            _module(name).add_arguments(added)
    return root


def _module(command: str) -> ModuleType:
    name = f"{__package__}.{command}"
    if importlib.util.find_spec(name) is None:
        raise UserError(f"the {command} command is not part of this installation: there is no module {name}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__:
            raise
        raise UserError(f"the {command} command needs the package {error.name}, which is not installed") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all is well, 1 when something that was checked is wrong, 2 after an error of the user's (one sentence on
        standard error), 130 after Ctrl-C, 143 after SIGTERM.
    """
    show_everything()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if a in COMMANDS), None)
    prog = f"wavlm-fast {command}" if command else "wavlm-fast"
    try:
        args = parser(command).parse_args(arguments, argparse.Namespace(arguments=arguments))
        current()  # a misspelt WAVLM_FAST_BACKEND is refused before anything is loaded
        module = _module(args.command)
        with raising():
            status = module.run(args)
            sys.stdout.flush()
        return status
    except (UserError, BackendUnavailable) as error:
        return _tell(prog, error)
    except ValueError as error:
        if str(error).startswith("the environment variable "):
            return _tell(prog, error)
        raise
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print(f"{prog}: terminated", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:  # the reader of a pipe had enough; keep Python from complaining about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _tell(prog: str, error: Exception) -> int:
    print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
    return _USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
