"""One wheel under several versions of Python, torch and transformers, as a Markdown table: `make test-matrix`.

    python tests/matrix/matrix.py dist/wavlm_fast-*.whl [--only 'Python 3.10'] [--lowest-disk 20] [--markdown FILE]

Every row gets a virtual environment of its own with torch from the package index (on Linux a CUDA build of several GB,
where pip is not told otherwise), the wheel, and tests/matrix/smoke.py without a compiler on the path; then it is
deleted. Rows are chosen so that each version is met, and the oldest and the newest together; what a machine lacks is
left out, and the table says why. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
SMOKE = "tests/matrix/smoke.py"
# What else of the suite runs on the floor: every way of calling and compiling a model, but for what needs a compiler.
CALLS = (
    "tests/models/test_call_modes.py",
    "tests/models/test_compile_export.py",
    "--deselect=tests/models/test_compile_export.py::test_compile_by_inductor",
)
NEWEST = ""


@dataclass(frozen=True)
class Row:
    """An environment. With several versions of transformers, each takes the place of the one before."""

    python: str
    torch: str
    transformers: tuple[str, ...]
    tests: tuple[str, ...] = (SMOKE,)

    def __str__(self) -> str:
        return f"Python {self.python}, torch {self.torch or 'newest'}"


ROWS = (
    Row("3.11", "2.13.0", ("4.57.6", "5.23.0", NEWEST)),
    Row("3.10", "2.10.0", ("4.57.6", NEWEST), (SMOKE, *CALLS)),
    Row("3.13", NEWEST, ("4.57.6", "5.23.0", NEWEST)),
    Row("3.12", "2.10.0", (NEWEST,)),
    Row("3.14", NEWEST, (NEWEST,)),
    Row("3.14t", NEWEST, (NEWEST,)),
    Row("3.15", NEWEST, (NEWEST,)),
)


def main() -> int:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--only", default="", help="rows in whose name this is, as in 'Python 3.10, torch 2.10.0'")
    parser.add_argument("--lowest-disk", type=float, default=12, metavar="GB", help="a row is left out with less free")
    parser.add_argument("--markdown", type=Path, help="where to write the table, too")
    args = parser.parse_args()
    results = []
    for row in ROWS:
        if args.only in str(row):
            results += run(row, args.wheel.resolve(), args.lowest_disk)
    lines = ["| Python | torch | transformers | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(result)} |" for result in results]
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    return int(any(result[-1].startswith("FAILED") for result in results))


def run(row: Row, wheel: Path, lowest_disk: float) -> list[tuple[str, str, str, str]]:
    """The lines of a row: one for each version of transformers, or one that says why there is none."""
    wanted = (row.python, row.torch or "newest", ", ".join(version or "newest" for version in row.transformers))
    python = interpreter(row.python)
    if python is None:
        return [(*wanted, f"left out: no Python {row.python} on this machine")]
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < lowest_disk:
        return [(*wanted, f"left out: {free:.0f} GB of disk are free, {lowest_disk:.0f} GB are wanted")]
    with tempfile.TemporaryDirectory(prefix="wavlm-fast-matrix-") as folder:
        environment = Environment(Path(folder))
        print(f"{row}: {folder}", flush=True)
        try:
            environment.create(python)
            environment.install(pinned("torch", row.torch), "numpy", "pytest")
            environment.keep("torch")
        except subprocess.CalledProcessError as error:
            return [(*wanted, f"left out: not to be installed, {last_line(error)}")]
        return [environment.smoke(wheel, version, row.tests) for version in row.transformers]


class Environment:
    """A virtual environment in a folder, with a copy of the tests but not of the package beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.constraints = folder / "constraints.txt"

    def create(self, python: str) -> None:
        """Set it up; it knows no compiler."""
        call([python, "-m", "venv", str(self.folder / "venv")])
        shutil.copytree(TESTS, self.folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(TESTS.parent / "pyproject.toml", self.folder)
        self.constraints.touch()

    def install(self, *what: str) -> None:
        """Install, without constraints of the machine's and with what `keep` has named."""
        options = ("-q", "--no-cache-dir", "--upgrade", "--upgrade-strategy=only-if-needed")
        self.python("-m", "pip", "install", *options, *what, PIP_CONSTRAINT=str(self.constraints))

    def keep(self, package: str) -> None:
        """Let nothing that is installed from now on change the version of this package."""
        self.constraints.write_text(f"{package}=={self.version(package)}\n")

    def smoke(self, wheel: Path, transformers: str, tests: tuple[str, ...]) -> tuple[str, str, str, str]:
        """Install the wheel beside a version of transformers, and run the tests."""
        started = time.monotonic()
        try:
            self.install(pinned("transformers", transformers), str(wheel))
            self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests/models", *tests)
            said = f"passed, {time.monotonic() - started:.0f} s"
        except subprocess.CalledProcessError as error:
            print(error.stdout, flush=True)
            said = f"FAILED: {last_line(error)}"
        line = (*(self.version(name) for name in ("python", "torch", "transformers")), said)
        print(" ".join(line), flush=True)
        return line

    def version(self, package: str) -> str:
        """The version of a package, or of Python, in there."""
        ask = "import platform, importlib.metadata as m, sys; p = sys.argv[1]; "
        ask += "print(platform.python_version() if p == 'python' else m.version(p))"
        return self.python("-c", ask, package).strip()

    def python(self, *arguments: str, **variables: str) -> str:
        """Run its Python, with nothing on the path but its own commands."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment = {**kept, "PATH": str(self.bin), "OMP_NUM_THREADS": "2", **variables}
        return call([str(self.bin / "python"), *arguments], cwd=self.folder, env=environment)


def pinned(name: str, version: str) -> str:
    """A requirement of this version, or of any."""
    return f"{name}=={version}" if version else name


def call(command: list[str], **options: object) -> str:
    """Run a command; what it prints."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, **options
    ).stdout


def last_line(error: subprocess.CalledProcessError) -> str:
    """The last thing that a command said."""
    lines = error.stdout.strip().splitlines()
    return lines[-1].replace("|", "/")[:160] if lines else f"status {error.returncode}"


def interpreter(version: str) -> str | None:
    """A Python of this version that starts and has venv: on the path, or of pyenv's."""
    pyenv = os.path.expanduser(f"~/.pyenv/versions/{version.removesuffix('t')}.*/bin/python{version}")
    for python in (f"python{version}", *sorted(glob.glob(pyenv))):
        try:
            found = call([python, "-c", "import venv, ensurepip, sys; print(sys.executable)"])
        except (OSError, subprocess.CalledProcessError):
            continue
        return found.strip()
    return None


if __name__ == "__main__":
    sys.exit(main())
