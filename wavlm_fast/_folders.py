"""Folders of the repository that are packages inside of this one. A module with a `__path__` is a package."""

from __future__ import annotations

from pathlib import Path


def folder(module: str) -> str:
    """Where the package of the name of the file `module` lies: beside it when installed, else beside `wavlm_fast/`."""
    installed = Path(module).with_suffix("")
    return str(installed if installed.is_dir() else installed.parent.parent / installed.name)
