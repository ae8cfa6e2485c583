"""What launches read and write, counted while Triton's interpreter runs them: TRITON_INTERPRET=1 has to be set.

`python -m wavlm_fast.benchmarks.gpu.counted_bytes` prints what attention comes to, as JSON: of one head of the models,
at full length. Utterances and heads are alike, and no launch of attention depends on the number of heads but by its
grid.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from wavlm_fast.backends.triton import TABLE
from wavlm_fast.kernels._target import pretend

from .compile import Launch
from .launch_bytes import Bytes


@dataclass
class Counted:
    """One launch, and its bytes: asked for as launch_bytes.py has it, `memory` with every address once."""

    launch: Launch
    asked: int = 0
    read: dict[int, list[np.ndarray]] = field(default_factory=dict)  # addresses by the size of what is there
    written: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def count(self, found: dict[int, list[np.ndarray]], pointers: Any, active: np.ndarray) -> None:
        """Add one instruction of one program."""
        addresses = np.unique(pointers.data[np.broadcast_to(active, pointers.data.shape)])
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.asked += addresses.size * size
        found.setdefault(size, []).append(addresses)

    @property
    def bytes(self) -> Bytes:
        pieces = [(size, arrays) for side in (self.read, self.written) for size, arrays in side.items()]
        return Bytes(self.asked, sum(size * np.unique(np.concatenate(arrays)).size for size, arrays in pieces))


@contextmanager
def counting() -> Iterator[list[Counted]]:
    """Count the launches made inside, each by itself."""
    launches: list[Counted] = []
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, atomic, run = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, function.run,
    )  # fmt: skip

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].count(launches[-1].read, pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].count(launches[-1].written, pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for side in (launches[-1].read, launches[-1].written):
            launches[-1].count(side, pointers, mask.data)
        return atomic(self, operation, pointers, value, mask, *rest)

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        launches.append(Counted(Launch(self, arguments, tuple(grid), {})))
        run(self, *args, grid=grid, warmup=warmup, **kwargs)

    patches = ("create_masked_load", counted_load), ("create_masked_store", counted_store), (
        "create_atomic_rmw", counted_atomic,
    )  # fmt: skip
    for name, patch in patches:
        setattr(builder, name, patch)
    function.run = recorded
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
        function.run = run


def attention(batch: int, frames: int, head_dim: int, dtype: torch.dtype, target: str) -> dict[str, Bytes]:
    """Bytes of the launches of `gated_attention` and its backward for one head: of each op, and by its kernels."""
    q, k, v = torch.randn(batch, frames, 3, 1, head_dim, dtype=dtype).unbind(2)
    gate, rel_bias = torch.rand(batch, 1, frames), torch.randn(1, 2 * frames - 1)
    options = (torch.full((batch,), frames), 0.0, None, head_dim**-0.5)
    found = {}
    with pretend(target), counting() as launches:
        out, lse = TABLE["gated_attention"].fn(q, k, v, gate, rel_bias, *options)
        found |= _by_name("gated_attention", launches)
        launches.clear()
        saved = options[0], out, lse, *options[1:]
        TABLE["gated_attention_backward"].fn(out, q, k, v, gate, rel_bias, *saved, [True] * 5)
        found |= _by_name("gated_attention_backward", launches)
    return found


def _by_name(op: str, launches: list[Counted]) -> dict[str, Bytes]:
    found = {op: Bytes()}
    for counted in launches:
        moved, name = counted.bytes, counted.launch.kernel.fn.__name__.strip("_")
        found[op] += moved
        found[f"{op} {name}"] = found.get(f"{op} {name}", Bytes()) + moved
    return found


def main(arguments: list[str]) -> None:
    """Batch, frames, head_dim, dtype and target, in that order."""
    batch, frames, head_dim, dtype, target = arguments
    found = attention(int(batch), int(frames), int(head_dim), getattr(torch, dtype), target)
    print(json.dumps({op: [counted.asked, counted.memory] for op, counted in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
