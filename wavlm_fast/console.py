"""What the subcommands share in talking to their user: tables, JSON, dtypes and threads."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError
from .files import remove_unfinished, write_atomically

if TYPE_CHECKING:  # some commands run where rich is not installed
    from rich.console import Console
    from rich.table import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PLAIN_WIDTH = 120  # columns in a pipe or a log, whatever the terminal around it


def console() -> Console:
    """Standard output: colours and the terminal's width on a terminal, plain text of fixed width elsewhere."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_PLAIN_WIDTH, color_system=None, force_terminal=False)


def table(*columns: str, text: int = 1) -> Table:
    """A table whose first `text` columns are text, to the left, and whose others are numbers, to the right."""
    from rich import box
    from rich.table import Table

    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.MARKDOWN
    made = Table(box=style)
    for position, name in enumerate(columns):
        made.add_column(name, justify="left" if position < text else "right", no_wrap=True)
    return made


def print_table(out: Console, title: str, shown: Table) -> None:
    """A titled table; off a terminal without rich's blank lines and trailing blanks."""
    if title:
        out.print(f"[bold]{title}[/]")
    # Where there is too little room for it the lines wrap; rich would cut the numbers.
    width = out.width
    out.width = max(width, out.measure(shown, options=out.options.update(max_width=4 * _PLAIN_WIDTH)).maximum)
    if out.is_terminal:
        out.print(shown)
        out.width = width
        return
    with out.capture() as captured:
        out.print(shown)
    out.width = width
    lines = [line.rstrip() for line in captured.get().splitlines() if line.strip()]
    out.print("\n".join(lines) + "\n", markup=False, soft_wrap=True)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_json(target: str, value: Any) -> None:
    """Write JSON to a file, whole or not at all, or to standard output for "-".

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(finite(value), indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    write_file(Path(target), text, "JSON file")


def write_file(path: Path, text: str, kind: str) -> None:
    """Write a file, whole or not at all; a pipe or a device as far as it takes it.

    Raises:
        UserError: it cannot be written; the sentence calls it by its kind.
    """
    content = text.encode("utf-8", "backslashreplace")  # the name of a user's file may be no UTF-8
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe, /dev/stdout: nothing to put in its place
            path.write_bytes(content)
            return
        remove_unfinished(path.parent)
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"the {kind} {path} cannot be written: {error.strerror or error}") from error


def dtype_argument(text: str) -> str:
    """The argparse type of --dtype."""
    name = _ALIASES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"one of {', '.join(DTYPES)} is wanted, got {text!r}")
    return name


def positive_int(text: str) -> int:
    """The argparse type of counts."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, got {text!r}")
    return int(text)


def rounds(text: str) -> int:
    """The argparse type of --rounds."""
    value = positive_int(text)
    if value < 5:
        raise argparse.ArgumentTypeError(f"at least 5 rounds are wanted for a median, got {text}")
    return value


def positive(unit: str) -> Callable[[str], float]:
    """The argparse type of durations in seconds or minutes."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"a number of {unit} above 0 is wanted, got {text!r}")
        return value

    return convert


def device_argument(text: str) -> str:
    """The argparse type of --device: one that this machine has."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"cpu, cuda or cuda:N is wanted, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"cpu, cuda or cuda:N is wanted, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch sees no GPU on this machine, so {text!r} cannot be used")
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"this machine has {torch.cuda.device_count()} GPUs, got {text!r}")
    return text


def add_model_arguments(parser: argparse.ArgumentParser, many_dtypes: bool = False) -> None:
    """--model, --dtype, --device and --threads, the same for every subcommand; `many_dtypes` for one that runs all."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="a WavLM checkpoint: a local folder or a hub id such as microsoft/wavlm-base-plus "
        "(default: the size of WavLM-base with seeded weights that make every part of the model matter)",
    )
    names = ", ".join(DTYPES)
    if many_dtypes:
        parser.add_argument(
            "--dtype", type=dtype_argument, nargs="+", metavar="DTYPE", help=f"only these of: {names} (default: all)"
        )
    else:
        parser.add_argument(
            "--dtype", type=dtype_argument, default="float32", metavar="DTYPE", help=f"{names} (default: float32)"
        )
    parser.add_argument("--device", type=device_argument, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="torch's CPU threads (default: torch's own)")


def add_truncated_argument(parser: argparse.ArgumentParser) -> None:
    """--allow-truncated, for subcommands that read audio."""
    parser.add_argument(
        "--allow-truncated",
        action="store_true",
        help="take audio files that end before their header says so, or are damaged, as far as they go, and say so "
        "(default: they are refused)",
    )


def apply_threads(threads: int | None) -> None:
    """Honour --threads."""
    if threads is not None:
        torch.set_num_threads(threads)
