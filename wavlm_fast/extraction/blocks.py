"""The unit of work, of restarts and of shards: utterances that follow each other, cut by seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import islice

from ..errors import UserError
from .sources import Utterance

MOST_UTTERANCES = 1000
_UNKNOWN = 10.0  # seconds, of a file whose header does not say
_AT_ONCE = 256  # headers that are read side by side


@dataclass(frozen=True)
class Block:
    """Utterances that are extracted together. What a block is depends on the list of utterances and their headers
    alone, so that a run that goes on, or another machine, cuts the same ones.
    """

    index: int
    utterances: tuple[Utterance, ...]

    @property
    def key(self) -> str:
        """A name for what is in it."""
        content = json.dumps([astuple(u) for u in self.utterances]).encode("utf-8", "surrogateescape")
        return hashlib.sha256(content).hexdigest()[:32]


def blocks(
    utterances: Iterable[Utterance], seconds: float, duration_of: Callable[[str], float | None]
) -> Iterator[Block]:
    """Cut a list of utterances, lazily.

    Args:
        utterances: in their order.
        seconds: of audio in a block, at the most, but for one utterance alone.
        duration_of: from a file to the seconds that its header announces; None where it does not say.
    """
    index, total = 0, 0.0
    block: list[Utterance] = []
    for utterance, length in _with_durations(utterances, duration_of):
        if block and (total + length > seconds or len(block) == MOST_UTTERANCES):
            yield Block(index, tuple(block))
            index, total, block = index + 1, 0.0, []
        block.append(utterance)
        total += length
    if block:
        yield Block(index, tuple(block))


def _with_durations(
    utterances: Iterable[Utterance], duration_of: Callable[[str], float | None]
) -> Iterator[tuple[Utterance, float]]:
    def length(utterance: Utterance) -> float:
        if utterance.duration is not None:
            return utterance.duration
        try:
            known = duration_of(utterance.path)
        except UserError:
            return 0.0  # it will be told when it is loaded
        return _UNKNOWN if known is None else max(0.0, known - utterance.start)

    remaining = iter(utterances)
    with ThreadPoolExecutor(8, "headers") as pool:
        while some := list(islice(remaining, _AT_ONCE)):
            yield from zip(some, pool.map(length, some), strict=True)
