"""`wavlm-fast bench`: the suite of the folder benchmarks/, which is installed as `wavlm_fast.benchmarks`."""

from .benchmarks.run.suite import add_arguments, run

__all__ = ["add_arguments", "run"]
