"""Runs one checkpoint on audio: the hidden states at every layer against transformers in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import audio, backends, checkpoint, swap
from .rule import FAIL, PASS, Result, allowed_error, dtype_name, error_of
from .run_models import absence


@torch.no_grad()
def _states(model: nn.Module, waveform: Tensor) -> list[Tensor]:
    first = next(model.parameters())
    outputs = model(waveform.to(first.device, first.dtype), output_hidden_states=True)
    return [*outputs.hidden_states, outputs.last_hidden_state]


def results(
    name: str | None,
    files: Sequence[str],
    wanted: Sequence[str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    allow_truncated: bool = False,
) -> Iterator[Result]:
    """One row per layer, backend, dtype and file.

    Args:
        name: local folder or hub id; None for WavLM-base with seeded sensitive weights.
        files: audio files; none for the clip that comes with the package.
        wanted: backends.
        dtypes: in which the plain and the fast path compute.
        device: on which they do; the truth is computed on the CPU.
        allow_truncated: as `audio.load` takes it.

    Raises:
        UserError: the checkpoint or an audio file cannot be used.
    """
    plain, source = checkpoint.load(name)
    paths = [Path(f) for f in files] or [audio.clip()]
    options = {"at_least": checkpoint.receptive_field(plain), "allow_truncated": allow_truncated}
    loaded = [audio.load(path, **options)[0] for path in paths]
    for dtype in dtypes:
        usual = copy.deepcopy(plain).to(device, dtype)
        exact = copy.deepcopy(usual).to("cpu", torch.float64)
        fast = swap.accelerate(copy.deepcopy(usual))
        for path, samples in zip(paths, loaded, strict=True):
            waveform = checkpoint.prepare(samples, source.normalise).to(dtype)
            base = {"level": "model", "name": source.name or "WavLM-base", "quantity": "forward"}
            base |= {"dtype": dtype_name(dtype), "case": path.name}
            yield from _file(waveform, (usual, exact, fast), wanted, dtype, base)


def _file(
    waveform: Tensor, models: tuple[nn.Module, ...], wanted: Sequence[str], dtype: torch.dtype, base: dict
) -> Iterator[Result]:
    usual, exact, fast = models
    device = next(usual.parameters()).device
    truth = _states(exact, waveform)
    names = [f"hidden_states[{i}]" for i in range(len(truth) - 1)] + ["last_hidden_state"]
    try:
        allowed = [allowed_error(x, t, dtype) for x, t in zip(_states(usual, waveform), truth, strict=True)]
    except RuntimeError as error:
        reason = f"transformers does not run in {dtype_name(dtype)}: {error}"
        yield from (Result(backend=b, reason=reason, **base) for b in wanted)
        return
    for backend in wanted:
        reason = absence(backend, device)
        if reason is not None:
            yield Result(backend=backend, reason=reason, **base)
            continue
        try:
            with backends.use_backend(backend):
                found = _states(fast, waveform)
        except backends.BackendUnavailable as refusal:
            yield Result(backend=backend, reason=str(refusal), **base)
            continue
        for tensor, x, t, most in zip(names, found, truth, allowed, strict=True):
            error = error_of(x, t)
            verdict = PASS if error <= most else FAIL
            yield Result(backend=backend, tensor=tensor, error=error, allowed=most, verdict=verdict, **base)
