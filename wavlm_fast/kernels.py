"""The Triton kernels, as a package.

Installed, they lie in the folder beside this file. In a checkout they lie in the repository's folder kernels/, which
must not be importable by its own name: that name belongs to another package. A module with a `__path__` is a package.
"""

from __future__ import annotations

from pathlib import Path

_installed = Path(__file__).with_suffix("")
__path__ = [str(_installed if _installed.is_dir() else _installed.parent.parent / "kernels")]
