"""`wavlm-fast batches`: what becomes of an utterance that is padded into a batch, in transformers and in ours."""

from __future__ import annotations

import argparse
import copy
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from . import audio, checkpoint, machine
from .console import DTYPES, add_model_arguments, apply_threads, console, print_table, table, write_json
from .padding import Padding
from .parity.rule import allowed_error, error_of, magnitude
from .swap import accelerate

_PARTS = (1, 2, 4, 8)  # of the recording: the whole of it, a half of it and so on
_OURS: dict[str, Padding] = {"ours, padding='transformers'": "transformers", "ours, padding='exact'": "exact"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast batches`."""
    parser.add_argument("audio", nargs="?", help="an audio file (default: a clip of real speech)")
    add_model_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help='write everything measured to FILE ("-": standard output)')


@dataclass
class Row:
    """One utterance: max |in the batch - alone| / max |alone| of the last hidden states, by who computes them."""

    seconds: float
    off: dict[str, float]
    error: float  # of ours in an exact batch against float64 on the utterance alone, relative like the others
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the exact batch is right by the parity rule."""
        return self.error <= self.allowed


def run(args: argparse.Namespace) -> int:
    """Print the differences; 0 when those of exact batches obey the parity rule, 1 when one does not."""
    apply_threads(args.threads)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # transformers, with a mask
    out = console() if args.json != "-" else Console(stderr=True, highlight=False)
    plain, source = checkpoint.load(args.model, DTYPES[args.dtype])
    waveform, info = audio.load(args.audio or audio.clip(), at_least=len(_PARTS) * checkpoint.receptive_field(plain))
    waveforms = [checkpoint.prepare(waveform[: len(waveform) // part], source.normalise)[0] for part in _PARTS]
    waveforms = [w.to(next(plain.parameters()).dtype) for w in waveforms]
    rows = _compared(plain, waveforms, args.device)
    out.print(f"model    {source}, {args.dtype}", markup=False, soft_wrap=True)
    out.print(f"machine  {machine.cpu_name()}", markup=False, soft_wrap=True)
    out.print(f"{info}\n", markup=False, soft_wrap=True)
    _print(out, rows)
    ok = all(row.ok for row in rows)
    if args.json:
        write_json(args.json, {"rows": [{**asdict(row), "ok": row.ok} for row in rows], "ok": ok})
    return 0 if ok else 1


def _compared(plain: nn.Module, waveforms: list[Tensor], device: str) -> list[Row]:
    exact = copy.deepcopy(plain).double()
    models = {name: accelerate(copy.deepcopy(plain), padding=mode).to(device) for name, mode in _OURS.items()}
    models = {"transformers": plain.to(device)} | models
    batch = _padded([w.to(device) for w in waveforms])
    with torch.inference_mode():
        truths = [_states(exact, {"input_values": w[None].double()})[0] for w in waveforms]
        batches = {name: _states(model, batch) for name, model in models.items()}
        alone = {
            name: [_states(model, {"input_values": w[None].to(device)})[0] for w in waveforms]
            for name, model in models.items()
        }
    rows = []
    for index, (waveform, truth) in enumerate(zip(waveforms, truths, strict=True)):
        size, frames = magnitude(truth), len(truth)
        found = {name: batches[name][index, :frames] for name in models}
        usual = alone["transformers"][index]
        rows.append(
            Row(
                seconds=len(waveform) / audio.RATE,
                off={name: error_of(found[name], alone[name][index].double()) / size for name in models},
                error=error_of(found["ours, padding='exact'"], truth) / size,
                allowed=allowed_error(usual, truth, waveform.dtype) / size,
            )
        )
    return rows


def _padded(waveforms: list[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(w) for w in waveforms])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return {"input_values": padded, "attention_mask": mask.long().to(padded.device)}


def _states(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).last_hidden_state.cpu()


def _print(out: Console, rows: list[Row]) -> None:
    names = list(rows[0].off)
    shown = table("utterance", *names, "exact, error", "allowed", "")
    for row in rows:
        off = (f"{row.off[name]:.1e}" for name in names)
        verdict = "ok" if row.ok else "[bold red]FAIL[/]"
        shown.add_row(f"{row.seconds:.2f} s", *off, f"{row.error:.1e}", f"{row.allowed:.1e}", verdict)
    print_table(out, "max |in a padded batch - alone| / max |alone|, last hidden states", shown)
    out.print(
        "all of them are one batch, padded to the first; the error is that of an exact batch against transformers in "
        "float64\non the utterance alone, allowed is twice that of transformers in this dtype and a few roundings",
        soft_wrap=True,
    )
