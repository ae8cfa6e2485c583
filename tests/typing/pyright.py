"""pyright on usage.py and wrong.py, and whether it knows the type of everything that users import (make lint-types).

    python tests/typing/pyright.py .venv/bin/python

The argument is a Python that has torch and transformers. basedpyright is pyright with all that it needs inside of its
wheel; its own additional rules are off.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checked import FILES, ROOT, wanted

USAGE, WRONG = FILES
# Of these all types are to be known. Those of attributes set in a constructor are, where pyright infers them.
PUBLIC = (
    "audio", "backends", "cache", "errors", "extraction.extractor", "extraction.wanted", "graphed", "models",
    "original", "padding", "ragged", "report", "swap", "truncated",
)  # fmt: skip


def environment(python: str, folder: str) -> dict[str, str]:
    """Variables under which pyright finds this package as an installed one, beside the packages of a Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(Path(folder).glob("lib/python*/site-packages"))
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    theirs = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    packages.joinpath("found.pth").write_text(f"{ROOT}\n{theirs}\n")
    return {**os.environ, "VIRTUAL_ENV": folder, "PATH": f"{folder}/bin:{os.environ['PATH']}"}


def said(variables: dict[str, str], *arguments: str) -> dict:
    """What pyright says."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    try:
        return json.loads(run.stdout)
    except ValueError:
        sys.exit(f"basedpyright failed: {run.stdout}{run.stderr}")


def wrong_types(variables: dict[str, str], project: Path) -> list[str]:
    """Sentences about usage.py and wrong.py."""
    project.write_text(json.dumps({"include": [str(file) for file in FILES], "typeCheckingMode": "standard"}))
    errors = [d for d in said(variables, "-p", str(project))["generalDiagnostics"] if d["severity"] == "error"]
    lines = {d["range"]["start"]["line"] + 1 for d in errors if Path(d["file"]) == WRONG}
    found = [
        f"{USAGE.name}:{d['range']['start']['line'] + 1}: {d['message']}" for d in errors if Path(d["file"]) == USAGE
    ]
    found += [f"{WRONG.name}:{line}: not refused" for line in sorted(set(wanted()) - lines)]
    return found + [f"{WRONG.name}:{line}: refused" for line in sorted(lines - set(wanted()))]


def unknown_types(variables: dict[str, str]) -> list[str]:
    """Sentences about symbols of what users import."""
    report = said(variables, "--ignoreexternal", "--verifytypes", "wavlm_fast")
    symbols = report["typeCompleteness"]["symbols"]
    modules = tuple(f"wavlm_fast.{name}" for name in PUBLIC)
    public = [s for s in symbols if s["name"].startswith(modules) or s["name"].count(".") == 1]
    if len(public) < 100:
        return [f"only {len(public)} public symbols were found"]
    return [
        f"{s['name']}: {d['message']}"
        for s in public
        if not s["isTypeKnown"] and not s["isTypeAmbiguous"]
        for d in s["diagnostics"]
    ]


def main() -> None:
    """Exit with all sentences, if there are any."""
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(sys.argv[1], folder)
        found = wrong_types(variables, Path(folder, "pyrightconfig.json")) + unknown_types(variables)
    print("\n".join([*found, f"pyright: {len(found)} faults"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
