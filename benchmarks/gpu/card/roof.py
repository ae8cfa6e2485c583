"""What the device can do at most, measured: bytes to and from memory, and products, per second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from wavlm_fast import measure

from ...run.peaks import product
from ...run.providers import SHORT
from .steps import PEAKS, Row, Scale, Step

BANDWIDTH, TF32 = "bandwidth", "tf32"
_BYTES, _TINY_BYTES = 2**30, 2**16
_SIZE, _TINY_SIZE = 8192, 32


def steps(scale: Scale) -> Iterator[Step]:
    """A copy of a gigabyte, and a large product in every dtype."""
    yield Step(PEAKS, "peak bandwidth", 2, lambda: [_row(BANDWIDTH, _copied(scale), "bytes/s, a copy, read and write")])
    for dtype in scale.dtypes:
        yield Step(PEAKS, f"peak {SHORT[dtype]}", 2, lambda dtype=dtype: [_of(scale, dtype, False)])
    if scale.device.type != "cpu":
        yield Step(PEAKS, f"peak {TF32}", 2, lambda: [_of(scale, torch.float32, True)])


def _row(what: str, rate: float, how: str) -> Row:
    return {"what": what, "rate": rate, "how": how}


def _copied(scale: Scale) -> float:
    source = torch.zeros(_TINY_BYTES if scale.tiny else _BYTES, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    times = measure.interleave({"": lambda: target.copy_(source)}, 10, scale.device)[""]
    return 2 * source.numel() / min(times)


def _of(scale: Scale, dtype: torch.dtype, tf32: bool) -> Row:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        rate = product(dtype, _TINY_SIZE if scale.tiny else _SIZE, str(scale.device))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return _row(TF32 if tf32 else SHORT[dtype], rate, "operations/s, a large product by the vendor's library")


class Roof:
    """The peaks that were measured, as far as they were."""

    def __init__(self, rows: list[Row]) -> None:
        self._rates = {row["what"]: row["rate"] for row in rows if row.get("rate")}

    def shares(self, seconds: float, moved: int | None, operations: float, dtype: torch.dtype) -> dict[str, Any]:
        """What a measurement comes to: rates and their shares of the peaks, the larger of which is `share`, with what
        bounds it."""
        bandwidth, peak = self._rates.get(BANDWIDTH), self._rates.get(SHORT[dtype])
        if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
            peak = self._rates.get(TF32, peak)
        of_memory = moved / seconds / bandwidth if moved and bandwidth else None
        of_products = operations / seconds / peak if operations and peak else None
        known = {"memory": of_memory or 0.0, "products": of_products or 0.0}
        bound = max(known, key=known.__getitem__)
        return {
            "bytes": moved, "operations": operations, "of bandwidth": of_memory, "of products": of_products,
            "share": known[bound] or None, "bound": bound if known[bound] else None,
        }  # fmt: skip
