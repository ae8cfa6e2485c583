"""Who runs a model: transformers, the runtimes that people turn to instead, and ours."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import Inputs, Output, bound

Call = Callable[[], Any]
SINGLE, HALF = torch.float32, torch.bfloat16
SHORT = {SINGLE: "fp32", HALF: "bf16"}
_EXAMPLE_SAMPLES = 16_000  # what exporters trace with; cases have other lengths


@dataclass(frozen=True)
class Subject:
    """A model to run, and a folder in which what was exported from it stays for the next case."""

    module: Output
    inputs: Inputs
    folder: Path
    threads: int

    def exported(self, suffix: str, export: Callable[[Path], None]) -> Path:
        """The exported file, with or without a mask, made at the first call."""
        path = self.folder / f"model{'-mask' if 'attention_mask' in self.inputs else ''}{suffix}"
        if not path.exists():
            with _quiet():
                export(path)
        return path

    def example(self) -> tuple[torch.Tensor, ...]:
        """Arguments to trace with: another batch and length than the case's."""
        waveform = torch.randn(2, _EXAMPLE_SAMPLES, generator=torch.Generator().manual_seed(0))
        return (waveform, torch.ones(2, _EXAMPLE_SAMPLES, dtype=torch.int64))[: len(self.inputs)]


@dataclass(frozen=True)
class Provider:
    """One way to run a model.

    `build` gives the call that is timed, on the subject's inputs, with anything that `torch.as_tensor` takes for a
    result; for training `fast` tells which of the two models it is, and None that it does not train.
    """

    family: str
    dtype: torch.dtype
    build: Callable[[Subject], Call]
    fast: bool | None = None
    note: Callable[[], str] = lambda: ""

    @property
    def ours(self) -> bool:
        return bool(self.fast)


BASELINE, OURS = "transformers", "wavlm_fast"


def providers() -> tuple[dict[str, Provider], dict[str, str]]:
    """What this machine can run, in the order of the tables, and the reasons why it cannot run the rest."""
    found, absent = {}, {}
    for name, (provider, packages) in _every().items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        reason = f"{' and '.join(missing)} not installed (they come with the extra 'peers')" if missing else None
        for package in packages if reason is None else ():
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken installation raises what it likes
                reason = f"import {package} fails: {error}"
        if reason is None:
            found[name] = provider
        else:
            absent[name] = reason
    return found, absent


def _every() -> dict[str, tuple[Provider, tuple[str, ...]]]:
    onnx = ("onnxruntime", "onnx")
    return {
        "transformers fp32": (Provider(BASELINE, SINGLE, _torch(SINGLE, False), False), ()),
        "transformers bf16": (Provider(BASELINE, HALF, _torch(HALF, False), False), ()),
        "ONNX Runtime fp32": (Provider("ONNX Runtime", SINGLE, _onnxruntime), onnx),
        "OpenVINO f32": (Provider("OpenVINO", SINGLE, _openvino("f32")), ("openvino",)),
        "OpenVINO bf16": (Provider("OpenVINO", HALF, _openvino("bf16"), note=_openvino_bf16), ("openvino",)),
        "wavlm_fast fp32": (Provider(OURS, SINGLE, _torch(SINGLE, True), True), ()),
        "wavlm_fast bf16": (Provider(OURS, HALF, _torch(HALF, True), True), ()),
    }


def _torch(dtype: torch.dtype, fast: bool) -> Callable[[Subject], Call]:
    return lambda subject: bound(subject.module.copy(dtype, fast), subject.inputs)


def _onnxruntime(subject: Subject) -> Call:
    import onnxruntime

    def export(path: Path) -> None:
        names = list(subject.inputs)
        axes = {name: {0: "batch", 1: "samples"} for name in names} | {"output": {0: "batch"}}
        # Of torch's two exporters the older makes the graph that ONNX Runtime is faster on.
        torch.onnx.export(
            subject.module, subject.example(), str(path), input_names=names, output_names=["output"],
            dynamic_axes=axes, dynamo=False, opset_version=17,
        )  # fmt: skip

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = subject.threads, 1
    # While it runs its threads may spin; after that they would take the time of whoever is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = subject.exported(".onnx", export)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in subject.inputs.items()}
    return lambda: session.run(None, feeds)[0]


def _openvino(precision: str) -> Callable[[Subject], Call]:
    def build(subject: Subject) -> Call:
        import openvino

        def export(path: Path) -> None:
            shapes = [openvino.PartialShape([-1, -1])] * len(subject.inputs)
            model = openvino.convert_model(subject.module, example_input=subject.example(), input=shapes)
            openvino.save_model(model, str(path), compress_to_fp16=False)

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": subject.threads,
            "NUM_STREAMS": 1,
        }
        path = subject.exported(".xml", export)
        request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
        feeds = [value.numpy() for value in subject.inputs.values()]
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    return build


def _openvino_bf16() -> str:
    import openvino

    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return ""
    return "this CPU has no bfloat16 instructions: OpenVINO emulates them or computes in float32"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk a lot, to all channels, about what they trace."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
