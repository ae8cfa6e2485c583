"""Runs the blocks of one page, in a process of its own and in its folder."""

from __future__ import annotations

import subprocess
import sys
import traceback
import types
from pathlib import Path

from doc_blocks import Block, blocks, named, shell_lines

_SHELL_LIMIT = 60  # seconds for a block
# A shell that ends with another status than 0 says at which line of the page it was.
_PROLOGUE = """set -e
trap '_status=$?; [ $_status = 0 ] || echo "{page}:$_at: ended with status $_status" >&2' EXIT
"""


def run(page: str) -> int:
    """Run all blocks of the page in order; 0 when none failed, else 1 and what failed on standard error."""
    path = Path(page)
    namespace = types.ModuleType("__main__")  # where pickle finds what the page defines
    sys.modules["__main__"] = namespace
    sys.argv = [page]
    for block in blocks(path):
        if block.not_run is not None:
            continue
        if block.kind == "python":
            if not _python(block, path, namespace.__dict__):
                return 1
        elif not _shell(block, path):
            return 1
    return 0


def _python(block: Block, page: Path, namespace: dict) -> bool:
    try:
        # Lines are counted as the page counts them, so that tracebacks show its lines.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
    except SystemExit as ended:
        if ended.code in (None, 0):
            return True
        print(f"{named(page)}:{block.line}: the block ended Python with {ended.code!r}", file=sys.stderr)
        return False
    except BaseException as error:
        inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
        line = inside[-1].lineno if inside else getattr(error, "lineno", None) or block.line
        shown = error.__traceback__ and error.__traceback__.tb_next  # without the line above that runs it
        print("".join(traceback.format_exception(type(error), error, shown)), file=sys.stderr)
        print(f"{named(page)}:{line}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def script(block: Block, page: str) -> str:
    """The shell script of a block, without what is only looked at."""
    run = [line for line in shell_lines(block) if not line.left_out]
    return _PROLOGUE.format(page=page) + "".join(f"_at={line.number}\n{line.text}\n" for line in run)


def _shell(block: Block, page: Path) -> bool:
    sys.stdout.flush()
    command = ["sh", "-c", script(block, named(page))]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_SHELL_LIMIT).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{named(page)}:{block.line}: the block took more than {_SHELL_LIMIT} s", file=sys.stderr)
        return False
