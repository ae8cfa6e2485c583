"""Who runs a model: transformers, what people turn to instead, and ours."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wavlm_fast import accelerate, graphed, use_backend

from . import peers
from .cases import Inputs, Output, bound, placed, trained_in
from .houses import HOUSES, InHouse

Call = Callable[[], Any]
BASELINE, OURS = "transformers", "wavlm_fast"
# Ways to run utterances of different lengths: a padded batch with its mask, as transformers defines what comes out; the
# same batch, every row as if it were alone; one utterance after the other; and, to compare with, as many of one length
# that take as much audio.
PADDED, EXACT, ALONE, UNIFORM = "padded", "exact", "one at a time", "uniform"
SINGLE, HALF, SIXTEEN = torch.float32, torch.bfloat16, torch.float16
SHORT = {SINGLE: "fp32", HALF: "bf16", SIXTEEN: "fp16"}
_EXAMPLE_SAMPLES = 16_000  # what exporters trace with; cases have other lengths
FREED = "originals freed"


@dataclass(frozen=True)
class Subject:
    """A model to run, where, and a folder in which what was exported from it stays for the next case."""

    module: Output  # in float32, on the CPU
    inputs: Inputs
    folder: Path
    threads: int
    device: str = "cpu"
    house: str = ""  # in whose class it runs; empty: transformers'

    def copy(self, dtype: torch.dtype, fast: bool = False, **options: Any) -> Output:
        """The model in `dtype` on the device, in the class of the house."""
        if not self.house:
            return self.module.copy(dtype, fast, **options).to(self.device)
        made = InHouse.of(self.module, self.house).to(self.device, dtype)
        return accelerate(made, **options) if fast else made

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
    result. `trains` gives the model for a training step, where there is one: in float32 at least, with products in
    `dtype` by autocast.
    """

    family: str
    dtype: torch.dtype
    build: Callable[[Subject], Call]
    trains: Callable[[Subject], Output] | None = None
    prepare: Callable[[Subject], Any] | None = None  # makes the files that `build` reads
    packages: tuple[str, ...] = ()  # imported to see whether it can run at all
    note: Callable[[], str] = lambda: ""
    everywhere: bool = True  # otherwise only in the cases for everybody: setting it up takes minutes
    dense: bool = True  # attention weights exist as a whole
    memory: bool = False  # only its memory differs from another provider's
    way: str = PADDED  # of utterances that differ in length
    house: str = ""  # it runs in cases of that house alone

    @property
    def ours(self) -> bool:
        return self.family.startswith(OURS)


def providers(device: str = "cpu") -> tuple[dict[str, Provider], dict[str, str]]:
    """What this machine can run on `device`, in the order of the tables, and the reasons why not the rest."""
    # OpenVINO forks a process at its import that reports it to its makers, and does without where it cannot.
    sys.modules.setdefault("openvino_telemetry", None)
    found, absent = {}, {}
    for name, provider in _every(device).items():
        missing = [p for p in provider.packages if importlib.util.find_spec(p) is None]
        reason = f"{' and '.join(missing)} not installed (pip install 'wavlm-fast[bench]')" if missing else None
        for package in provider.packages if reason is None else ():
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken installation raises what it likes
                reason = f"import {package} fails: {error}"
        if reason is None:
            found[name] = provider
        else:
            absent[name] = reason
    if device != "cpu":
        absent |= {name: "runs on the CPU here" for name, p in _on_cpu().items() if p.packages}
    return found, absent


def of_houses(device: str = "cpu") -> dict[str, Provider]:
    """Who runs the classes of the houses other than transformers', in the precisions of ours."""
    dtypes = dict.fromkeys(p.dtype for p in _every(device).values() if p.family == OURS)
    return {
        f"{house.family} {SHORT[d]}": Provider(house.family, d, _torch(d), note=house.note, house=name)
        for name, house in HOUSES.items()
        if house.family != BASELINE
        for d in dtypes
    }


def _every(device: str) -> dict[str, Provider]:
    return _on_gpu() if device != "cpu" else _on_cpu()


def _on_cpu() -> dict[str, Provider]:
    onnx, openvino = ("onnxruntime", "onnx"), {"prepare": _openvino_file, "packages": ("openvino",)}
    return {
        **_eager((SINGLE, HALF)),
        **_changed((SINGLE,)),
        "ONNX Runtime fp32": Provider("ONNX Runtime", SINGLE, _onnxruntime, prepare=_onnx_file, packages=onnx),
        "OpenVINO f32": Provider("OpenVINO", SINGLE, _openvino("f32"), **openvino),
        "OpenVINO bf16": Provider("OpenVINO", HALF, _openvino("bf16"), **openvino, note=_openvino_bf16),
        **_fast((SINGLE, HALF)),
        f"{OURS} fp32, {FREED}": Provider(f"{OURS}, {FREED}", SINGLE, _freed, dense=False, memory=True),
    }


