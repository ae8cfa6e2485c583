"""`wavlm-fast extract`: features of a corpus, in any of many formats, in a run that can be stopped and goes on."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import audio, checkpoint, machine
from .console import (
    DTYPES,
    add_model_arguments,
    add_truncated_argument,
    apply_threads,
    console,
    dtype_argument,
    positive,
    positive_int,
)
from .errors import UserError
from .extraction.blocks import Block, blocks
from .extraction.engines import Done, run_here, run_on_ray
from .extraction.extractor import Extractor
from .extraction.folder import Folder, Record
from .extraction.sources import Utterance, utterances
from .extraction.wanted import AVERAGES, CLASSES, CONVENTIONS
from .extraction.worker import Worker
from .extraction.writers import FORMATS, WITHOUT_BFLOAT16, check

FAILED = 3  # exit status: some utterances failed
_FRAMES = 50  # a second
_MOST_BYTES = 256 * 2**20  # of features in a block
_MOST_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast extract`."""
    parser.add_argument(
        "input",
        nargs="+",
        help="audio files, folders, globs, manifests (NeMo or lhotse .jsonl, Kaldi wav.scp or its folder, .csv, .tsv, "
        ".parquet), or - for a list of paths on standard input",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="folder, or NAME.parquet; made if missing")
    add_model_arguments(parser)
    parser.add_argument("--what", choices=list(CLASSES), default="hidden", help="what to extract (default: hidden)")
    parser.add_argument(
        "--layer",
        type=_layer,
        nargs="+",
        default=["all"],
        metavar="N|all",
        help="0 is the embedding before the first layer, N the output of layer N, negative counts from the end; layers "
        "behind the last one asked for are neither loaded nor run (default: all, stacked)",
    )
    parser.add_argument(
        "--average", choices=AVERAGES, nargs="+", default=[], help="mean over layers, frames or both"
    )
    parser.add_argument(
        "--convention",
        choices=list(CONVENTIONS),
        default="hf",
        help="how the reader of the features prepares waveforms and where it takes the last state (default: hf)",
    )
    parser.add_argument("--format", choices=list(FORMATS), help="of the output (default: npy; txt for text)")
    parser.add_argument(
        "--dtype-out", type=dtype_argument, metavar="DTYPE", help="of the features (default: the model's, else float32)"
    )
    add_truncated_argument(parser)
    parser.add_argument(
        "--batch-seconds", type=positive("seconds"), default=60.0, metavar="S", help="audio in a batch (default: 60)"
    )
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="only share I, from 0, of N that have one --out"
    )
    parser.add_argument("--max-errors", type=positive_int, metavar="N", help="stop when more utterances than that fail")
    parser.add_argument("--log", metavar="FILE", help="a line of JSON for each block that is done, appended")
    parser.add_argument("--force", action="store_true", help="begin again, whatever is done")
    parser.add_argument("--engine", choices=["here", "ray"], default="here", help="this process (default), or Ray Data")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a running cluster (default: one of its own here)")
    parser.add_argument(
        "--ray-actors", type=positive_int, metavar="N", help="models at work (default: all that there is room for)"
    )


def _layer(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a layer number or 'all' is wanted, got {text!r}") from None


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"a share I/N with 0 <= I < N is wanted, such as 0/4, got {text!r}")
    return int(index), int(count)


def run(args: argparse.Namespace) -> int:
    """Extract; 0 when every utterance is done, 3 when some failed. What can be refused is refused before any work."""
    apply_threads(args.threads)
    out = Path(args.out)
    kind = args.format or ("parquet" if out.suffix == ".parquet" else "txt" if args.what == "text" else "npy")
    if (kind == "parquet") != (out.suffix == ".parquet"):
        raise UserError(f"the format parquet goes with --out NAME.parquet, got --format {kind} and --out {out}")
    extractor = _extractor(args, kind)
    check(kind, args.what, extractor.dimensions, extractor.dtype_out)
    source = checkpoint.Source(extractor.name, extractor.normalises)
    settings = _settings(args, extractor, kind)
    about = {"what": args.what, "layer": " ".join(map(str, args.layer)), "model": source.name or "seeded",
             "sample_rate": audio.RATE, "wavlm_fast": settings["wavlm_fast"]}  # fmt: skip
    folder = Folder(out, one_file=kind == "parquet")
    worker = Worker(extractor, folder, kind, about, args.allow_truncated)
    listed = _Listed(args.input, out)
    console().print(f"model {source}", markup=False, soft_wrap=True)
    folder.begin(settings, args.force)
    with folder.held(f"share-{args.shard[0]}-of-{args.shard[1]}"):
        run = _Run(args, worker, settings, listed.count)
        return run.over(blocks(listed.utterances(), _block_seconds(extractor), audio.duration_of))


