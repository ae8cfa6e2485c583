"""The Triton kernels, as a package: the repository's folder kernels/, which installed lies beside this file.

The folder must not be importable by its own name: that name belongs to another package.
"""

from __future__ import annotations

from ._folders import folder

__path__ = [folder(__file__)]