def _on_gpu() -> dict[str, Provider]:
    return {
        **_eager((SINGLE, SIXTEEN, HALF)),
        **_changed((SIXTEEN, HALF)),
        **_fast((SINGLE, SIXTEEN, HALF)),
        **{f"{OURS} {SHORT[d]}, graph": Provider(f"{OURS}, graph", d, _graph(d), dense=False) for d in (SIXTEEN, HALF)},
    }


def _eager(dtypes: tuple[torch.dtype, ...]) -> dict[str, Provider]:
    return {f"{BASELINE} {SHORT[d]}": Provider(BASELINE, d, _torch(d), trains=_trained(d)) for d in dtypes}


def _trained(dtype: torch.dtype, fast: bool = False, **options: Any) -> Callable[[Subject], Output] | None:
    """float16 does not train without scaled losses, which are nobody's here."""
    return None if dtype == SIXTEEN else lambda subject: subject.copy(trained_in(dtype), fast, **options)


def _changed(dtypes: tuple[torch.dtype, ...]) -> dict[str, Provider]:
    """transformers' model, compiled or around other attention than its own."""
    forms = {
        f"{BASELINE} + compile": (peers.compiled, True),
        "SDPA, dense bias": (peers.with_sdpa, True),
        "FlexAttention": (peers.with_flex, False),
    }

    def build(change: Callable[[Output], Output], dtype: torch.dtype) -> Callable[[Subject], Call]:
        return lambda subject: bound(change(subject.copy(dtype)), subject.inputs)

    return {
        f"{name} {SHORT[d]}": Provider(name, d, build(change, d), everywhere=False, dense=dense)
        for name, (change, dense) in forms.items()
        for d in dtypes
    }


def _fast(dtypes: tuple[torch.dtype, ...]) -> dict[str, Provider]:
    found = {
        f"{OURS} {SHORT[d]}": Provider(OURS, d, _torch(d, True), trains=_trained(d, True), dense=False) for d in dtypes
    }
    for way in (EXACT, ALONE, UNIFORM):
        options = {"padding": "exact"} if way == EXACT else {}
        for d in dtypes:
            build, trains = _torch(d, True, **options), _trained(d, True, **options)
            found[f"{OURS} {SHORT[d]}, {way}"] = Provider(
                f"{OURS}, {way}", d, build, trains=trains, dense=False, way=way
            )
    name = f"{OURS} reference"
    for dtype in dtypes:
        found[f"{name} {SHORT[dtype]}"] = Provider(name, dtype, _reference(dtype), everywhere=False, dense=False)
    return found


def _torch(dtype: torch.dtype, fast: bool = False, **options: Any) -> Callable[[Subject], Call]:
    return lambda subject: bound(subject.copy(dtype, fast, **options), subject.inputs)


def _reference(dtype: torch.dtype) -> Callable[[Subject], Call]:
    def build(subject: Subject) -> Call:
        forward = bound(subject.copy(dtype, True), subject.inputs)

        def call() -> Any:
            with use_backend("reference"):
                return forward()

        return call

    return build


def _graph(dtype: torch.dtype) -> Callable[[Subject], Call]:
    def build(subject: Subject) -> Call:
        module = subject.copy(dtype, True)
        inputs = placed(module, subject.inputs)
        model = graphed(module.model, inputs, clone=False)

        def call() -> Any:
            with torch.inference_mode():
                return getattr(model(**inputs), module.output)

        return call

    return build


def _freed(subject: Subject) -> Call:
    return bound(subject.copy(SINGLE, True, keep_originals=False), subject.inputs)


def _onnx_file(subject: Subject) -> Path:
    names = list(subject.inputs)
    axes = {name: {0: "batch", 1: "samples"} for name in names} | {"output": {0: "batch"}}

    def export(path: Path) -> None:
        # Of torch's two exporters the older makes the graph that ONNX Runtime is faster on.
        torch.onnx.export(
            subject.module, subject.example(), str(path), input_names=names, output_names=["output"],
            dynamic_axes=axes, dynamo=False, opset_version=17,
        )  # fmt: skip

    return subject.exported(".onnx", export)


def _onnxruntime(subject: Subject) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = subject.threads, 1
    # While it runs its threads may spin; after that they would take the time of whoever is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = _onnx_file(subject)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in subject.inputs.items()}
    return lambda: session.run(None, feeds)[0]


def _openvino_file(subject: Subject) -> Path:
    import openvino

    def export(path: Path) -> None:
        shapes = [openvino.PartialShape([-1, -1])] * len(subject.inputs)
        model = openvino.convert_model(subject.module, example_input=subject.example(), input=shapes)
        openvino.save_model(model, str(path), compress_to_fp16=False)

    return subject.exported(".xml", export)


def _openvino(precision: str) -> Callable[[Subject], Call]:
    def build(subject: Subject) -> Call:
        import openvino

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": subject.threads,
            "NUM_STREAMS": 1,
        }
        path = _openvino_file(subject)
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
