"""`wavlm-fast demo`: transformers' WavLM and ours side by side on real speech."""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console

from . import audio, checkpoint, machine, measure, memory
from .console import (
    DTYPES,
    add_model_arguments,
    add_truncated_argument,
    apply_threads,
    console,
    positive,
    print_table,
    table,
    write_json,
)
from .report import report

_ROUNDS = 7
_TIMING_BUDGET = 25.0  # seconds; long audio gets fewer rounds, never under three
_PROVIDERS = ("transformers", "wavlm_fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast demo`."""
    parser.add_argument("audio", nargs="*", help="audio files: wav, flac, ogg or mp3 (default: a clip of real speech)")
    add_model_arguments(parser)
    add_truncated_argument(parser)
    parser.add_argument(
        "--max-seconds",
        type=positive("seconds"),
        default=30.0,
        metavar="S",
        help="compare on at most the first S seconds: transformers' memory grows with their square (default: 30)",
    )
    parser.add_argument("--json", metavar="FILE", help='write everything measured to FILE ("-": standard output)')


@dataclass
class Result:
    """What the demo found on one audio file."""

    info: audio.AudioInfo
    shape: tuple[int, ...]  # [1, S] as compared
    frames: int
    errors: list[measure.LayerError]
    times: dict[str, measure.Timing]
    faster: measure.Timing
    peaks: dict[str, memory.Peak] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every layer obeys the parity rule."""
        return all(row.ok for row in self.errors)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "audio": asdict(self.info),
            "waveform": list(self.shape),
            "frames": self.frames,
            "layers": [row.as_dict() for row in self.errors],
            "seconds": {name: timing.as_dict() for name, timing in self.times.items()},
            "times_faster": self.faster.as_dict(),
            "peak_bytes": {name: asdict(peak) for name, peak in self.peaks.items()},
            "ok": self.ok,
        }


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every layer of ours is as close to float64 as transformers', 1 when one is not."""
    apply_threads(args.threads)
    out = console() if args.json != "-" else Console(stderr=True, highlight=False)
    theirs, source = checkpoint.load(args.model, DTYPES[args.dtype])
    inputs = [_load(path, theirs, args) for path in args.audio or [audio.clip()]]
    _print_head(out, theirs, source, args)
    truth = copy.deepcopy(theirs).double()
    ours = checkpoint.accelerated(theirs).to(args.device)
    theirs = theirs.to(args.device)
    results = []
    for waveform, info in inputs:
        result = _compare(theirs, ours, truth, checkpoint.prepare(waveform, source.normalise), info, args.device)
        result.peaks = {name: _peak(name, info, len(waveform), args) for name in _PROVIDERS}
        _print_result(out, result)
        results.append(result)
    out.print(str(report(ours)), markup=False, soft_wrap=True)
    ok = all(result.ok for result in results)
    _print_verdict(out, results)
    if args.json:
        write_json(args.json, _as_dict(results, source, ours, args, ok))
    return 0 if ok else 1


def _load(path: Any, model: torch.nn.Module, args: argparse.Namespace) -> tuple[torch.Tensor, audio.AudioInfo]:
    shortest = checkpoint.receptive_field(model)
    waveform, info = audio.load(path, at_least=shortest, allow_truncated=args.allow_truncated)
    return waveform[: max(shortest, int(args.max_seconds * audio.RATE))], info


def _compare(
    theirs: torch.nn.Module,
    ours: torch.nn.Module,
    truth: torch.nn.Module,
    waveform: torch.Tensor,
    info: audio.AudioInfo,
    device: str,
) -> Result:
    waveform = waveform.to(next(theirs.parameters()).dtype)  # the same rounded samples for all three
    exact = measure.layers(truth, waveform)
    errors = measure.compare(measure.layers(theirs, waveform), measure.layers(ours, waveform), exact)
    calls = {"transformers": measure.forward(theirs, waveform), "wavlm_fast": measure.forward(ours, waveform)}
    seconds = measure.interleave(calls, _ROUNDS, device, _TIMING_BUDGET)
    return Result(
        info=info,
        shape=tuple(waveform.shape),
        frames=exact["output"].shape[1],
        errors=errors,
        times={name: measure.Timing.of(values) for name, values in seconds.items()},
        faster=measure.ratio(seconds["transformers"], seconds["wavlm_fast"]),
    )


def _peak(provider: str, info: audio.AudioInfo, samples: int, args: argparse.Namespace) -> memory.Peak:
    return memory.measure(
        provider,
        audio=info.path,
        samples=samples,
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        allow_truncated=args.allow_truncated,
    )


def _print_head(out: Console, model: torch.nn.Module, source: checkpoint.Source, args: argparse.Namespace) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    config: Any = model.config
    where = f"{torch.get_num_threads()} CPU threads" if args.device == "cpu" else machine.device_name(args.device)
    out.print(f"model    {source}", markup=False, soft_wrap=True)
    out.print(
        f"         {parameters / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, "
        f"{config.hidden_size} channels, {config.num_attention_heads} heads, {args.dtype}",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"machine  {machine.cpu_name()}, {where}", markup=False, soft_wrap=True)
    out.print(f"versions {machine.one_line_versions()}\n", markup=False, soft_wrap=True)


def _print_result(out: Console, result: Result) -> None:
    out.print(str(result.info), markup=False, soft_wrap=True)
    compared = result.shape[1] / audio.RATE
    cut = "" if compared >= result.info.seconds else f" (the first {compared:.2f} s; --max-seconds takes more)"
    out.print(f"waveform [1, {result.shape[1]}] -> {result.frames} frames{cut}\n", markup=False, soft_wrap=True)
    three = ("transformers", "ours", "allowed")
    errors = table("", "largest", *three, *(f"{name}*" for name in three), "")
    for row in result.errors:
        verdict = "ok" if row.ok else "[bold red]FAIL[/]"
        found = (row.all.theirs, row.all.ours, row.all.allowed, row.ordinary.theirs, row.ordinary.ours)
        numbers = (f"{error:.2e}" for error in (*found, row.ordinary.allowed))
        errors.add_row(row.layer, f"{row.largest:.3g}", *numbers, verdict)
    print_table(out, "Maximal error against transformers in float64 (* without outlier channels)", errors)
    costs = table("", "seconds", "10-90 %", "real-time factor", "forward", "total")
    for name in _PROVIDERS:
        timing, peak = result.times[name], result.peaks[name]
        costs.add_row(
            name,
            f"{timing.median:.3f}",
            f"{timing.p10:.3f}-{timing.p90:.3f}",
            f"{compared / timing.median:.1f}",
            *(f"{size / 2**20:.0f} MiB" for size in (peak.forward, peak.total)),
        )
    print_table(out, "Time and peak memory of one forward pass", costs)
    faster, rounds = result.faster, result.faster.rounds
    out.print(
        f"ours is {faster.median:.2f} times as fast (10-90 %: {faster.p10:.2f}-{faster.p90:.2f}, {rounds} interleaved "
        "rounds)\n"
        "memory is of the first pass in a fresh process: what the pass added, packed weights included, and all\n",
        soft_wrap=True,
    )


def _print_verdict(out: Console, results: list[Result]) -> None:
    rows = [row for result in results for row in result.errors]
    failed = [row for row in rows if not row.ok]
    rule = "err(ours) <= 2 err(transformers) + a few roundings, with and without outlier channels"
    if failed:
        out.print(f"[bold red]FAILED[/]: {len(failed)} of {len(rows)} layers break {rule}", soft_wrap=True)
    else:
        out.print(f"[bold green]EQUAL[/]: all {len(rows)} layers obey {rule}", soft_wrap=True)


def _as_dict(
    results: list[Result], source: checkpoint.Source, ours: torch.nn.Module, args: argparse.Namespace, ok: bool
) -> dict[str, Any]:
    return {
        "model": source.name or "seeded",
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "machine": machine.cpu_name(),
        "versions": machine.versions(),
        "results": [result.as_dict() for result in results],
        "report": str(report(ours)),
        "ok": ok,
    }
