"""ONNX, OpenVINO, optimum and AOTInductor: each writes a model that gives transformers' numbers."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile

import pytest
import torch
from leaving_cases import Main, a_few, check, each_class, our_ops, pair
from wavlm_cases import PLAIN, ours_only


def run_onnx(data, *inputs):
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    model = onnx.load_from_string(data)
    assert {node.domain for node in model.graph.node} | {f.domain for f in model.functions} <= {""}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@each_class
@pytest.mark.parametrize("form", ["base", "large"])
def test_onnx_by_tracing(name, form):
    pytest.importorskip("onnxruntime")
    case, file = pair(name, form), io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(Main(case.ours), (case.x,), file, dynamo=False)
    check(run_onnx(file.getvalue(), case.x), case.plain, case.x)


@a_few
def test_onnx_by_torch_export(name, form):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    case = pair(name, form, 1)
    with torch.no_grad():
        exported = torch.onnx.export(Main(case.ours), (case.x,), dynamo=True, verbose=False)
    check(run_onnx(exported.model_proto.SerializeToString(), case.x), case.plain, case.x)


@ours_only
def test_onnx_from_a_program():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export of a program needs onnxscript")
    case = pair("WavLMModel", "large", 1)
    with torch.no_grad():
        program = torch.export.export(Main(case.ours), (case.x,), strict=False)
        exported = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert our_ops(program.graph)
    check(run_onnx(exported.model_proto.SerializeToString(), case.x), case.plain, case.x)


@a_few
def test_openvino(name, form):
    openvino = pytest.importorskip("openvino")
    case = pair(name, form, 1)
    with torch.no_grad():
        model = openvino.convert_model(Main(case.ours), example_input=(case.x,))
    check(run_openvino(model, case.x), case.plain, case.x)


@ours_only
def test_openvino_from_a_program():
    openvino = pytest.importorskip("openvino")
    case = pair("WavLMModel", "base", 1)
    with torch.no_grad():
        model = openvino.convert_model(torch.export.export(Main(case.ours), (case.x,), strict=False))
    check(run_openvino(model, case.x), case.plain, case.x)


def run_openvino(model, *inputs):
    import openvino

    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return torch.from_numpy(compiled([x.numpy() for x in inputs])[0].copy())


@pytest.mark.parametrize("exporter", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("name", "form", "task"),
    [("WavLMForCTC", "large", "automatic-speech-recognition"), ("WavLMForXVector", "base", "audio-xvector")],
)
def test_optimum(name, form, task, exporter, tmp_path, monkeypatch):
    """Optimum loads the model itself, so it gets one of ours only when we are installed in transformers."""
    why = "optimum-onnx and optimum-intel want transformers before 5"
    exporters = pytest.importorskip(f"optimum.exporters.{exporter}", reason=why)
    case = pair(name, form)
    case.plain.save_pretrained(tmp_path / "model")
    features = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": 16000}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(features))
    if not PLAIN:
        import wavlm_fast

        wavlm_fast.install()
    try:
        exporters.main_export(str(tmp_path / "model"), output=str(tmp_path / "out"), task=task)
    finally:
        if not PLAIN:
            wavlm_fast.uninstall()
    if exporter == "onnx":
        found = run_onnx((tmp_path / "out" / "model.onnx").read_bytes(), case.x)
    else:
        import openvino

        found = run_openvino(openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml"), case.x)
    check(found, case.plain, case.x)


@ours_only
def test_a_package_of_the_fused_graph(tmp_path):
    """AOTInductor compiles what lies between our ops and calls these, the whole front end and layers among them."""
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    case = pair("WavLMModel", "base", 1)
    with torch.no_grad():
        program = torch.export.export(Main(case.ours), (case.x,), strict=False)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "wavlm.pt2"))
        check(torch._inductor.aoti_load_package(package)(case.x), case.plain, case.x)
    with zipfile.ZipFile(package) as files:
        sources = b"".join(files.read(name) for name in files.namelist() if name.endswith(".cpp")).decode()
    assert {"feature_encoder", "encoder_layer"} <= set(re.findall(r"wavlm_fast\.(\w+)", sources))
