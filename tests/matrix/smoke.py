"""What an installed wheel must do wherever it is installed: `make test-matrix` runs this in every environment.

Not collected with the other tests, whose wavlm_fast is the checkout's. No compiler is on the path here.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from wavlm_cases import (
    MODELS,
    SAMPLES,
    assert_close_to_truth,
    assert_gradients_close,
    check_forward,
    fast_like,
    gradients,
    main_output,
    plain_model,
    ragged_mask,
    small_config,
    truth_of,
    waveforms,
    with_labels,
)

import wavlm_fast

every_model = pytest.mark.parametrize("name", MODELS)
both_forms = pytest.mark.parametrize("form", ["base", "large"])


def command(*arguments):
    """What `wavlm-fast` prints."""
    run = subprocess.run(
        [Path(sys.executable).with_name("wavlm-fast"), *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_wheel_is_what_is_tested_and_nothing_could_have_compiled_it():
    assert "site-packages" in wavlm_fast.__file__
    assert shutil.which("c++") is None and shutil.which("cc") is None


def test_doctor_says_that_the_kernels_are_in():
    found = json.loads(command("doctor", "--json"))
    assert found["extension"]["problem"] is None
    assert found["extension"]["level"] in found["extension"]["levels"][-2:]
    assert found["extension"]["threads"] == torch.get_num_threads()


@every_model
@both_forms
def test_forward_and_backward(name, form):
    plain = plain_model(name, small_config(form))
    check_forward(plain, waveforms(), attention_mask=ragged_mask(SAMPLES, 400), **with_labels(name, plain.config))
    labels = with_labels(name, plain.config)
    got, expected, truth = (
        gradients(model.train(), lambda m, x=x: m(x, **labels).loss if labels else main_output(m(x)).square().mean())
        for model, x in (
            (fast_like(plain), waveforms()),
            (plain, waveforms()),
            (truth_of(plain), waveforms().double()),
        )
    )
    assert_gradients_close(got, expected, truth, plain)


@pytest.mark.parametrize("name", ["WavLMForCTC", "WavLMForSequenceClassification"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compile(name, fullgraph):
    torch._dynamo.reset()
    plain = plain_model(name, small_config())
    try:
        with torch.no_grad():
            torch.compile(plain, backend="aot_eager", fullgraph=fullgraph)(waveforms())
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"transformers' own does not compile: {str(error).splitlines()[0]}")
    compiled = torch.compile(fast_like(plain), backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        assert_close_to_truth(compiled(waveforms()), plain(waveforms()), truth_of(plain)(waveforms().double()))
    labels, trained = with_labels(name, plain.config), fast_like(plain).train()
    compiled = torch.compile(trained, backend="aot_eager", fullgraph=False)  # transformers' losses may break the graph
    got = gradients(trained, lambda m: compiled(waveforms(), **labels).loss)
    expected = gradients(plain.train(), lambda m: m(waveforms(), **labels).loss)
    truth = gradients(truth_of(plain), lambda m: m(waveforms().double(), **labels).loss)
    assert_gradients_close(got, expected, truth, plain)


def test_install_and_uninstall():
    theirs = transformers.models.wavlm.modeling_wavlm.WavLMModel
    wavlm_fast.install()
    try:
        model = transformers.AutoModel.from_config(small_config())
        assert isinstance(model, wavlm_fast.WavLMModel)
    finally:
        wavlm_fast.uninstall()
    assert type(transformers.AutoModel.from_config(small_config())) is theirs


def test_extract(tmp_path):
    plain_model("WavLMModel", small_config()).save_pretrained(tmp_path / "model")
    clip = Path(wavlm_fast.__file__).with_name("data") / "speech.flac"
    command("extract", str(clip), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.joinpath("out").iterdir()] == ["speech.npz"]
