"""Products of fp32 matrices as Triton makes them of products in bf16 or TF32, emulated number by number.

Triton's pass over products with `input_precision` bf16x3, bf16x6 and tf32x3 splits every operand into pieces that the
matrix unit takes, each the rounded rest of those before, and adds up products of pieces, the smallest first: what
would be NaN before the largest counts as 0, and what was summed up before in fp32 is added last, outside the unit.

The unit is the worst of those that were taken apart in public: products are exact, but a step adds eight of them (of
TF32 four) to the sum at once, each cut off below the last bit of the largest of them, and cuts off the sum too. No
guard bits, no rounding: from A100 on there are some.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 24  # of fp32
_STEP = {"bf16": 8, "tf32": 4}
# Pairs of pieces, of a and of b, in the order in which they are summed up; 0 is the largest.
PRODUCTS = {
    "tf32": ("tf32", ((0, 0),)),
    "bf16x3": ("bf16", ((1, 0), (0, 1), (0, 0))),
    "tf32x3": ("tf32", ((1, 0), (0, 1), (0, 0))),
    "bf16x6": ("bf16", ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0))),
}


def product(a: Tensor, b: Tensor, precision: str, depth: int) -> Tensor:
    """a · b fp32 of fp32 matrices, by a loop over tiles of `depth` columns of a."""
    kind, pairs = PRODUCTS[precision]
    count = 1 + max(max(pair) for pair in pairs)
    total = torch.zeros(a.shape[0], b.shape[1])
    for start in range(0, a.shape[1], depth):
        left = pieces(a[:, start : start + depth], kind, count)
        right = pieces(b[start : start + depth], kind, count)
        tile = torch.zeros_like(total)
        for i, j in pairs:
            if (i, j) == (0, 0):
                tile = torch.where(tile.isnan(), 0.0, tile)
            tile = _accumulate(left[i], right[j], tile, _STEP[kind])
        total += tile
    return total


def pieces(x: Tensor, kind: str, count: int) -> list[Tensor]:
    """`count` numbers that bf16 or TF32 holds, each the rest of x after those before it, rounded."""
    found = []
    for _ in range(count):
        found.append(x.bfloat16().float() if kind == "bf16" else _tf32(x))
        x = x - found[-1]
    return found


def chain(a: Tensor, b: Tensor) -> Tensor:
    """a · b by one fused multiply-add after the other, as without a matrix unit."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        # The product is exact in float64, and the sum too but for one number in millions.
        total = (total.double() + a[:, k, None].double() * b[None, k].double()).float()
    return total


def _tf32(x: Tensor) -> Tensor:
    """Rounded to ten bits behind the first, halves away from zero (cvt.rna)."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), (bits + (1 << 12) & ~((1 << 13) - 1)).view(torch.float32), x)


def _accumulate(a: Tensor, b: Tensor, total: Tensor, step: int) -> Tensor:
    a, b, total = a.double(), b.double(), total.double()
    for start in range(0, a.shape[1], step):
        added = a[:, None, start : start + step] * b.T[None, :, start : start + step]
        added = torch.cat((added, total[..., None]), dim=-1)
        total = _cut(_cut(added, added.abs().amax(-1, keepdim=True)).sum(-1))
    return total.float()


def _cut(x: Tensor, largest: Tensor | None = None) -> Tensor:
    """Without what lies below the last bit of `largest`, or of x itself."""
    _, exponent = torch.frexp(x if largest is None else largest)
    last = torch.ldexp(torch.ones_like(x), exponent - _BITS)
    return torch.where(x.isfinite(), (x / last).trunc() * last, x)
