"""What the programs of each kernel read and write, as formulas of the launch's arguments.

tests/kernels/test_bytes.py compares them with a count. Utterances are as long as their batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Touch:
    """A piece of a tensor that a program reads or writes, in bytes.

    Attributes:
        asked: bytes of all instructions.
        plane: what other programs may touch too: a tensor and whatever tells its tiles apart, but for the rows.
            None for what no other program touches.
        first: the first row of the plane, `rows` of them, `row_bytes` each.
    """

    asked: int
    plane: tuple | None = None
    first: int = 0
    rows: int = 0
    row_bytes: int = 0


Programs = Callable[[int, int, int], list[Touch]]


def _size(tensor: torch.Tensor | None) -> int:
    """Bytes of an element; of none, 0."""
    return 0 if tensor is None else tensor.element_size()


def _within(block: int, index: int, total: int) -> int:
    """How many of the `block` from `index · block` on are less than `total`."""
    return max(0, min(block, total - index * block))


def _windows(frames: int, a: dict[str, Any]) -> int:
    """Samples in the windows of consecutive frames."""
    return (frames - 1) * a["STRIDE"] + a["K"] if a["K"] >= a["STRIDE"] else frames * a["K"]


def _gram(a: dict[str, Any]) -> Programs:
    e, K = _size(a["waveform_ptr"]), a["K"]

    def program(i: int, b: int, _: int) -> list[Touch]:
        n = _within(a["BLOCK_T"], i, a["T"])
        window = _windows(n, a)
        first = i * a["BLOCK_T"] * a["STRIDE"]
        return [Touch((window + K * n) * e, ("waveform", b), first, window, e), Touch((K + 1) * a["BLOCK_K"] * 8)]

    return program


def _norm(a: dict[str, Any]) -> Programs:
    def program(i: int, b: int, _: int) -> list[Touch]:
        c, K = _within(a["BLOCK_C"], i, a["C"]), a["K"]
        square = (K + 1) ** 2 * 8
        weight = c * K * _size(a["weight_ptr"])
        return [
            Touch(square, ("gram", b), 0, 1, square),
            Touch(weight, ("weight",), i * a["BLOCK_C"], c, K * _size(a["weight_ptr"])),
            Touch(4, ("centre", b), 0, 1, 4),
            Touch(2 * 4 * c),
        ]

    return program


def _vectors(a: dict[str, Any], names: tuple[str, ...], first: int, count: int) -> list[Touch]:
    """Vectors of channels, the same for all programs; those that are there."""
    present = [a[n] for n in names if a[n] is not None]
    return [Touch(count * _size(t), (id(t), "vector"), first, count, _size(t)) for t in present]


def _parts(a: dict[str, Any], name: str, numbers: int) -> list[Touch]:
    """A program's part of sums that are gradients, in fp32; none where nobody wants them."""
    return [] if a[name] is None else [Touch(numbers * 4)]


def _convolved(a: dict[str, Any], b: int, first: int, count: int) -> Touch:
    """The waveform under `count` frames from `first` on: tap after tap, or tiles of windows for a product."""
    asked = count * a["K"]
    if a["DOT"]:
        asked = sum(_windows(min(a["BLOCK_T"], count - done), a) for done in range(0, count, a["BLOCK_T"]))
    e = _size(a["waveform_ptr"])
    return Touch(asked * e, ("waveform", b), first * a["STRIDE"], _windows(count, a), e)


def _taps(a: dict[str, Any], first: int, c: int) -> Touch:
    row = a["K"] * _size(a["taps_ptr"])
    return Touch(c * row, ("taps",), first, c, row)


def _waveform_vectors(a: dict[str, Any], b: int | None, first: int, c: int) -> list[Touch]:
    """Taps, gain and shift, and what is an utterance's own (where `b` says whose)."""
    found = [_taps(a, first, c)]
    found += _vectors(a, ("norm_weight_ptr", "norm_bias_ptr"), first, c)
    return found + (_statistics(a, b, first, c) if b is not None else [])


def _statistics(a: dict[str, Any], b: int, first: int, c: int, times: int = 1) -> list[Touch]:
    own = [Touch(4 * times, ("centre", b), 0, 1, 4)]
    return own + [Touch(4 * c * times, (name, b), first, c, 4) for name in ("rstd", "offset")]


def _waveform_fwd(a: dict[str, Any]) -> Programs:
    out, group = _size(a["out_ptr"]), a["NORM"] == "group"
    per_program = a["tiles_per_program"] * a["BLOCK_T"]

    def program(i: int, b: int, _: int) -> list[Touch]:
        n = _within(per_program, i, a["T"])
        found = _waveform_vectors(a, b if group else None, 0, a["C"])
        if not group:
            found += _vectors(a, ("bias_ptr",), 0, a["C"])
        return [*found, _convolved(a, b, i * per_program, n), Touch(n * a["C"] * out)]

    return program


