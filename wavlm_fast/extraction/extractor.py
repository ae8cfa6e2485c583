"""Waveforms to features: a callable that fits the map functions of datasets, Ray Data and Spark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMConfig

from .. import audio, checkpoint
from ..errors import UserError, first_line
from ..inputs import SAMPLE_RATE, receptive_field
from ..packed_batch import wavlm_of
from ..ragged import forward_ragged
from ..swap import accelerate
from ..truncated import truncate, without_final_norm
from .wanted import CONVENTIONS, Average, Convention, ConventionName, Wanted, What

Output = Tensor | str

_COLUMNS = ("audio", "path")  # of a batch, where none is named
_OF_FRAMES = ("WavLMForCTC", "WavLMForAudioFrameClassification")  # whose logits are


class Extractor:
    """Features of utterances, each as if it were alone, in batches of alike lengths.

    A callable from a batch (a dict of columns) to the batch with one column more, as
    `datasets.Dataset.map(batched=True)`, `ray.data.Dataset.map_batches` and, through a dict of a frame's columns,
    Spark's `mapInPandas` call it. It can be pickled: a checkpoint by name is loaded where it is first called, a model
    goes along as its config and weights.

    Args:
        model: a folder or hub id of a WavLM checkpoint; or a live WavLM of transformers' classes or ours, which is
            copied and gets waveforms as they are; None for seeded weights.
        what: "hidden" (states of layers), "xvector", "logits", "frames" or "text", as the checkpoint's head allows.
        layers: of "hidden": "all", a number or several; 0 is the embedding before the first layer. Layers behind the
            last of them are neither loaded nor run.
        average: of "hidden": "layers", "frames", or both.
        convention: "hf", "s3prl", "fairseq" or "knn-vc": how the readers of the features prepare waveforms and where
            they take the last state.
        dtype: of the model.
        dtype_out: of the features; None for the model's.
        device: where it runs.
        batch_seconds: audio in one batch, in seconds at the most, but for one utterance alone.
        audio_column: the column of the batch: waveforms at 16 kHz, `[S]` each; dicts with `array` and `sampling_rate`;
            or paths of audio files. None for "audio" or, where there is none, "path".
        column: the column that is added; None for the name of `what`.

    Raises:
        UserError: the checkpoint cannot be loaded, or does not hold what is wanted.
    """

    def __init__(
        self,
        model: str | nn.Module | None,
        what: What = "hidden",
        layers: int | Sequence[int] | Literal["all"] = "all",
        average: Average | Sequence[Average] = (),
        convention: ConventionName = "hf",
        dtype: torch.dtype = torch.float32,
        dtype_out: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        batch_seconds: float = 60.0,
        audio_column: str | None = None,
        column: str | None = None,
    ) -> None:
        if not isinstance(layers, str):
            layers = (layers,) if isinstance(layers, int) else tuple(layers)
        averages: tuple[Average, ...] = (average,) if isinstance(average, str) else tuple(average)
        self.wanted: Wanted = Wanted(what, layers, averages, convention)
        self.convention: Convention = CONVENTIONS[convention]
        self.dtype: torch.dtype = dtype
        self.dtype_out: torch.dtype = dtype_out or dtype
        self.device: str | torch.device = device
        self.batch_seconds: float = batch_seconds
        self.audio_column: str | None = audio_column
        self.column: str = column or what
        if not batch_seconds > 0:
            raise UserError(f"batch_seconds must be more than 0, got {batch_seconds}")
        self.name: str | None = None
        self._made_of: tuple[Any, ...] | None = None
        self.config: WavLMConfig
        if isinstance(model, nn.Module):
            live: Any = wavlm_of(model) if what == "hidden" else model
            self.config, saved, name = live.config, [type(live).__name__], "this model"
            self._made_of = _made_of(live)
            if what == "text":
                raise UserError("text needs a checkpoint by name, whose processor spells it, got a live model")
        else:
            self.name = None if model is None else str(model)
            self.config = checkpoint.config_of(self.name)
            saved, name = self.config.architectures or [], self.name or "the seeded model"
        self.architecture: str = self.wanted.class_for(saved, name)
        self.states: tuple[int, ...] = self.wanted.states(self.config.num_hidden_layers) if what == "hidden" else ()
        # Whether each waveform is brought to zero mean and unit variance first.
        said = self.convention.normalise
        self.normalises: bool = checkpoint.source(self.name).normalise if said is None else said
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_processor": None}

    @property
    def model(self) -> Any:
        """The fast model, cut behind the last layer that is needed; loaded when first asked for."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> nn.Module:
        layers, needed = self.config.num_hidden_layers, self._needed
        model: Any
        if self._made_of is None:
            model, _ = checkpoint.load(self.name, self.dtype, architecture=self.architecture, layers=needed)
        else:
            model = _rebuilt(self._made_of, self.architecture).to(self.dtype)
            if needed < layers:
                model = truncate(model, needed)
        if self.states and (needed < layers or not self.convention.final_norm):
            without_final_norm(model.encoder)
        if self.wanted.what == "text":
            self._processor = checkpoint.processor(str(self.name))
        return _primed(accelerate(model.eval().to(self.device)))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the features of its audio, numpy arrays or strings, in one column more.

        Raises:
            UserError: the batch has no audio in the column, or an utterance cannot be used.
        """
        column = self.audio_column or next((name for name in _COLUMNS if name in batch), None)
        if column is None or column not in batch:
            named = self.audio_column or " or ".join(_COLUMNS)
            raise UserError(f"a batch with a column of audio ({named}) is wanted, got {list(batch)}")
        found = self.outputs([waveform_of(item, self.samples_needed) for item in batch[column]])
        arrays: list[np.ndarray[Any, Any] | str] = []
        for item in found:
            if isinstance(item, Exception):
                raise item
            arrays.append(as_array(item))
        return {**batch, self.column: _column(arrays)}

    @property
    def _needed(self) -> int:
        """How many layers are run; without any there would be no list of states."""
        return max(1, *self.states) if self.states else self.config.num_hidden_layers

    @property
    def _only_last(self) -> bool:
        return self.states == (self._needed,)

    @property
    def dimensions(self) -> int:
        """Of the features of an utterance."""
        wanted = self.wanted
        if wanted.what == "hidden":
            return 3 - ("frames" in wanted.average) - ("layers" in wanted.average or wanted.single)
        return 2 if self.architecture in _OF_FRAMES else 1

    @property
    def of_frames(self) -> bool:
        """Whether the last dimension but one is frames."""
        return "frames" not in self.wanted.average if self.wanted.what == "hidden" else self.dimensions == 2

    @property
    def samples_needed(self) -> int:
        """Of the shortest utterance."""
        config, kernels, strides = self.config, [*self.config.conv_kernel], [*self.config.conv_stride]
        if self.wanted.what == "xvector":
            spans = zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
            kernels += [*((k - 1) * d + 1 for k, d in spans), 2]  # there is no deviation of one frame
            strides += [1] * (len(config.tdnn_kernel) + 1)
        return receptive_field(kernels, strides)

    def outputs(self, waveforms: Sequence[Tensor]) -> list[Output | Exception]:
        """The features of each waveform on the CPU, or the error of one that cannot be used.

        Args:
            waveforms: `[S]` float32 each, 16 kHz.

        Returns:
            Hidden states `[T, C]` of one layer or `[L, T, C]` of several, less the dimensions that are averaged;
            embeddings or logits `[C]`; logits of frames `[T, C]`; or text.
        """
        _ = self.model  # loaded here: what is wrong with a checkpoint is no utterance's error
        prepared = [self._pieces(w) for w in waveforms]
        flat = [piece for pieces in prepared for piece in pieces]
        results: list[Any] = [None] * len(flat)
        for indices in batches([len(piece) for piece in flat], self.batch_seconds * SAMPLE_RATE):
            for index, result in zip(indices, self._run([flat[i] for i in indices]), strict=True):
                results[index] = result
        remaining = iter(results)
        return [self._finished([next(remaining) for _ in pieces]) for pieces in prepared]

    def _pieces(self, waveform: Tensor) -> list[Tensor]:
        """An utterance as the convention prepares it, in the pieces that it cuts."""
        if self.normalises:
            waveform = checkpoint.normalised(waveform, self.convention.eps)
        if self.convention.pad_to:
            waveform = F.pad(waveform, (0, self.convention.pad_to - len(waveform) % self.convention.pad_to))
        cut = self.convention.chunk if self.states or self.of_frames else 0  # an embedding is of all there is
        if not cut or len(waveform) <= cut:
            return [waveform]
        pieces = list(waveform.split(cut))
        return pieces if len(pieces[-1]) >= self.samples_needed else pieces[:-1]

    def _run(self, waveforms: list[Tensor]) -> list[Tensor | Exception]:
        """Of a batch; where it fails, of each utterance alone, so that one cannot take others with it."""
        try:
            return self._forward(waveforms)
        except (RuntimeError, ValueError) as error:
            if len(waveforms) == 1:
                return [UserError(f"the model cannot run it: {first_line(error)}")]
            return [result for waveform in waveforms for result in self._run([waveform])]

    @torch.inference_mode()
    def _forward(self, waveforms: list[Tensor]) -> list[Tensor | Exception]:
        model = self.model
        given = {"output_hidden_states": True} if self.states and not self._only_last else {}
        found = forward_ragged(model, [w.to(self.device, self.dtype) for w in waveforms], **given)
        return [self._read(out) for out in found]

    def _read(self, out: Any) -> Tensor:
        if not self.states:
            return (out.embeddings if self.wanted.what == "xvector" else out.logits)[0]
        # The last of transformers' list has seen an encoder's final norm in version 4 and has not in version 5.
        last = self._needed
        states = [out.last_hidden_state if n == last else out.hidden_states[n] for n in self.states]
        return torch.cat(states)  # [L, T, C]: the batch is one utterance

    def _reduced(self, states: Tensor) -> Tensor:
        """States `[L, T, C]` of a whole utterance without the dimensions that are averaged or of one layer."""
        if "frames" in self.wanted.average:
            states = states.float().mean(1, keepdim=True)
        if "layers" in self.wanted.average:
            states = states.float().mean(0, keepdim=True)
        if "frames" in self.wanted.average:
            states = states.squeeze(1)
        return states.squeeze(0) if "layers" in self.wanted.average or self.wanted.single else states

    def _finished(self, pieces: list[Tensor | Exception]) -> Output | Exception:
        whole = []
        for piece in pieces:
            if isinstance(piece, Exception):
                return piece
            whole.append(piece)
        value = whole[0] if len(whole) == 1 else torch.cat(whole, -2)
        value = (self._reduced(value) if self.states else value).cpu()
        if self.wanted.what == "text":
            return checkpoint.transcribed(self._processor, value)
        found = value.to(self.dtype_out)
        if not bool(found.isfinite().all()):
            kind = str(self.dtype_out if bool(value.isfinite().all()) else self.dtype).removeprefix("torch.")
            return UserError(f"its features do not fit into {kind}: the largest is {float(value.abs().max()):g}")
        return found


def batches(lengths: Sequence[int], budget: float) -> Iterator[list[int]]:
    """Indices of batches of at most so many samples, alike ones together, the longest first."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and total + lengths[index] > budget:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


