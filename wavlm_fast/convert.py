"""`wavlm-fast convert`: a WavLM from one house's checkpoint to another's, checked by running both."""

from __future__ import annotations

import argparse
import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from . import audio, checkpoint, conversion, measure, original, torch_files
from .console import console
from .errors import UserError, first_line
from .files import remove_unfinished, settle, unfinished_folder
from .swap import restore

HOUSES = {
    "transformers": "transformers' folder",
    "microsoft": "Microsoft's file of cfg and model",
    "torchaudio": "torchaudio's state dict",
}
_SUFFIXES = {".pt": "microsoft", ".pth": "torchaudio"}
_OTHER_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".onnx")  # whoever gives one does not mean a folder
# What a folder that --overwrite may replace can hold, by the ends of names.
_OF_A_MODEL = ("config.json", ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a transformers folder or hub id, Microsoft's .pt (cfg and model) or torchaudio's state dict, by whatever "
        "name; a file with code in it is refused",
    )
    parser.add_argument("dest", metavar="DEST", type=Path, help="what to write: there once it is whole and checked")
    parser.add_argument(
        "--to",
        choices=list(HOUSES),
        help="what DEST becomes (default: microsoft where it ends in .pt, torchaudio where it ends in .pth, else "
        "transformers, a folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DEST if it is there (default: it is refused)")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not run both on a clip of speech (default: each runs in its house's own class, and a result that is "
        "off by more than rounding is thrown away; from or to torchaudio that needs the package torchaudio)",
    )


@dataclass
class Model:
    """A checkpoint in memory."""

    house: str
    config: Any  # transformers' WavLMConfig, Microsoft's cfg or the arguments of torchaudio.models.wavlm_model
    state: dict[str, Tensor]
    normalise: bool  # whether utterances are to be normalised before they enter
    said: list[str] = field(default_factory=list)  # what is not taken along, and what was assumed


def run(args: argparse.Namespace) -> int:
    """Convert; 0 when the result is there and equal, 1 when it came out different and is not left there."""
    out, dest = console(), args.dest
    if args.to is None and dest.suffix in _OTHER_SUFFIXES:
        raise UserError(f"a folder, a .pt or a .pth is wanted, or any name and --to, got {dest}")
    house = args.to or _SUFFIXES.get(dest.suffix, "transformers")
    _refuse_dest(dest, args.overwrite)
    checkpoint.quieten()
    source = load(args.source)
    if source.house == house:
        raise UserError(f"{args.source} is {HOUSES[house]} already, and that is what {dest} is to become")
    if not args.no_check:
        _refuse_without_torchaudio(source.house, house)
    converted = convert(source, house)
    _print_head(out, args.source, source, dest, converted)
    parent = dest.absolute().parent
    try:
        remove_unfinished(parent)
        with unfinished_folder(parent) as folder:
            written = folder / "new"
            _write(written, converted)
            converted.state = {}  # what is checked is what is on the disk
            if not args.no_check and not _equal(out, source, written, converted):
                return 1
            _put(written, dest, folder / "old", args.overwrite)
    except OSError as error:
        raise UserError(f"{dest} cannot be written: {error.strerror or first_line(error)}") from error
    out.print(f"written  {dest}", markup=False, soft_wrap=True)
    return 0


def load(name: str) -> Model:
    """Read a checkpoint of any house.

    Args:
        name: a folder, a file or a hub id.

    Raises:
        UserError: it is none of a WavLM.
    """
    path = Path(name).expanduser()
    if path.is_dir() or not (path.is_file() or path.suffix in _SUFFIXES):
        return _load_transformers(name)
    found = torch_files.read(path)
    if found.house == "microsoft" and found.cfg is not None:
        return Model("microsoft", found.cfg, found.state, found.cfg.get("normalize") is True, found.said)
    arguments, said = conversion.torchaudio_arguments(found.state)
    return Model("torchaudio", arguments, found.state, arguments["extractor_mode"] == "layer_norm", said)


def _load_transformers(name: str) -> Model:
    model, source = checkpoint.load(name, dtype=None)
    heads = [a for a in model.config.architectures or () if a != "WavLMModel"]
    said = [f"the head of {' and '.join(heads)} stays behind"] if heads else []
    return Model("transformers", model.config, model.state_dict(), source.normalise, said)


def convert(source: Model, house: str) -> Model:
    """The model in another house.

    Raises:
        UserError: it has something that the other lacks, or its weights are not those of its configuration.
    """
    middle: Any = (source.config, source.state, [])
    if source.house == "microsoft":
        middle = conversion.from_microsoft(source.config, source.state)
    elif source.house == "torchaudio":
        middle = conversion.from_torchaudio(source.config, source.state)
    config, state, said = middle
    if house == "microsoft":
        config, state, more = conversion.to_microsoft(config, state, source.normalise)
    elif house == "torchaudio":
        config, state, more = conversion.to_torchaudio(config, state)
    else:
        more = []
    said = [*source.said, *said, *more]
    if house == "torchaudio" and source.normalise:
        said.append("utterances are to be normalised to mean 0 and variance 1, which torchaudio's weights do not say")
    return Model(house, config, state, source.normalise, list(dict.fromkeys(said)))


