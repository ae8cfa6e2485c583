"""`wavlm-fast extract`: hidden states of audio files, one file per utterance, each written whole or not at all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import audio, checkpoint, machine
from .console import DTYPES, add_model_arguments, add_truncated_argument, apply_threads, console
from .errors import UserError
from .files import remove_unfinished, write_atomically

_SUFFIXES = {"npz": ".npz", "pt": ".pt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast extract`."""
    parser.add_argument("audio", nargs="+", help="audio files: wav, flac, ogg or mp3; each is run by itself, unpadded")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for NAME.npz or NAME.pt, made if missing")
    add_model_arguments(parser)
    parser.add_argument(
        "--layer",
        type=_layer,
        default="all",
        metavar="N|all",
        help="0 is the embedding before the first layer, N the output of layer N, negative counts from the end "
        "(default: all, stacked)",
    )
    parser.add_argument(
        "--format",
        choices=sorted(_SUFFIXES),
        default="npz",
        help="npz: numpy arrays, bfloat16 stored as float32; pt: torch.save (default: npz)",
    )
    add_truncated_argument(parser)
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def _layer(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a layer number or 'all' is wanted, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Extract; 0 when every file is written. Everything that can be refused is refused before the first is."""
    apply_threads(args.threads)
    targets = _targets(args.audio, Path(args.out), _SUFFIXES[args.format], args.force)
    for path, _ in targets:
        audio.check(path, allow_truncated=args.allow_truncated)
    model, source = checkpoint.load(args.model, DTYPES[args.dtype])
    layer = _checked_layer(args.layer, model.config.num_hidden_layers)
    shortest = checkpoint.receptive_field(model)
    model = checkpoint.accelerated(model).to(args.device)
    out = console()
    out.print(f"model {source}", markup=False, soft_wrap=True)
    _make_folder(Path(args.out))
    remove_unfinished(Path(args.out))
    with _progress(out) as progress:
        task = progress.add_task("extract", total=len(targets))
        for path, target in targets:
            waveform, info = audio.load(path, at_least=shortest, allow_truncated=args.allow_truncated)
            if info.incomplete:
                progress.console.print(str(info), markup=False, soft_wrap=True)
            hidden = _hidden_states(model, checkpoint.prepare(waveform, source.normalise), layer)
            _write(target, _record(hidden, layer, info, source), args.format)
            progress.console.print(f"{target}  {tuple(hidden.shape)}", markup=False, soft_wrap=True)
            progress.advance(task)
    return 0


def _targets(paths: Sequence[str], folder: Path, suffix: str, force: bool) -> list[tuple[str, Path]]:
    """Each audio file with where its hidden states go.

    Raises:
        UserError: two would go to one file, or a file exists and may not be overwritten.
    """
    sources: dict[Path, str] = {}
    for path in paths:
        target = folder / (Path(path).stem + suffix)
        if target in sources:
            raise UserError(
                f"file names without their endings must differ, but {sources[target]} and {path} share {target}"
            )
        if target.exists() and not force:
            raise UserError(f"{target} exists already; --force overwrites it")
        sources[target] = path
    return [(path, target) for target, path in sources.items()]


def _checked_layer(layer: int | str, layers: int) -> int | str:
    if isinstance(layer, str):
        return layer
    if not -layers - 1 <= layer <= layers:
        raise UserError(f"--layer must lie in 0..{layers} for this model (or -{layers + 1}..-1, or 'all'), got {layer}")
    return layer % (layers + 1)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be made: {error.strerror or error}") from error


def _progress(out: Any) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=out, disable=not out.is_terminal)


def _hidden_states(model: torch.nn.Module, waveform: torch.Tensor, layer: int | str) -> torch.Tensor:
    """[T, C] of one layer, or [layers + 1, T, C] of all, on the CPU."""
    parameter = next(model.parameters())
    with torch.inference_mode():
        out = model(waveform.to(parameter.device, parameter.dtype), output_hidden_states=True)
    states = out.hidden_states if layer == "all" else out.hidden_states[layer : layer + 1]
    stacked = torch.cat(states).cpu()  # [layers, T, C]: the batch is one utterance
    return stacked if layer == "all" else stacked[0]


def _record(hidden: torch.Tensor, layer: int | str, info: audio.AudioInfo, source: checkpoint.Source) -> dict[str, Any]:
    return {
        "hidden_states": hidden,
        "layer": str(layer),
        "audio": info.path,
        "samples": info.samples,
        "sample_rate": audio.RATE,
        "model": source.name or "seeded",
        "wavlm_fast": machine.versions()["wavlm-fast"],
    }


def _write(target: Path, record: dict[str, Any], kind: str) -> None:
    def save(file: Any) -> None:
        if kind == "pt":
            torch.save(record, file)
            return
        hidden = record["hidden_states"]
        hidden = hidden.float() if hidden.dtype == torch.bfloat16 else hidden
        np.savez(file, **{**record, "hidden_states": hidden.numpy()})

    try:
        write_atomically(target, save)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