def waveform_of(item: Any, at_least: int) -> Tensor:
    """A waveform `[S]`, 16 kHz, of what a column of audio holds.

    Raises:
        UserError: it is no waveform, or too short.
    """
    if isinstance(item, (str, bytes)) or hasattr(item, "__fspath__"):
        return audio.load(item, at_least=at_least)[0]
    if isinstance(item, dict) and item.get("array") is None and item.get("path"):
        return audio.load(item["path"], at_least=at_least)[0]
    rate = SAMPLE_RATE
    if isinstance(item, dict):
        item, rate = item.get("array"), item.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise UserError(f"waveforms at {SAMPLE_RATE} Hz are wanted, got one at {rate} Hz")
    try:
        waveform = torch.as_tensor(np.asarray(item, np.float32))
    except (TypeError, ValueError):
        raise UserError(f"waveforms, dicts with 'array' or paths are wanted, got a {type(item).__name__}") from None
    if waveform.dim() != 1 or len(waveform) < at_least:
        raise UserError(f"waveforms of {at_least} samples or more are wanted, got one of shape {list(waveform.shape)}")
    if not bool(waveform.isfinite().all()):
        raise UserError("finite samples are wanted, got NaN or infinity")
    return waveform


def as_array(item: Output) -> np.ndarray[Any, Any] | str:
    """As numpy has it; bfloat16 as float32."""
    if isinstance(item, str):
        return item
    return (item.float() if item.dtype == torch.bfloat16 else item).numpy()


def _column(items: list[Any]) -> np.ndarray[Any, Any] | list[Any]:
    """One array where all are of a shape, else a list."""
    if not items or isinstance(items[0], str) or len({item.shape for item in items}) > 1:
        return items
    return np.stack(items)


@torch.inference_mode()
def _primed(model: nn.Module) -> nn.Module:
    """The model, its weight norm computed and remembered: torch's sums depend on how many threads it has, and features
    shall not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parameter = next(model.parameters())
        forward_ragged(model, [torch.zeros(SAMPLE_RATE, dtype=parameter.dtype, device=parameter.device)])
    finally:
        torch.set_num_threads(threads)
    return model


def _made_of(model: Any) -> tuple[Any, ...]:
    """What a live model is built from again: config and weights, as modules with weight norm do not pickle."""
    return model.config.to_dict(), {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _rebuilt(made_of: tuple[Any, ...], architecture: str) -> nn.Module:
    config, state = made_of
    model = checkpoint.blank(config, architecture)
    model.load_state_dict(state)
    return model


