"""The benchmark suite, as a package: the repository's folder benchmarks/, which installed lies beside this file."""

from __future__ import annotations

from ._folders import folder

__path__ = [folder(__file__)]
