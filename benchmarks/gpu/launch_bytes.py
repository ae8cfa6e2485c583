"""What a launch asks for, and what of that comes from memory.

Asked for: every distinct address of every load and store, once per instruction of a program and per run of it. A value
that an instruction gives to many lanes is asked for once; a tile that two programs read, or one program reads twice, is
asked for twice. From memory: a wave of programs runs at a time and finds in the L2 cache whatever one of them has read,
and what the wave before read if both together fit.

Attention has no formula (launch_formulas.py): counted_bytes.py counts it at its full length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .compile import Launch
from .launch_formulas import FORMULAS

# An A100, the least of the GPUs that models are trained and served on: two programs on each of its multiprocessors.
WAVE = 2 * 108
L2 = 40 * 2**20

Place = tuple[int, ...]


@dataclass(frozen=True)
class Bytes:
    """Bytes of some launches, read and written: asked for, and to and from memory."""

    asked: int = 0
    memory: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.asked + other.asked, self.memory + other.memory)


def of_launch(launch: Launch, wave: int = WAVE, cache: int = L2) -> Bytes:
    """Bytes of a launch by its kernel's formula.

    Raises:
        KeyError: the kernel has none.
    """
    programs = FORMULAS[launch.name](launch.arguments)
    places = list(_places(launch.grid))
    asked = memory = 0
    before: dict[tuple, list[tuple[int, int]]] = {}
    for start in range(0, len(places), wave):
        shared: dict[tuple, list[tuple[int, int]]] = {}
        row_bytes: dict[tuple, int] = {}
        for place in places[start : start + wave]:
            for touch in programs(*place):
                asked += touch.asked
                if touch.plane is None:
                    memory += touch.asked
                elif touch.rows:
                    shared.setdefault(touch.plane, []).append((touch.first, touch.first + touch.rows))
                    row_bytes[touch.plane] = touch.row_bytes
        shared = {plane: _union(ranges) for plane, ranges in shared.items()}
        both = {p: _union(shared.get(p, []) + before.get(p, [])) for p in {**shared, **before}}
        kept = before if _bytes(both, row_bytes) <= cache else {}
        for plane, ranges in shared.items():
            new = _length(_union(ranges + kept.get(plane, []))) - _length(kept.get(plane, []))
            memory += new * row_bytes[plane]
        before = shared
    return Bytes(asked, memory)


def _places(grid: tuple[int, ...]) -> Iterator[Place]:
    """Programs in the order in which GPUs start them: the first index changes fastest."""
    x, y, z = (*grid, 1, 1)[:3]
    return ((i, j, k) for k in range(z) for j in range(y) for i in range(x))


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _length(ranges: list[tuple[int, int]]) -> int:
    return sum(last - first for first, last in ranges)


def _bytes(planes: dict[tuple, list[tuple[int, int]]], row_bytes: dict[tuple, int]) -> int:
    # A plane that this wave left alone needs no room.
    return sum(_length(ranges) * row_bytes.get(plane, 0) for plane, ranges in planes.items())