class _Listed:
    """The utterances of the inputs, gone through once before any work: what is wrong with a list is told then.

    Raises:
        UserError: as `utterances`.
    """

    def __init__(self, inputs: Sequence[str], out: Path) -> None:
        self.inputs, self.out = inputs, out
        self._stdin = None
        if "-" in inputs:  # a pipe is read once
            self._stdin = io.TextIOWrapper(tempfile.TemporaryFile())  # noqa: SIM115, as long as the run
            shutil.copyfileobj(sys.stdin.buffer, self._stdin.buffer)
        self.count = sum(1 for _ in self.utterances())

    def utterances(self) -> Iterator[Utterance]:
        if self._stdin is not None:
            self._stdin.buffer.seek(0)
        return utterances(self.inputs, stdin=self._stdin, leave_out=self.out)


def _extractor(args: argparse.Namespace, kind: str) -> Extractor:
    layers: Any = "all" if "all" in args.layer else tuple(args.layer)
    dtype = DTYPES[args.dtype]
    widened = torch.float32 if dtype == torch.bfloat16 and kind in WITHOUT_BFLOAT16 else dtype
    wanted = DTYPES[args.dtype_out] if args.dtype_out else widened
    return Extractor(
        args.model, args.what, layers, tuple(args.average), args.convention, dtype, wanted, args.device,
        args.batch_seconds,
    )  # fmt: skip


def _block_seconds(extractor: Extractor) -> float:
    """So much audio that its features stay of bounded size."""
    states = max(1, len(extractor.states))
    bytes_of_second = _FRAMES * extractor.config.hidden_size * states * extractor.dtype_out.itemsize
    return min(_MOST_SECONDS, max(extractor.batch_seconds, _MOST_BYTES / bytes_of_second))


def _settings(args: argparse.Namespace, extractor: Extractor, kind: str) -> dict[str, Any]:
    """What decides every byte of the output, but for the audio."""
    wanted = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(extractor.wanted).items()}
    names = {"dtype": extractor.dtype, "dtype_out": extractor.dtype_out}
    return {
        "model": args.model or "seeded",
        "weights": checkpoint.identity(extractor.name),
        "normalises": extractor.normalises,
        **wanted,
        **{name: str(dtype).removeprefix("torch.") for name, dtype in names.items()},
        "format": kind,
        "batch_seconds": args.batch_seconds,
        "allow_truncated": args.allow_truncated,
        "wavlm_fast": machine.versions()["wavlm-fast"],
    }


