"""A mistake in the source of a kernel or of a function that kernels call, for as long as a context lasts."""

import importlib
from contextlib import contextmanager

from triton.runtime.interpreter import InterpretedFunction


@contextmanager
def mutated(where, right, wrong):
    """Interpret `wrong` in the place of `right` in the function `where`, "file.function" of kernels/.

    Raises:
        ValueError: `right` does not occur exactly once: the mistake would be none, or another than meant.
    """
    file, name = where.split(".")
    function = getattr(importlib.import_module(f"wavlm_fast.kernels.{file}"), name)
    rewriter, rewritten = function.rewriter, InterpretedFunction.rewritten_fn
    prepare = rewriter._prepare_source

    def prepare_wrong(lines):
        source = prepare(lines)
        if source.count(right) != 1:
            raise ValueError(f"{right!r} occurs {source.count(right)} times in {where}")
        return source.replace(right, wrong)

    rewriter._prepare_source = prepare_wrong
    rewritten.pop(function.fn, None)
    try:
        function.rewrite()
        yield
    finally:
        del rewriter._prepare_source
        rewritten.pop(function.fn, None)
