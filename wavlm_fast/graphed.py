"""A model behind CUDA graphs: one replay in place of hundreds of kernel launches."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, derived
from ._locks import ForkSafeLock
from ._private import buffers_of, parameters_of, version
from .modules._originals import methods_of
from .modules._plain import has_hooks

logger = logging.getLogger("wavlm_fast")

_DEVICE_TYPE = "cuda"  # of ROCm devices too
_TENSORS = ("input_values", "attention_mask")
_FLAGS = ("output_hidden_states", "output_attentions", "return_dict")
# Kernels are compiled and weights merged in the first run; allocations have settled after the third.
_WARM_UPS = 3
_WEIGHTS = "weights were moved, replaced or changed in place; capture() makes graphs for them as they are"


def graphed(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, clone: bool = True
) -> Graphed:
    """Capture the model's inference as CUDA graphs, one for each example, and return what replays them.

    A graph has the shapes that it was captured with, and is replayed for exactly these: batch, samples, dtype, with or
    without a mask. Shorter inputs are not padded into it. Where the front end's norm is over time (`feat_extract_norm`
    "group", the base models) padding changes every frame by transformers' definition, and elsewhere the sums over a
    longer input are rounded differently. Whoever pads utterances to a few lengths, with an attention mask, gets a graph
    for each length and decides about the padding himself.

    What no graph can do runs on the model itself, so the result is never wrong, only slower: other shapes, gradients
    enabled, training mode, labels, another autocast state, backend or precision than at the capture, hooks, replaced
    modules, weights that were moved or changed in place. (Writes through `.data` are not seen, and need not be: a graph
    reads the weights themselves, and what is derived from them is derived again in each replay.) Without a CUDA or ROCm
    device everything does. Each reason is logged once, counted in `fallbacks` and told by `str()` of the result.

    Args:
        model: an accelerated WavLM on a GPU, in eval mode.
        example_inputs: keyword arguments as the model is called with, or a list of such dicts: `input_values`, perhaps
            `attention_mask`, and the flags `output_hidden_states`, `output_attentions` and `return_dict`. Values
            and devices do not matter.
        clone: whether each call returns tensors of its own. With False they are the graph's, and the next call with
            the same shapes overwrites them.

    Returns:
        A callable with the model's signature.

    Raises:
        TypeError: `model` is no torch module, or an example is no dict of the above.
    """
    return Graphed(model, example_inputs, clone)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: Any


class Graphed:
    """What `graphed` returns.

    `fallbacks` counts the calls that ran on the model itself by the reason why.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, clone: bool) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"graphed wants a torch module, got a {type(model).__name__}")
        self.model: nn.Module = model
        self.fallbacks: Counter[str] = Counter()
        self.__signature__: inspect.Signature = inspect.signature(model.forward)
        self._examples = [_checked(e) for e in _listed(example_inputs)]
        self._clone = clone
        self._lock = ForkSafeLock()
        self._graphs: dict[Hashable, _Graph] = {}
        self.capture()

    def capture(self) -> None:
        """Make all graphs anew, for the model and torch's settings as they are now."""
        with self._lock:
            reason = why_not(self.model)
            self._forget(reason or "the last capture() was not completed")
            if reason is None:
                self._refusal = reason = self._capture_all()
            if reason is not None:
                logger.info("no CUDA graphs: %s", reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs."""
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        fits = len(given) == len(args) + len(kwargs)
        reason = self._refusal or (_why_not_arguments(given) if fits else "the arguments do not fit the signature")
        graph = self._graphs.get(_key(given)) if reason is None else None
        reason = reason or self._why_not(given, graph)
        if graph is not None and reason is None:
            return self._replay(graph, given)
        assert reason is not None
        if reason not in self.fallbacks:
            logger.info("a call runs without a CUDA graph: %s", reason)
        self.fallbacks[reason] += 1
        return self.model(*args, **kwargs)

    def __str__(self) -> str:
        lines = [f"{len(self._graphs)} CUDA graphs"]
        lines += [f"  {_described(key)}" for key in self._graphs]
        if self._refusal is not None:
            lines.append(f"no graphs: {self._refusal}")
        return "\n".join(lines + [f"{count} calls without one: {reason}" for reason, count in self.fallbacks.items()])

    def _forget(self, refusal: str | None) -> None:
        self._graphs.clear()
        self._state: dict[str, Any] = {}
        self._held: list[Any] = []
        self._refusal = refusal

    def _why_not(self, given: dict[str, Any], graph: _Graph | None) -> str | None:
        """Why `graph` cannot serve a call; None when it can."""
        if torch.is_grad_enabled():
            return "gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"
        if graph is None:
            return f"no graph has these inputs: {_described(_key(given))}"
        if torch.cuda.is_current_stream_capturing():
            return "the stream is being captured already"
        reason = next((why for why, seen in _look_at(self.model).items() if seen != self._state[why]), None)
        if reason == _WEIGHTS:
            with self._lock:
                self._forget(_WEIGHTS)
        return reason

    def _capture_all(self) -> str | None:
        """Make the graphs; what a capture stumbled over, if one did."""
        self._device = next(self.model.parameters()).device
        self._stream = torch.cuda.Stream(self._device)
        self._done = torch.cuda.Event()
        pool = torch.cuda.graph_pool_handle()
        for given in sorted(self._examples, key=lambda e: -e["input_values"].numel()):  # smaller ones reuse its memory
            call = {name: v.detach().to(self._device) if name in _TENSORS else v for name, v in given.items()}
            if _key(call) in self._graphs:
                continue
            try:
                self._graphs[_key(call)] = self._captured(call, pool)
            except _CaptureError as error:
                self._graphs.clear()
                return f"the model cannot be captured: {error}"
        self._state = _look_at(self.model)
        # Graphs read memory by its address. What is held cannot be given to someone else.
        weights = [*self.model.parameters(), *self.model.buffers()]
        self._held = [*(w.detach() for w in weights), *derived.values(weights)]
        return None

    def _captured(self, given: dict[str, Any], pool: Any) -> _Graph:
        with _as_captured(self._device):
            inputs = {name: given[name].clone() for name in _TENSORS if name in given}
            call = {**given, **inputs}
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    self.model(**call)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads of the program, such as those that load data, may go on using the device.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = self.model(**call)
            except Exception as error:
                raise _CaptureError(f"{type(error).__name__}: {error}") from error
        return _Graph(graph, inputs, outputs)

    def _replay(self, graph: _Graph, given: dict[str, Any]) -> Any:
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # of a call on another stream
            for name, buffer in graph.inputs.items():
                buffer.copy_(given[name])
            graph.graph.replay()
            outputs = _rebuilt(graph.outputs, {}, self._clone)
            self._done.record(stream)
        return outputs


class _CaptureError(Exception):
    """What a capture stumbled over."""


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot be captured at all, as far as that can be seen without trying; None when it can."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        return f"the model is on {len(devices)} devices"
    device = devices.pop()
    if device.type != _DEVICE_TYPE:
        return f"CUDA graphs need a CUDA or ROCm device, the model is on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    if any(m.training for m in model.modules()):
        return "the model is in training mode"
    hooked = next((name or "the model" for name, m in model.named_modules() if _hooked(m)), None)
    return None if hooked is None else f"{hooked} has hooks, which a replay would not call"


def _listed(example_inputs: Any) -> list[Any]:
    return [example_inputs] if isinstance(example_inputs, Mapping) else list(example_inputs)


def _checked(example: Any) -> dict[str, Any]:
    if not isinstance(example, Mapping):
        raise TypeError(f"graphed wants examples that are dicts of keyword arguments, got a {type(example).__name__}")
    given = {name: value for name, value in example.items() if value is not None}
    reason = _why_not_arguments(given)
    if reason is not None or "input_values" not in given:
        raise TypeError(
            f"graphed wants examples with input_values and what a graph takes besides, got {reason or given}"
        )
    return given


def _why_not_arguments(given: dict[str, Any]) -> str | None:
    for name, value in given.items():
        if value is None:
            continue
        if name not in _TENSORS + _FLAGS:
            return f"{name} is no argument that a graph takes"
        if isinstance(value, Tensor) != (name in _TENSORS):
            return f"{name} is a {type(value).__name__}"
    return None


def _key(given: dict[str, Any]) -> Hashable:
    """What a call has to share with an example."""
    tensors = ((n, tuple(t.shape), t.dtype, t.device) for n in _TENSORS if (t := given.get(n)) is not None)
    return (*tensors, *((n, bool(given[n])) for n in _FLAGS if given.get(n) is not None))


def _described(key: Any) -> str:
    return ", ".join(
        f"{name}={rest[0]}" if len(rest) == 1 else f"{name} {list(rest[0])} {str(rest[1]).removeprefix('torch.')}"
        for name, *rest in key
    )


def _hooked(module: nn.Module) -> bool:
    return has_hooks(module, but_captures=True)


def _look_at(model: nn.Module) -> dict[str, Any]:
    """All that a graph has taken for granted, by the sentence that says that it changed."""
    modules = list(model.modules())
    config = getattr(model, "config", None)
    return {
        "modules were replaced, or are of another class": [(m, type(m)) for m in modules],
        "methods were replaced, which a replay would not call": [methods_of(m) for m in modules],
        "the model is in training mode": any(m.training for m in modules),
        "modules have hooks, which a replay would not call": any(map(_hooked, modules)),
        _WEIGHTS: [_identity(t) for m in modules for t in (*parameters_of(m).values(), *buffers_of(m).values())],
        "autocast is not as it was at the capture": (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
        ),
        "backend, precision or determinism are not as they were at the capture": (
            backends.current(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            torch.are_deterministic_algorithms_enabled(),
        ),
        "the config asks for other outputs than at the capture": [getattr(config, name, None) for name in _FLAGS],
    }


def _identity(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    changes = None if tensor.is_inference() else version(tensor)
    return tensor.data_ptr(), changes, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


@contextmanager
def _as_captured(device: torch.device) -> Iterator[None]:
    """Inference on a device, with the caller's autocast but for its cache: what that keeps must outlive the graph."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.cuda.device(device),
        # A capture that fails leaves its stream the current one.
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False),
    ):
        yield


def _rebuilt(value: Any, seen: dict[int, Tensor], clone: bool) -> Any:
    """The model's outputs in containers of their own, with copies of the tensors; one tensor stays one."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.clone() if clone else value
        return seen[id(value)]
    if isinstance(value, Mapping):
        return type(value)(**{name: _rebuilt(part, seen, clone) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_rebuilt(part, seen, clone) for part in value)
    return value
