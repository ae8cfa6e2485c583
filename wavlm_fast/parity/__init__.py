"""The parity harness: is a fast path as right as the plain one?

For op and model alike, in every dtype: err(x) = max|x - truth|, the truth being computed in float64. A fast path passes
if err(fast) <= 2 · err(plain path in the same dtype) + tiny; gradients by the same rule.

Ops (`run_ops`): the truth is the op's definition written out in sums and products (`definitions`), the plain path the
calls that transformers would make (`plain`), the inputs are those of `cases`, and every backend is run by name, with
fresh memory poisoned and without. Models (`run_models`): truth and plain path are transformers' own classes. Whether
all this would notice a mistake is tried by `self_test` with those of `mutations`.
"""

from .command import add_arguments, model_results, op_results, run
from .mutation_check import self_test
from .rule import Result

__all__ = ["Result", "add_arguments", "model_results", "op_results", "run", "self_test"]
