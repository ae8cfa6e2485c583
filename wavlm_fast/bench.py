"""`wavlm-fast bench`: times of transformers and of ours, for providers that were right first."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from . import audio, backends, checkpoint, machine, measure
from .console import (
    DTYPES,
    add_model_arguments,
    apply_threads,
    console,
    positive_int,
    positive_seconds,
    print_table,
    rounds,
    table,
    write_json,
)

BASELINE = "transformers eager"


@dataclass(frozen=True)
class Provider:
    """One way to run the model: which of the two models, and what to run it inside of."""

    fast: bool
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Row:
    """One provider in one case. Without `problem` it has times."""

    case: str
    provider: str
    error: float | None = None  # of the output, against float64
    problem: str | None = None
    wrong: bool = False  # it ran and its result is not to be trusted
    seconds: measure.Timing | None = None
    factor: float | None = None  # seconds of audio per second
    faster: measure.Timing | None = None  # than the baseline, round by round

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        timings = {name: getattr(self, name) and getattr(self, name).as_dict() for name in ("seconds", "faster")}
        return {**vars(self), **timings}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast bench`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--seconds", type=positive_seconds, nargs="+", default=[2.0, 10.0, 30.0], metavar="S", help="default: 2 10 30"
    )
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1], metavar="B", help="default: 1")
    parser.add_argument(
        "--rounds", type=rounds, default=7, metavar="N", help="timed runs of each, 5 or more (default: 7)"
    )
    parser.add_argument("--quick", action="store_true", help="two seconds of audio, batch 1, 5 rounds")
    parser.add_argument("--json", metavar="FILE", help='write the results to FILE ("-": standard output)')


def run(args: argparse.Namespace) -> int:
    """Verify and time; 1 when a provider is wrong."""
    apply_threads(args.threads)
    if args.quick:
        args.seconds, args.batch, args.rounds = [2.0], [1], 5
    out = console() if args.json != "-" else Console(stderr=True, highlight=False)
    theirs, source = checkpoint.load(args.model, DTYPES[args.dtype])
    truth = copy.deepcopy(theirs).double()
    models = {True: checkpoint.accelerated(theirs).to(args.device), False: theirs.to(args.device)}
    _print_head(out, source, args)
    rows: list[Row] = []
    for batch in args.batch:
        for seconds in args.seconds:
            waveforms = _utterances(batch, int(seconds * audio.RATE), source.normalise, theirs)
            found = _run_case(f"{batch} x {seconds:g} s", waveforms, models, truth, args)
            _print_case(out, found)
            rows += found
    if args.json:
        head = {"model": source.name or "seeded", "dtype": args.dtype, "device": args.device}
        about = {"threads": torch.get_num_threads(), "machine": machine.cpu_name(), "versions": machine.versions()}
        write_json(args.json, {**head, **about, "rows": [row.as_dict() for row in rows]})
    return 1 if any(row.wrong for row in rows) else 0


def providers(device: str) -> dict[str, Provider]:
    """Everything that this machine can run, the baseline first."""
    found = {BASELINE: Provider(fast=False), "wavlm_fast auto": Provider(fast=True, context=_backend("auto"))}
    for name in backends.names():
        if backends.load(name).why_not(torch.device(device)) is None:
            found[f"wavlm_fast {name}"] = Provider(fast=True, context=_backend(name))
    return found


def _backend(name: str) -> Callable[[], AbstractContextManager]:
    return lambda: backends.use_backend(name)


def _utterances(batch: int, samples: int, normalise: bool, model: nn.Module) -> torch.Tensor:
    """[B, S] of real speech, repeated to the length, in the model's dtype."""
    waveforms = audio.utterances(batch, max(samples, checkpoint.receptive_field(model)))
    prepared = torch.cat([checkpoint.prepare(waveform, normalise) for waveform in waveforms])
    return prepared.to(next(model.parameters()).dtype)


def _run_case(
    case: str, waveforms: torch.Tensor, models: Mapping[bool, nn.Module], truth: nn.Module, args: argparse.Namespace
) -> list[Row]:
    exact = measure.layers(truth, waveforms)
    plain = measure.layers(models[False], waveforms)
    rows, calls = [], {}
    for name, provider in providers(args.device).items():
        row = Row(case, name)
        rows.append(row)
        _verify(row, provider, models[provider.fast], waveforms, plain, exact)
        if row.problem is None:
            calls[name] = _call(provider, measure.forward(models[provider.fast], waveforms))
    seconds = measure.interleave(calls, args.rounds, args.device)
    for row in rows:
        if row.provider in seconds:
            row.seconds = measure.Timing.of(seconds[row.provider])
            row.factor = waveforms.numel() / audio.RATE / row.seconds.median
            if BASELINE in seconds:
                row.faster = measure.ratio(seconds[BASELINE], seconds[row.provider])
    return rows


def _call(provider: Provider, forward: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with provider.context():
            return forward()

    return call


def _verify(
    row: Row,
    provider: Provider,
    model: nn.Module,
    waveforms: torch.Tensor,
    plain: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
) -> None:
    """Fill in the error, and the problem of a provider that refuses or breaks the parity rule at any layer."""
    try:
        with provider.context():
            found = measure.compare(plain, measure.layers(model, waveforms), exact)
    except backends.BackendUnavailable as error:
        row.problem = f"refused: {error}"
        return
    row.error = found[-1].all.ours
    broken = next((layer for layer in found if not layer.ok), None)
    if broken is not None:
        row.wrong = True
        worst = broken.all if not broken.all.ok else broken.ordinary
        row.problem = f"wrong: {broken.layer} is off by {worst.ours:.2e}, {worst.allowed:.2e} is allowed"


def _print_head(out: Console, source: checkpoint.Source, args: argparse.Namespace) -> None:
    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else machine.device_name(args.device)
    out.print(f"model    {source}, {args.dtype}", markup=False, soft_wrap=True)
    out.print(f"machine  {machine.cpu_name()}, {where}", markup=False, soft_wrap=True)
    out.print(f"versions {machine.one_line_versions()}\n", markup=False, soft_wrap=True)


def _print_case(out: Console, rows: list[Row]) -> None:
    shown = table("provider", "seconds", "10-90 %", "real-time factor", "times as fast", "10-90 %", "error")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.2e}"
        if row.seconds is None:
            shown.add_row(row.provider, "-", "-", "-", "-", "-", error)
            continue
        timing, faster = row.seconds, row.faster
        ratio = (f"{faster.median:.2f}", f"{faster.p10:.2f}-{faster.p90:.2f}") if faster else ("-", "-")
        spread = f"{timing.p10:.3f}-{timing.p90:.3f}"
        shown.add_row(row.provider, f"{timing.median:.3f}", spread, f"{row.factor:.1f}", *ratio, error)
    print_table(out, f"{rows[0].case} of speech", shown)
    for row in rows:
        if row.problem:
            out.print(f"{row.provider} is not timed: {row.problem}\n", markup=False, soft_wrap=True)