class _Run:
    """One run of a share of the work, and what it has to tell."""

    def __init__(self, args: argparse.Namespace, worker: Worker, settings: dict[str, Any], count: int) -> None:
        self.args, self.worker, self.settings, self.count = args, worker, settings, count
        self.folder = worker.folder
        self.blocks: int | None = None  # in the whole list; None as long as it was not gone through
        self.done = self.kept = self.failed = 0  # utterances
        self.seconds = self.busy = 0.0  # of audio that was extracted, and of the model's work on it
        self.started = time.perf_counter()
        self.example = ""  # of what failed
        self._left: dict[str, Record] | None = None

    def over(self, listed: Iterator[Block]) -> int:
        """Extract what is not done of these blocks, and write the manifests."""
        with ExitStack() as stack:
            log = stack.enter_context(_appending(self.args.log)) if self.args.log else None
            progress = stack.enter_context(_progress())
            task = progress.add_task("extract", total=-(-self.count // self.args.shard[1]), told="")
            # Closed whatever happens: the file that is being written is written to its end.
            extracted = stack.enter_context(closing(self._extracted(self._to_do(listed))))
            try:
                for done in extracted:
                    self._count(done)
                    progress.update(task, completed=self.done + self.kept + self.failed, told=str(self))
                    if log:
                        print(json.dumps(self._event(done)), file=log, flush=True)
                    if self.args.max_errors is not None and self.failed > self.args.max_errors:
                        break
            except OSError as error:
                raise UserError(
                    f"nothing more can be written into {self.folder.out}: {error.strerror or error}; what is done is "
                    "kept, and the same command goes on from there"
                ) from error
        return self._finish()

    def _extracted(self, blocks: Iterator[Block]) -> Generator[Done, None, None]:
        if self.args.engine == "here":
            return run_here(self.worker, blocks, self._earlier)
        room = {"gpus": 1.0 if self.args.device != "cpu" else 0.0, "cpus": self.args.threads or 1}
        return run_on_ray(self.worker, blocks, self._earlier, self.args.ray_address, self.args.ray_actors, **room)

    def _to_do(self, listed: Iterator[Block]) -> Iterator[Block]:
        (share, shares), count = self.args.shard, 0
        for block in listed:
            count = block.index + 1
            if block.index % shares != share:
                continue
            records = self.folder.done(block)
            if records is None:
                yield block
            else:
                failed = self._told(records)
                self.kept += len(records) - failed
                self.failed += failed
        self.blocks = count

    def _earlier(self, block: Block) -> dict[str, Record]:
        """What an earlier list of utterances left of this block and those behind it."""
        if self._left is None:
            self._left = self.folder.left_from(block.index)
        return self._left

    def _count(self, done: Done) -> None:
        failed = self._told(done.new)
        self.done += len(done.new) - failed
        self.kept += done.kept
        self.failed += failed
        self.seconds += done.seconds
        self.busy += done.busy

    def _told(self, records: Sequence[Record]) -> int:
        """How many of them failed."""
        errors = [record["error"] for record in records if "error" in record]
        self.example = self.example or next(iter(errors), "")
        return len(errors)

    @property
    def took(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.started

    def __str__(self) -> str:
        took = self.took
        return (
            f"{self.done} extracted, {self.kept} kept, {self.failed} failed; {self.seconds / 3600:.2f} hours in "
            f"{took:.0f} s, {self.seconds / took:.1f} x real time, the model busy {100 * self.busy / took:.0f} %"
        )

    def _event(self, done: Done) -> dict[str, Any]:
        return {
            "block": done.block.index,
            "utterances": len(done.block.utterances),
            "failed": done.failed,
            "seconds": round(done.seconds, 3),
            "busy": round(done.busy, 3),
            "wall": round(self.took, 3),
        }

    def _finish(self) -> int:
        out = console()
        try:
            writer = FORMATS[self.worker.kind]
            if self.blocks is not None:  # a run that stops early knows of no more blocks than it met
                self.folder.prune(self.blocks)
                writer.prune(self.folder, self.blocks)
            good, bad = self.folder.finish(self.settings)
            writer.finish(self.folder, self.args.out)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"the manifest of {self.folder.out} cannot be written: {reason}") from error
        out.print(str(self), markup=False, soft_wrap=True)
        out.print(f"{self.folder.manifest}  {good} utterances", markup=False, soft_wrap=True)
        if bad:
            out.print(f"{self.folder.errors}  {bad} failed, such as: {self.example}", markup=False, soft_wrap=True)
        if self.args.max_errors is not None and self.failed > self.args.max_errors:
            out.print(f"stopped: more than {self.args.max_errors} failed", markup=False)
        return FAILED if bad else 0


def _appending(path: str) -> Any:
    try:
        return open(path, "a")
    except OSError as error:
        raise UserError(f"the log {path} cannot be written: {error.strerror or error}") from error


def _progress() -> Progress:
    out = console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[told]}"))
    return Progress(*columns, console=out, disable=not out.is_terminal)
