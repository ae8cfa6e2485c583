"""Microsoft's class in the user's own copy of the code, and in the package's."""

import re
import sys
from pathlib import Path

import pytest
import torch

import wavlm_fast
from wavlm_fast import cli, original
from wavlm_fast.modules._originals import StandIn


@pytest.fixture(scope="module")
def checkpoint(hub, tmp_path_factory):
    path = tmp_path_factory.mktemp("microsoft") / "WavLM-Base+.pt"
    assert cli.main(["convert", "--no-check", hub("microsoft/wavlm-base-plus"), str(path)]) == 0
    return str(path)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """WavLM.py and its neighbours in a folder, as plain torch as Microsoft's."""
    for file in Path(original.__file__).parent.glob("[a-z]*.py"):
        text = re.sub(r"^from \.(\w)", r"from \1", file.read_text(), flags=re.MULTILINE)
        text = text.replace("from ..", "from wavlm_fast.").replace("        accelerate_new(self)\n", "")
        name = "WavLM" if file.stem == "wavlm" else file.stem
        tmp_path.joinpath(f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "WavLM.py"
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("own", [True, False], ids=["the user's copy", "the package's"])
@pytest.mark.parametrize("layer", [[], ["--layer", "6"]], ids=["last", "6"])
def test_the_same_features(example, checkpoint, copy, capsys, monkeypatch, own, layer):
    seen, inner = [], wavlm_fast.accelerate

    def accelerate(model):
        seen.append((model, fast_modules(model)))
        return inner(model)

    monkeypatch.setattr(wavlm_fast, "accelerate", accelerate)
    assert example("microsoft_in_place").main([checkpoint, *(["--code", str(copy)] if own else []), *layer]) == 0
    ((model, before),) = seen
    assert ("WavLM" if own else "wavlm_fast.original.wavlm") in {c.__module__ for c in type(model).__mro__}
    assert not before
    assert fast_modules(model)
    said = capsys.readouterr().out
    assert re.search(r"speech.flac: 7.10 s.*\nfeatures of \[354, 32\]: .*\nlargest difference: .*\nbackend", said)


def fast_modules(model):
    return [module for module in model.modules() if isinstance(module, StandIn)]


def test_other_features_are_told(example, checkpoint, capsys, monkeypatch):
    def broken(model):
        torch.nn.init.zeros_(model.encoder.layers[3].fc1.weight)

    monkeypatch.setattr(wavlm_fast, "accelerate", broken)
    assert example("microsoft_in_place").main([checkpoint]) == 1
    assert "the same features to 0.0001 are wanted, got a difference of" in capsys.readouterr().err
