"""Blocks through a worker: in this process, decoding ahead and writing behind, or on Ray's actors."""

from __future__ import annotations

import logging
import pickle
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, first_line
from .blocks import Block
from .folder import Record
from .worker import BlockWriter, Loaded, Worker

_AHEAD = 2  # blocks that are decoded while one is computed
_BEHIND = 64  # utterances that wait to be written
_DECODERS = 2

Earlier = Callable[[Block], dict[str, Record]]


@dataclass
class Done:
    """A block that is complete, and the seconds that the model worked on it."""

    block: Block
    new: list[Record]  # of what was extracted now
    kept: int  # utterances that an earlier list had
    busy: float = 0.0

    @property
    def failed(self) -> int:
        """Utterances that have no features."""
        return sum("error" in record for record in self.new)

    @property
    def seconds(self) -> float:
        """Of audio that was extracted."""
        return sum(record.get("seconds", 0.0) for record in self.new)


def run_here(worker: Worker, blocks: Iterable[Block], earlier: Earlier) -> Generator[Done, None, None]:
    """Extract blocks in this process. The model waits neither for a file to be decoded nor for one to be written.

    Yields:
        Each block when it is committed, in order.

    Raises:
        OSError: nothing more can be written. What is committed stays.
    """
    behind = _Behind()
    with ThreadPoolExecutor(_DECODERS, "decode") as pool:
        try:
            for writing, loading in _ahead(worker, blocks, earlier, pool):
                if loading:
                    _ = worker.extractor.model  # loaded while files are decoded, not where there are none
                loaded = [future.result() for future in loading]
                busy = 0.0
                results = worker.computed(loaded)
                while True:
                    started = time.perf_counter()
                    result = next(results, None)
                    busy += time.perf_counter() - started
                    if result is None:
                        break
                    behind.put(writing, *result)
                behind.commit(writing, busy)
                yield from behind.finished()
            yield from behind.finished(wait=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            behind.stop()


def _ahead(
    worker: Worker, blocks: Iterable[Block], earlier: Earlier, pool: ThreadPoolExecutor
) -> Iterator[tuple[BlockWriter, list[Future[Loaded]]]]:
    started: deque[tuple[BlockWriter, list[Future[Loaded]]]] = deque()
    for block in blocks:
        writing = worker.writing(block)
        started.append((writing, [pool.submit(worker.load, u) for u in writing.remaining(earlier(block))]))
        if len(started) > _AHEAD:
            yield started.popleft()
    yield from started


class _Behind:
    """A thread that writes what it is given. What goes wrong in it is raised where the next piece is given."""

    def __init__(self) -> None:
        self._given: queue.Queue[Callable[[], None] | None] = queue.Queue(_BEHIND)
        self._done: deque[Done] = deque()
        self._error: BaseException | None = None
        # Not `join`: one that a signal interrupts takes the thread for ended.
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="write", daemon=True).start()

    def put(self, writing: BlockWriter, record: Record, output: Any) -> None:
        self._give(lambda: writing.write(record, output))

    def commit(self, writing: BlockWriter, busy: float) -> None:
        self._give(lambda: self._done.append(Done(writing.block, *writing.close(), busy)))

    def finished(self, wait: bool = False) -> Iterator[Done]:
        """What was committed since it was asked last."""
        if wait:
            self.stop()
        self._raise_error()
        while self._done:
            yield self._done.popleft()

    def stop(self) -> None:
        """Write what was given, and end."""
        if not self._ended.is_set():
            self._given.put(None)
            self._ended.wait()

    def _give(self, job: Callable[[], None]) -> None:
        self._raise_error()
        self._given.put(job)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (job := self._given.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error
        self._ended.set()


def run_on_ray(
    worker: Worker,
    blocks: Iterable[Block],
    earlier: Earlier,
    address: str | None = None,
    actors: int | None = None,
    gpus: float = 0,
    cpus: float = 1,
) -> Generator[Done, None, None]:
    """Extract blocks on Ray Data: each actor holds a model and writes its own blocks; what a lost one had begun is
    given to another.

    Args:
        worker: goes to every actor. The output and the audio must be reachable from all of them by the same paths.
        blocks: all that are to be done; they are cut by seconds, so each is a row.
        earlier: as `run_here`.
        address: of a running cluster; None for one of its own on this machine.
        actors: how many; None for as many as the cluster has room for.
        gpus: of each actor.
        cpus: of each actor.

    Yields:
        Blocks when they are committed, in any order.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
        OSError: an actor cannot write.
    """
    ray = _ray(address)
    items = [{"block": pickle.dumps((block, earlier(block)))} for block in blocks]
    if not items:
        return
    seen = set()  # a block may be done twice where an actor was lost after it had written
    strategy = ray.data.ActorPoolStrategy(size=actors) if actors else ray.data.ActorPoolStrategy(min_size=1)
    rows = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            _Actor,
            fn_constructor_args=(pickle.dumps(worker),),
            batch_size=1,
            compute=strategy,
            num_gpus=gpus,
            num_cpus=cpus,
        )
        .iter_rows()
    )
    try:
        for row in rows:
            done = pickle.loads(row["done"])
            if done.block.index not in seen:
                seen.add(done.block.index)
                yield done
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, (OSError, UserError)):
            raise cause from error
        raise


class _Actor:
    """A process of Ray's with a model of its own."""

    def __init__(self, worker: bytes) -> None:
        self.worker: Worker = pickle.loads(worker)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        found = []
        for item in batch["block"]:
            block, earlier = pickle.loads(item)
            started = time.perf_counter()
            new, kept = self.worker.run(block, earlier)
            found.append(pickle.dumps(Done(block, new, kept, time.perf_counter() - started)))
        return {"done": found}


def _ray(address: str | None) -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError(
            "the engine ray needs the package ray[data], which is not installed: pip install 'wavlm-fast[extract]'"
        ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False  # the run has one of its own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not ray.is_initialized():
        own = {"include_dashboard": False} if address is None else {"address": address}
        try:
            _reach(address)
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **own)
        except (OSError, ValueError, RuntimeError) as error:
            name = address or "of this machine"
            raise UserError(f"the Ray cluster {name} cannot be used: {first_line(error)}") from error
    return ray


def _reach(address: str | None) -> None:
    """Ask whether somebody listens at HOST:PORT; Ray itself asks for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()