def build(model: Model) -> Any:
    """The house's own class with the weights as they are, in eval mode.

    Raises:
        UserError: the class takes no such configuration.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            built = _blank(model)
    except Exception as error:  # whatever a class says of sizes that it cannot have
        raise UserError(f"{HOUSES[model.house]} cannot be a model: {first_line(error)}") from error
    built.load_state_dict(model.state, assign=True)
    return built.eval()


def _blank(model: Model) -> nn.Module:
    if model.house == "transformers":
        return checkpoint.blank(model.config.to_dict(), "WavLMModel")
    if model.house == "microsoft":
        return restore(original.WavLM(original.WavLMConfig(model.config)))
    return importlib.import_module("torchaudio.models").wavlm_model(**model.config)


def _refuse_without_torchaudio(*houses: str) -> None:
    if "torchaudio" not in houses:
        return
    try:
        importlib.import_module("torchaudio.models")
    except Exception as error:  # its binaries may be another torch's
        missing = isinstance(error, ModuleNotFoundError)
        why = "is not installed" if missing else f"cannot be imported ({first_line(error)})"
        raise UserError(f"the check needs the package torchaudio, which {why}; --no-check does without") from error


def _refuse_dest(dest: Path, overwrite: bool) -> None:
    if not dest.absolute().parent.is_dir():
        raise UserError(f"{dest} cannot be written: there is no folder {dest.parent}")
    if not os.path.lexists(dest):
        return
    if not overwrite:
        raise UserError(f"{dest} is there already; --overwrite replaces it")
    if dest.is_dir():
        others = sorted(entry.name for entry in dest.iterdir() if not entry.name.endswith(_OF_A_MODEL))
        if others:
            raise UserError(f"a folder with a model and nothing else can be replaced, but {dest} holds {others[0]}")
    elif not dest.is_file():
        raise UserError(f"a file or a folder can be replaced, but {dest} is neither")


def _write(target: Path, model: Model) -> None:
    try:
        if model.house == "transformers":
            _write_transformers(target, model)
        else:
            content = {"cfg": model.config, "model": model.state} if model.house == "microsoft" else model.state
            with target.open("wb") as file:
                torch.save(content, file)
    except (RuntimeError, SafetensorError) as error:  # what becomes of an OSError on its way through C++ and Rust
        raise OSError(first_line(error)) from error
    for path in target.iterdir() if target.is_dir() else [target]:
        settle(path)


def _write_transformers(target: Path, model: Model) -> None:
    build(model).save_pretrained(target)
    transformers.Wav2Vec2FeatureExtractor(
        do_normalize=model.normalise,
        return_attention_mask=model.config.feat_extract_norm == "layer",  # as in the published ones
    ).save_pretrained(target)


def _put(written: Path, dest: Path, aside: Path, overwrite: bool) -> None:
    _refuse_dest(dest, overwrite)  # another may have come there meanwhile
    try:
        if os.path.lexists(dest) and (dest.is_dir() or written.is_dir()):  # which no rename replaces
            os.replace(dest, aside)
        os.replace(written, dest)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(dest):
            os.replace(aside, dest)
        raise


def _equal(out: Console, source: Model, written: Path, converted: Model) -> bool:
    """Whether what is on the disk computes what the source computes, by the parity rule."""
    waveform, info = audio.load(audio.clip())
    rows = compared(source, waveform, written, converted)
    failed = [row for row in rows if not row.ok]
    shown = failed[0] if failed else max(rows, key=lambda row: row.all.ours / (row.largest or 1.0))
    ours, theirs = (f"{error / (shown.largest or 1.0):.1e}" for error in (shown.all.ours, shown.all.theirs))
    errors = f"{shown.layer}: off by {ours} of the largest value against float64, the source itself by {theirs}"
    if failed:
        said = f"FAILED   {len(failed)} of {len(rows)} hidden states differ, first {errors}; nothing is written"
    else:
        said = f"equal    {len(rows)} hidden states of {info.seconds:.1f} s of speech, the worst {errors}"
    out.print(said, markup=False, soft_wrap=True)
    return not failed


def compared(source: Model, waveform: Tensor, written: Path, converted: Model) -> list[measure.LayerError]:
    """The errors of the source and of what was written, each in its house's own class in float32, against the source
    in float64, on a waveform [S]. The source's weights are gone after it, for there to be one model at a time."""
    prepared = checkpoint.prepare(waveform, source.normalise)
    model = build(source).float()
    source.state = {}
    theirs, exact = states(model, prepared), states(model.double(), prepared)
    del model
    found = load(str(written))
    if found.house == "torchaudio":  # the file does not say all of it
        found.config, found.normalise = converted.config, converted.normalise
    ours = states(build(found).float(), checkpoint.prepare(waveform, found.normalise))
    return measure.compare(theirs, ours, exact)


def states(model: Any, waveform: Tensor) -> dict[str, Tensor]:
    """The output `[B, T, C]` of every layer and of the encoder with its last norm, of any house's class on `[B, S]`."""
    found = {}

    def keep(name: str, time_first: bool = False) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output if isinstance(output, Tensor) else output[0]
            found[name] = (value.transpose(0, 1) if time_first else value).clone()

        return hook

    microsoft = hasattr(model, "post_extract_proj")
    encoder = model.encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.transformer.layers
    handles = [
        layer.register_forward_hook(keep(f"layer {index}", microsoft)) for index, layer in enumerate(layers, start=1)
    ]
    handles.append(encoder.register_forward_hook(keep("output")))
    try:
        with torch.inference_mode():
            waveform = waveform.to(next(model.parameters()).dtype)
            model.extract_features(waveform) if microsoft else model(waveform)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _print_head(out: Console, name: str, source: Model, dest: Path, converted: Model) -> None:
    count = sum(value.numel() for value in source.state.values())
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in source.state.values()}))
    lines = [
        f"source   {name}: {HOUSES[source.house]}, {count / 1e6:.1f} M parameters, {dtypes}",
        f"result   {dest}: {HOUSES[converted.house]}",
        *(f"note     {said}" for said in converted.said),
    ]
    if converted.house == "torchaudio":
        arguments = ", ".join(f"{key}={value!r}" for key, value in converted.config.items())
        lines.append(f"built by torchaudio.models.wavlm_model({arguments})")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