def _waveform_bwd_sums(a: dict[str, Any]) -> Programs:
    per_program = a["tiles_per_program"] * a["BLOCK_T"]

    def program(i: int, b: int, column: int) -> list[Touch]:
        n, c = _within(per_program, i, a["T"]), _within(a["BLOCK_C"], column, a["C"])
        found = _waveform_vectors(a, b, column * a["BLOCK_C"], c)
        found.append(_convolved(a, b, i * per_program, n))
        return [*found, Touch(n * c * _size(a["grad_ptr"])), Touch(2 * 4 * c)]

    return program


def _waveform_bwd(a: dict[str, Any]) -> Programs:
    e, T = _size(a["waveform_ptr"]), a["T"]
    tiles = -(-T // a["BLOCK_T"])

    def program(i: int, column: int, _: int) -> list[Touch]:
        c, channel = _within(a["BLOCK_C"], column, a["C"]), column * a["BLOCK_C"]
        found = _waveform_vectors(a, None, channel, c) + _vectors(a, ("bias_ptr",), channel, c)
        first = i * a["tiles_per_program"]
        for index in range(first, min(first + a["tiles_per_program"], a["B"] * tiles)):
            b, tile = divmod(index, tiles)
            n = _within(a["BLOCK_T"], tile, T)
            if a["NORM"] == "layer" and index > first:  # read again for each tile
                found += _vectors(a, ("bias_ptr", "norm_bias_ptr"), channel, c)
                found += [_taps(a, channel, c)] if a["TAPS_AGAIN"] else []
            if a["NORM"] == "group":
                found += _statistics(a, b, channel, c)
                found += [Touch(4 * c, ("sums", b, i), channel, c, 4) for i in range(2)]
            start = tile * a["BLOCK_T"]
            found.append(_convolved(a, b, start, n))
            found.append(Touch(_windows(n, a) * e, ("waveform", b), start * a["STRIDE"], _windows(n, a), e))
            found.append(Touch(n * c * (_size(a["grad_ptr"]) + _size(a["dy_ptr"]))))
        return [*found, Touch((a["BLOCK_K"] + 2 * (a["NORM"] == "layer")) * c * 4)]

    return program


def _waveform_overlap(a: dict[str, Any]) -> Programs:
    K, stride = a["K"], a["STRIDE"]

    def program(i: int, b: int, _: int) -> list[Touch]:
        sample = np.arange(i * a["BLOCK"], (i + 1) * a["BLOCK"])
        lanes = 0
        for step in range((K + stride - 1) // stride):
            k, frame = sample % stride + step * stride, sample // stride - step
            lanes += int(((k < K) & (frame >= 0) & (frame < a["T"])).sum())
        return [Touch(lanes * 4), Touch(_within(a["BLOCK"], i, a["S"]) * _size(a["dwaveform_ptr"]))]

    return program


def _add_layer_norm(a: dict[str, Any]) -> Programs:
    C = a["C"]

    def program(i: int, _: int, __: int) -> list[Touch]:
        n = _within(a["BLOCK_R"], i, a["rows"])
        found = _vectors(a, ("weight_ptr", "bias_ptr"), 0, C)
        return [*found, Touch(n * C * (3 + a["KEEP_SUM"]) * _size(a["x_ptr"]))]

    return program


def _add_layer_norm_bwd(a: dict[str, Any]) -> Programs:
    C = a["C"]

    def program(i: int, _: int, __: int) -> list[Touch]:
        n = _within(a["rows_per_program"], i, a["rows"])
        parts = _parts(a, "parts_ptr", 2 * C)
        frames = 3 + (a["grad_sum_ptr"] is not None)
        return [*_vectors(a, ("weight_ptr",), 0, C), Touch(n * C * frames * _size(a["dx_ptr"])), *parts]

    return program


def _gate_weight(a: dict[str, Any]) -> list[Touch]:
    rows = {"weight_ptr": a["D"] * _size(a["weight_ptr"]), "bias_ptr": _size(a["bias_ptr"])}
    return [Touch(8 * size, (name,), 0, 8, size) for name, size in rows.items()]


def _gate(a: dict[str, Any]) -> Programs:
    D, e = a["D"], _size(a["const_ptr"])

    def program(i: int, _: int, group: int) -> list[Touch]:
        n, heads = _within(a["BLOCK_T"], i, a["T"]), _within(a["heads_per_program"], group, a["H"])
        const = Touch(heads * e, ("const",), group * a["heads_per_program"], heads, e)
        return [*_gate_weight(a), const, Touch(heads * n * (D * _size(a["x_ptr"]) + 4))]

    return program


def _gate_bwd(a: dict[str, Any]) -> Programs:
    H, D, e = a["H"], a["D"], _size(a["x_ptr"])
    tiles = -(-a["T"] // a["BLOCK_T"])

    def program(i: int, _: int, __: int) -> list[Touch]:
        first = i * a["heads_per_program"]
        mine = range(first, min(first + a["heads_per_program"], a["B"] * tiles * H))
        n = sum(_within(a["BLOCK_T"], index // H % tiles, a["T"]) for index in mine)
        const = Touch(len(mine) * _size(a["const_ptr"]), ("const",), 0, H, _size(a["const_ptr"]))
        return [*_gate_weight(a), const, Touch(n * (2 * D * e + 4)), *_parts(a, "dweight_ptr", 2 * D + 2 + H)]

    return program


def _lengths(a: dict[str, Any], b: int) -> list[Touch]:
    return [Touch(8, ("lengths", b), 0, 1, 8)] if a["LENGTHS"] else []


def _pool_piece(a: dict[str, Any]) -> Programs:
    def program(column: int, piece: int, b: int) -> list[Touch]:
        c, n = _within(a["BLOCK_C"], column, a["C"]), _within(a["PIECE"], piece, a["T"])
        return [*_lengths(a, b), Touch(n * c * _size(a["x_ptr"])), Touch(2 * c * 4)]

    return program


def _pool_merge(a: dict[str, Any]) -> Programs:
    def program(column: int, b: int, _: int) -> list[Touch]:
        c = _within(a["BLOCK_C"], column, a["C"])
        return [*_lengths(a, b), Touch(a["pieces"] * 2 * c * 4), Touch(2 * c * _size(a["out_ptr"]))]

    return program


def _pool_bwd(a: dict[str, Any]) -> Programs:
    e = _size(a["x_ptr"])

    def program(column: int, piece: int, b: int) -> list[Touch]:
        c, n = _within(a["BLOCK_C"], column, a["C"]), _within(a["PIECE"], piece, a["T"])
        rows = [("means", a["pieces"], 4), ("grad", 2, e), ("out", 1, e)]
        shared = [Touch(r * c * s, (name, b, column), 0, r, c * s) for name, r, s in rows]
        return [*_lengths(a, b), *shared, Touch(2 * n * c * e)]

    return program


def _finish(a: dict[str, Any]) -> Programs:
    C, norm = a["C"], a["NORM"]
    tensors = 2 if not norm and a["ACTIVATION"] == "none" else 3  # gradient, what was saved, and the result

    def program(i: int, column: int, _: int) -> list[Touch]:
        c, n = _within(a["BLOCK_C"], column, C), _within(a["rows_per_program"], i, a["rows"])
        vectors = _vectors(a, ("norm_weight_ptr", "norm_bias_ptr"), column * a["BLOCK_C"], c) if norm else []
        parts = _parts(a, "parts_ptr", (3 if norm else 1) * c)
        return [*vectors, Touch(tensors * n * c * _size(a["grad_ptr"])), *parts]

    return program


@lru_cache(maxsize=4096)
def _rows(start: int, units: int, stride: int, step: int, first: int, taps: int, limit: int) -> tuple[int, int, int]:
    """Rows within [0, limit) that taps read of frames: how many are distinct, the first, and from it to the last."""
    at = (np.arange(start, start + units) * stride + first)[:, None] + np.arange(taps) * step
    at = np.unique(at[(at >= 0) & (at < limit)])
    return (at.size, int(at[0]), int(at[-1] - at[0]) + 1) if at.size else (0, 0, 0)


def _segments(start: int, stop: int, C: int) -> Iterator[tuple[int, int, int]]:
    """Of entries [start, stop) of taps · C: runs of channels that have the same taps, how wide, the first, how many."""
    edges = sorted({0, start % C, stop % C, C})
    for left, right in pairwise(edges):
        first, last = -((left - start) // C), (stop - 1 - left) // C
        if last >= first:
            yield right - left, first, last - first + 1


@lru_cache(maxsize=4096)
def _numbers(frames: tuple[int, int, int, int, int], start: int, stop: int, C: int, limit: int) -> int:
    """Distinct numbers of x that one load of entries [start, stop) of taps · C reads: first frame, units and so on."""
    unit, units, stride, step, first = frames
    return sum(
        width * _rows(unit, units, stride, step, first + tap * step, taps, limit)[0]
        for width, tap, taps in _segments(start, stop, C)
    )


def _product(a: dict[str, Any]) -> Programs:
    C, N, length = a["C"], a["N"], a["length"]
    x, weight, out = a["x_ptr"], a["weight_ptr"], a["out_ptr"]
    tiles = -(-N // a["BLOCK_N"])

    def program(i: int, b: int, _: int) -> list[Touch]:
        j, rest = divmod(i, a["GROUPS"] * tiles)
        group, tile = divmod(rest, tiles)
        n, units = _within(a["BLOCK_N"], tile, N), _within(a["BLOCK_T"], j, a["units"])
        start = j * a["BLOCK_T"]
        frames = start, units, a["STRIDE"], a["STEP"], a["first"]
        asked = sum(
            _numbers(frames, k, min(k + a["BLOCK_K"], length), C, a["frames_in"])
            for k in range(0, length, a["BLOCK_K"])
        )
        _, first, span = _rows(*frames, length // C, a["frames_in"])
        e, w = _size(x), _size(weight)
        found = [
            Touch(asked * e, (id(x), b, group), first, span, C * e),
            Touch(length * n * w, ("weight", group), tile * a["BLOCK_N"], n, length * w),
            *_vectors(a, ("bias_ptr", "norm_weight_ptr", "norm_bias_ptr"), group * N + tile * a["BLOCK_N"], n),
            Touch(units * n * _size(out) * (1 if a["pre_ptr"] is None else 2)),
        ]
        residual = a["residual_ptr"]
        if residual is not None:
            whole = residual is x and tiles == 1  # then rows of x are rows of it
            found.append(Touch(units * n * e, (id(x), b, group) if whole else None, start, units, C * e))
        return found

    return program


def _product_bwd_weight(a: dict[str, Any]) -> Programs:
    C, N, length, block_k = a["C"], a["N"], a["length"], a["BLOCK_K"]
    x, grad, out = a["x_ptr"], a["grad_ptr"], a["frames_out"]
    n_tiles = -(-N // a["BLOCK_N"])
    blocks = -(-out // a["BLOCK_T"])

    def program(tile: int, group: int, split: int) -> list[Touch]:
        k_tile, n_tile = divmod(tile, n_tiles)
        start, stop = k_tile * block_k, min((k_tile + 1) * block_k, length)
        n = _within(a["BLOCK_N"], n_tile, N)
        # Channels that the tile's taps share; all of them where it has several taps.
        channels, wide = (start % C, block_k) if C % block_k == 0 else (None, C)
        found = [Touch((stop - start) * n * 4)]
        first = split * a["blocks_per_split"]
        for index in range(first, min(first + a["blocks_per_split"], a["batch"] * blocks)):
            b, block = divmod(index, blocks)
            count, frame = _within(a["BLOCK_T"], block, out), block * a["BLOCK_T"]
            frames = frame, count, a["STRIDE"], a["STEP"], a["first"]
            asked = _numbers(frames, start, stop, C, a["frames_in"])
            tap, last = start // C, (stop - 1) // C
            shifted = *frames[:-1], a["first"] + tap * a["STEP"]
            _, low, span = _rows(*shifted, last - tap + 1, a["frames_in"])
            found.append(Touch(asked * _size(x), ("x", b, group, channels), low, span, wide * _size(x)))
            g = n * _size(grad)
            found.append(Touch(count * g, ("grad", b, group, n_tile), frame, count, g))
        return found

    return program


FORMULAS: dict[str, Callable[[dict[str, Any]], Programs]] = {
    "waveform_gram_kernel": _gram,
    "waveform_norm_kernel": _norm,
    "waveform_conv_fwd_kernel": _waveform_fwd,
    "waveform_conv_bwd_sums_kernel": _waveform_bwd_sums,
    "waveform_conv_bwd_kernel": _waveform_bwd,
    "waveform_conv_bwd_overlap_kernel": _waveform_overlap,
    "add_layer_norm_fwd_kernel": _add_layer_norm,
    "add_layer_norm_bwd_kernel": _add_layer_norm_bwd,
    "position_gate_fwd_kernel": _gate,
    "position_gate_bwd_kernel": _gate_bwd,
    "stats_pool_piece_kernel": _pool_piece,
    "stats_pool_merge_kernel": _pool_merge,
    "stats_pool_bwd_kernel": _pool_bwd,
    "finish_bwd_kernel": _finish,
    "frames_product_kernel": _product,
    "frames_product_bwd_weight_kernel": _product_bwd_weight,
}
