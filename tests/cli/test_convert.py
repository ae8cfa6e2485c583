"""`wavlm-fast convert`: what is taken and refused; under the result's name there is never anything wrong or half."""

import argparse
import errno
import importlib
import json
import os
import pickle
import shutil
import stat
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import tiny_config
from transformers import WavLMForCTC, WavLMModel

from wavlm_fast import conversion, convert, measure
from wavlm_fast._signals import Terminated
from wavlm_fast.sensitive import make_sensitive

PRE_NORM = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def torchaudio_is_there():
    try:
        importlib.import_module("torchaudio.models")
    except Exception:  # its binaries may be another torch's
        return False
    return True


needs_torchaudio = pytest.mark.skipif(not torchaudio_is_there(), reason="torchaudio is not installed")


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A folder with a WavLM that normalises utterances and has its norms first, in float16, under a CTC head."""
    folder = tmp_path_factory.mktemp("large")
    make_sensitive(WavLMForCTC(tiny_config(vocab_size=12, **PRE_NORM))).half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    return folder


@pytest.fixture(scope="session")
def pt(tiny, tmp_path_factory):
    """Microsoft's file of the tiny WavLM."""
    model = WavLMModel.from_pretrained(tiny)
    cfg, state, _ = conversion.to_microsoft(model.config, model.state_dict(), False)
    path = tmp_path_factory.mktemp("microsoft") / "tiny.pt"
    torch.save({"cfg": cfg, "model": state}, path)
    return path


@pytest.fixture(scope="session")
def pth(tiny, tmp_path_factory):
    """torchaudio's file of the tiny WavLM."""
    model = WavLMModel.from_pretrained(tiny)
    path = tmp_path_factory.mktemp("torchaudio") / "tiny.pth"
    torch.save(conversion.to_torchaudio(model.config, model.state_dict()).state, path)
    return path


@pytest.fixture
def no_torchaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.delitem(sys.modules, "torchaudio.models", raising=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert {value.dtype for value in one.values()} == {value.dtype for value in other.values()}


def test_to_microsoft_and_back(command, tiny, tmp_path):
    ended = command("convert", tiny, tmp_path / "tiny.pt")
    assert ended.status == 0, ended
    assert "\nequal    3 hidden states of 7.1 s of speech, the worst " in ended.out
    content = torch.load(tmp_path / "tiny.pt", weights_only=True)
    assert content.keys() == {"cfg", "model"}
    assert content["cfg"]["encoder_layers"] == 2
    ended = command("convert", tmp_path / "tiny.pt", tmp_path / "back")
    assert ended.status == 0, ended
    assert "note     apply_spec_augment is false" in ended.out
    assert names(tmp_path) == ["back", "tiny.pt"]
    assert names(tmp_path / "back") == ["config.json", "model.safetensors", "preprocessor_config.json"]
    same(weights(tiny), weights(tmp_path / "back"))
    ordinary = 0o666 & ~_umask()
    assert {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "tiny.pt", *(tmp_path / "back").iterdir()]} == {
        ordinary
    }


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current


def test_of_a_model_with_a_head_the_base_is_taken_as_it_is(command, large, tmp_path):
    """With its dtype, and with the word that utterances are to be normalised."""
    ended = command("convert", large, tmp_path / "large.pt")
    assert ended.status == 0, ended
    assert "note     the head of WavLMForCTC stays behind\n" in ended.out
    assert torch.load(tmp_path / "large.pt", weights_only=True)["cfg"]["normalize"] is True
    assert command("convert", tmp_path / "large.pt", tmp_path / "back").status == 0
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["do_normalize"] is True
    base = {key.removeprefix("wavlm."): value for key, value in weights(large).items() if key.startswith("wavlm.")}
    same(base, weights(tmp_path / "back"))


@pytest.mark.parametrize("source", ["tiny", "large"])
def test_what_is_written_is_read_by_a_copy_of_microsofts_class(command, source, request, tmp_path):
    theirs = pytest.importorskip("s3prl.upstream.wavlm.WavLM", reason="s3prl, which ships one, is not installed")
    folder = request.getfixturevalue(source)
    assert command("convert", folder, tmp_path / "x.pt", "--no-check").status == 0
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    model = theirs.WavLM(theirs.WavLMConfig(content["cfg"])).eval()
    model.load_state_dict(content["model"])
    ours = WavLMModel.from_pretrained(folder).float().eval()
    waveform = torch.randn(1, 48_000, generator=torch.Generator().manual_seed(0))
    rows = measure.compare(
        *(convert.states(m, waveform) for m in (ours, model)), convert.states(ours.double(), waveform)
    )
    assert len(rows) == 3
    assert all(row.ok for row in rows), rows


@needs_torchaudio
@pytest.mark.parametrize("source", ["tiny", "large"])
def test_to_torchaudio_and_back_by_way_of_microsoft(command, source, request, tmp_path):
    folder = request.getfixturevalue(source)
    for one, other in ((folder, "a.pth"), ("a.pth", "b.pt"), ("b.pt", "c.pth"), ("c.pth", "d")):
        ended = command("convert", tmp_path / one, tmp_path / other)
        assert ended.status == 0, ended
        assert "equal    3 hidden states" in ended.out
    base = {key.removeprefix("wavlm."): value for key, value in weights(folder).items()}
    base = {key: value for key, value in base.items() if not key.startswith(("lm_head", "masked_spec_embed"))}
    same(base, weights(tmp_path / "d"))


@needs_torchaudio
def test_what_torchaudio_saves_is_read(command, tmp_path):
    """With the linear layer on top of it, which stays behind."""
    from torchaudio.models import wavlm_model

    arguments = conversion.to_torchaudio(tiny_config(), WavLMModel(tiny_config()).state_dict()).config
    torch.save(wavlm_model(**{**arguments, "aux_num_out": 5}).state_dict(), tmp_path / "made.pth")
    ended = command("convert", tmp_path / "made.pth", tmp_path / "made")
    assert ended.status == 0, ended
    assert "note     the linear layer on top (aux, 5 outputs) stays behind" in ended.out


@needs_torchaudio
def test_the_published_sizes_of_torchaudio_are_read_off_their_weights(monkeypatch):
    from torchaudio import models

    for name in ("wavlm_base", "wavlm_large"):
        with torch.device("meta"):
            state = getattr(models, name)().state_dict()
        found, _ = conversion.torchaudio_arguments(state)
        asked = {}
        take = asked.update
        monkeypatch.setattr(models.wav2vec2.model, "wavlm_model", lambda take=take, **arguments: take(arguments))
        getattr(models, name)()
        monkeypatch.undo()
        asked["extractor_conv_layer_config"] = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
        assert found == asked


def test_without_torchaudio(command, tiny, pth, tmp_path, no_torchaudio):
    said = "the check needs the package torchaudio, which is not installed; --no-check does without"
    for source, dest in ((tiny, "tiny.pth"), (pth, "tiny.pt"), (pth, "tiny")):
        assert command("convert", source, tmp_path / dest).sentence() == f"wavlm-fast convert: {said}"
        assert names(tmp_path) == []
    assert command("convert", tiny, tmp_path / "tiny.pth", "--no-check").status == 0
    ended = command("convert", tmp_path / "tiny.pth", tmp_path / "back", "--no-check")
    assert ended.status == 0, ended
    assert "equal" not in ended.out
    assert "note     not in the file, as published: norms after attention" in ended.out
    saved = weights(tiny)
    del saved["masked_spec_embed"]
    same(saved, weights(tmp_path / "back"))


def test_a_torchaudio_whose_binaries_do_not_load(command, tiny, tmp_path, no_torchaudio, monkeypatch):
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libc10_cuda.so: no such file')")
    monkeypatch.delitem(sys.modules, "torchaudio")
    monkeypatch.syspath_prepend(tmp_path)
    said = command("convert", tiny, tmp_path / "tiny.pth").sentence()
    assert "which cannot be imported (libc10_cuda.so: no such file); --no-check" in said


def test_to_says_what_it_becomes_whatever_the_name(command, tiny, pt, tmp_path):
    assert command("convert", tiny, tmp_path / "one", "--to", "microsoft", "--no-check").status == 0
    assert torch.load(tmp_path / "one", weights_only=True).keys() == {"cfg", "model"}
    assert command("convert", tmp_path / "one", tmp_path / "two.pt", "--to", "transformers", "--no-check").status == 0
    same(weights(tmp_path / "two.pt"), weights(tiny))


@pytest.mark.parametrize("source", ["tiny", "pt", "pth"])
def test_what_it_is_already(command, source, request, tmp_path):
    path = request.getfixturevalue(source)
    house = {"tiny": "transformers", "pt": "microsoft", "pth": "torchaudio"}[source]
    said = command("convert", path, tmp_path / "x", "--to", house).sentence()
    assert said == (
        f"wavlm-fast convert: {path} is {convert.HOUSES[house]} already, and that is what {tmp_path / 'x'} is to become"
    )


def test_what_is_there_stays_unless_it_may_be_overwritten(command, tiny, pt, tmp_path):
    file, folder = tmp_path / "x.pt", tmp_path / "x"
    file.write_bytes(b"mine")
    folder.mkdir()
    for source, dest in ((tiny, file), (pt, folder)):
        said = command("convert", source, dest, "--no-check").sentence()
        assert said == f"wavlm-fast convert: {dest} is there already; --overwrite replaces it"
    assert file.read_bytes() == b"mine"
    assert command("convert", tiny, file, "--no-check", "--overwrite").status == 0
    same(torch.load(file, weights_only=True)["model"], torch.load(pt, weights_only=True)["model"])
    for _ in range(2):
        assert command("convert", pt, folder, "--no-check", "--overwrite").status == 0
    same(weights(folder), weights(tiny))
    assert command("convert", pt, file, "--to", "transformers", "--no-check", "--overwrite").status == 0
    same(weights(file), weights(tiny))
    assert names(tmp_path) == ["x", "x.pt"]


def test_what_comes_there_meanwhile_stays(command, tiny, tmp_path, monkeypatch):
    write = convert._write

    def slow(target, model):
        write(target, model)
        (tmp_path / "x.pt").write_bytes(b"another's")

    monkeypatch.setattr(convert, "_write", slow)
    said = command("convert", tiny, tmp_path / "x.pt", "--no-check").sentence()
    assert said.endswith("is there already; --overwrite replaces it")
    assert (tmp_path / "x.pt").read_bytes() == b"another's"
    assert names(tmp_path) == ["x.pt"]


def test_a_folder_of_other_things_is_never_replaced(command, pt, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    said = command("convert", pt, tmp_path / "mine", "--overwrite").sentence()
    assert said.endswith(f"with a model and nothing else can be replaced, but {tmp_path / 'mine'} holds thesis.tex")
    assert names(tmp_path / "mine") == ["thesis.tex"]


def test_a_file_of_another_kind_is_not_taken_for_a_folder(command, pt, tmp_path):
    dest = tmp_path / "model.safetensors"
    said = command("convert", pt, dest).sentence()
    assert said == f"wavlm-fast convert: a folder, a .pt or a .pth is wanted, or any name and --to, got {dest}"
    assert command("convert", pt, dest, "--to", "transformers", "--no-check").status == 0


def test_a_place_that_is_not_there(command, pt, tmp_path):
    dest = tmp_path / "no" / "where"
    said = command("convert", pt, dest).sentence()
    assert said == f"wavlm-fast convert: {dest} cannot be written: there is no folder {dest.parent}"


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def _zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/readme.txt", "none")


def _cut(path):
    torch.save({"cfg": {}, "model": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])


def _cut_old(path):
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-500])


SYSTEM = f"{os.system.__module__}.system"
FILES = {
    "code": (lambda p: torch.save({"cfg": {}, "model": Code()}, p), f"{{}} holds {SYSTEM}, which is code, not weights"),
    "old code": (
        lambda p: torch.save([Code()], p, _use_new_zipfile_serialization=False),
        f"{{}} holds {SYSTEM}, which is code, not weights: it is not loaded",
    ),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps([1, Code()])), f"{{}} holds {SYSTEM}, which is code, not"),
    "older pickle": (lambda p: p.write_bytes(pickle.dumps(Code(), 0)), f"{{}} holds {SYSTEM}, which is code, not"),
    "module": (
        lambda p: torch.save(torch.nn.Linear(2, 2), p),
        "{} holds torch.nn.modules.linear.Linear, which is code, not weights: it is not loaded",
    ),
    "arguments": (
        lambda p: torch.save({"args": argparse.Namespace(layers=12), "model": {}}, p),
        "{} holds argparse.Namespace, which is code, not weights: it is not loaded",
    ),
    "script": (
        lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p),
        "{} is a TorchScript archive, which is code, not weights: it is not loaded",
    ),
    "list": (lambda p: torch.save([1, 2], p), "weights of a WavLM are wanted, but {} holds an object of type list"),
    "nothing": (lambda p: torch.save({}, p), "weights of a WavLM are wanted, but {} holds none"),
    "numbers": (lambda p: torch.save({"a": 1}, p), "weights by name are wanted, but {} holds 'a', of type int"),
    "sparse": (
        lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p),
        "dense weights are wanted, but a of {} is torch.sparse_coo",
    ),
    "others": (
        lambda p: torch.save({"a": torch.ones(1)}, p),
        "weights of a WavLM are wanted, but those of {} are others, such as a",
    ),
    "empty": (lambda p: p.write_bytes(b""), "a checkpoint is wanted, but {} is empty"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), "a file of torch.save is wanted, but {} is none"),
    "page": (lambda p: p.write_text("<!DOCTYPE html>"), "a file of torch.save is wanted, but {} is none"),
    "zip": (_zipped, "{} is cut off or damaged: "),
    "cut": (_cut, "{} is cut off or damaged: "),
    "old, cut": (_cut_old, "{} is cut off or damaged: "),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_weights(command, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, said = FILES[kind]
    path = tmp_path / "given.pt"
    make(path)
    sentence = command("convert", path, tmp_path / "x").sentence()
    assert sentence.startswith("wavlm-fast convert: " + said.format(path)), sentence
    assert names(tmp_path) == ["given.pt"]


def test_a_source_that_is_not_there(command, tmp_path):
    for name in ("x.pt", "x.pth", "x"):
        said = command("convert", tmp_path / name, tmp_path / "y").sentence()
        assert f"{tmp_path / name} does not exist" in said


def test_a_folder_without_a_config(command, tmp_path):
    said = command("convert", tmp_path, tmp_path / "x.pt").sentence()
    assert said == f"wavlm-fast convert: a model folder is wanted, but {tmp_path} has no config.json"


def _without_gates(state):
    return {key: value for key, value in state.items() if "grep_" not in key and "gru_rel" not in key}


RELATIVES = {
    "label_embs_concat": "a HuBERT of fairseq's or Microsoft's code",
    "quantizer.vars": "a wav2vec 2.0 of fairseq's or Microsoft's code",
    "spk_proj.weight": "a UniSpeech-SAT of fairseq's or Microsoft's code",
    "encoder.pos_conv.0.0.weight": "a data2vec of fairseq's or Microsoft's code",
    "mask_emb": "a HuBERT or wav2vec 2.0 of fairseq's or Microsoft's code",
}


@pytest.mark.parametrize("key", RELATIVES)
def test_relatives(command, pt, key, tmp_path):
    content = torch.load(pt, weights_only=True)
    content["model"] = {**_without_gates(content["model"]), key: torch.ones(1)}
    torch.save(content, tmp_path / "given.pt")
    assert command("convert", tmp_path / "given.pt", tmp_path / "x").sentence() == (
        f"wavlm-fast convert: {tmp_path / 'given.pt'} is {RELATIVES[key]}: no gated relative position bias in its "
        "attention, nothing of it is WavLM"
    )


def test_relatives_of_torchaudio_and_transformers(command, pth, other_architecture, tmp_path):
    state = _without_gates(torch.load(pth, weights_only=True))
    torch.save(state, tmp_path / "given.pth")
    said = command("convert", tmp_path / "given.pth", tmp_path / "x").sentence()
    assert "is a HuBERT or wav2vec 2.0 of torchaudio's code: no gated relative position bias" in said
    said = command("convert", other_architecture, tmp_path / "x.pt").sentence()
    assert said == f"wavlm-fast convert: a WavLM checkpoint is wanted, but {other_architecture} is wav2vec2"


def test_weights_without_what_they_are_of(command, tiny, pt, tmp_path):
    flat = tmp_path / "flat.pt"
    torch.save(torch.load(pt, weights_only=True)["model"], flat)
    said = command("convert", flat, tmp_path / "x").sentence()
    assert said.endswith(
        f'a dict of "cfg" and "model" is wanted, but {flat} holds Microsoft\'s weights without their cfg'
    )
    torch.save({"model": torch.load(pt, weights_only=True)["model"]}, tmp_path / "model.pt")
    assert command("convert", tmp_path / "model.pt", tmp_path / "x").sentence().endswith("has no cfg")
    torch.save(weights(tiny), tmp_path / "weights.pt")
    said = command("convert", tmp_path / "weights.pt", tmp_path / "x").sentence()
    assert said.endswith("holds transformers' weights without their config.json: the folder of both is wanted")


def test_weights_that_are_too_few_or_too_many(command, pt, pth, tmp_path):
    content = torch.load(pt, weights_only=True)
    extra = {**content, "model": {**content["model"], "final_proj.bias": torch.ones(3)}, "optimizer": {"step": 3}}
    torch.save(extra, tmp_path / "more.pt")
    said = command("convert", tmp_path / "more.pt", tmp_path / "x").sentence()
    assert said == "wavlm-fast convert: final_proj.bias among the weights is none of WavLM's"
    state = torch.load(pth, weights_only=True)
    attention = "encoder.transformer.layers.1.attention.attention.in_proj_bias"
    for key in (attention, "feature_extractor.conv_layers.0.conv.weight"):
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "less.pth")
        said = command("convert", tmp_path / "less.pth", tmp_path / "x", "--no-check").sentence()
        assert said == f"wavlm-fast convert: {key} is missing from the weights"
    assert names(tmp_path) == ["less.pth", "more.pt"]


def test_what_else_a_file_holds_is_said(command, pt, tmp_path):
    torch.save({**torch.load(pt, weights_only=True), "step": 3}, tmp_path / "more.pt")
    ended = command("convert", tmp_path / "more.pt", tmp_path / "x", "--no-check")
    assert ended.status == 0, ended
    assert "note     step of the file stays behind\n" in ended.out


def test_an_old_layout_is_read(command, pt, tmp_path):
    torch.save(torch.load(pt, weights_only=True), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert command("convert", tmp_path / "old.pt", tmp_path / "x", "--no-check").status == 0


@pytest.mark.parametrize(
    "swapped",
    [("attention.k_proj.weight", "attention.q_proj.weight"), ("layer_norm.bias", "final_layer_norm.bias")],
)
def test_a_wrong_map_is_found_out_and_nothing_is_written(command, tiny, tmp_path, monkeypatch, swapped):
    """Of weights of one shape no key and no shape says that they were taken for each other."""
    every = conversion.names

    def wrong(config):
        found = list(every(config))
        places = [
            next(i for i, n in enumerate(found) if n.transformers.endswith(f"encoder.layers.0.{end}"))
            for end in swapped
        ]
        one, other = (found[place] for place in places)
        found[places[0]] = one._replace(microsoft=other.microsoft)
        found[places[1]] = other._replace(microsoft=one.microsoft)
        return iter(found)

    monkeypatch.setattr(conversion, "names", wrong)
    (tmp_path / "x.pt").write_bytes(b"mine")
    ended = command("convert", tiny, tmp_path / "x.pt", "--overwrite")
    assert ended.status == 1, ended
    assert "\nFAILED   3 of 3 hidden states differ, first layer 1: off by " in ended.out
    assert names(tmp_path) == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == b"mine"


def test_what_is_checked_is_what_is_on_the_disk(command, tiny, tmp_path, monkeypatch):
    save = torch.save

    def damaged(content, file):
        content["model"]["encoder.layers.1.fc2.weight"] = content["model"]["encoder.layers.1.fc2.weight"] * 1.00001
        save(content, file)

    monkeypatch.setattr(torch, "save", damaged)
    ended = command("convert", tiny, tmp_path / "x.pt")
    assert ended.status == 1, ended
    assert "FAILED   2 of 3 hidden states differ, first layer 2" in ended.out
    assert names(tmp_path) == []


@pytest.mark.parametrize("ending", [OSError(errno.ENOSPC, "No space is left"), Terminated(), KeyboardInterrupt()])
@pytest.mark.parametrize("dest", ["x.pt", "x"])
def test_a_write_that_ends_half_way(command, tiny, pt, tmp_path, monkeypatch, ending, dest):
    def half(target, *rest):
        (target if dest == "x" else rest[0]).mkdir() if dest == "x" else rest[0].write(b"half")
        raise ending

    if dest == "x":
        monkeypatch.setattr(convert, "_write_transformers", lambda target, model: half(target))
    else:
        monkeypatch.setattr(torch, "save", lambda content, file: half(None, file))
    old = tmp_path / dest
    shutil.copytree(tiny, old) if dest == "x" else shutil.copy(pt, old)
    ended = command("convert", pt if dest == "x" else tiny, old, "--overwrite", "--no-check")
    assert ended.status == {OSError: 2, Terminated: 143, KeyboardInterrupt: 130}[type(ending)]
    if ended.status == 2:
        assert ended.sentence() == f"wavlm-fast convert: {old} cannot be written: No space is left"
    assert names(tmp_path) == [dest]
    same(weights(old), weights(tiny)) if dest == "x" else torch.load(old, weights_only=True)


@pytest.mark.parametrize("dest", ["x.pt", "x"])
def test_a_disk_that_takes_no_more(command, tiny, pt, tmp_path, dest):
    """As the libraries tell it: no file may be longer than a part of the weights."""
    resource = pytest.importorskip("resource", reason="there are no such limits there")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        ended = command("convert", tiny if dest == "x.pt" else pt, tmp_path / dest, "--no-check")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.sentence().startswith(f"wavlm-fast convert: {tmp_path / dest} cannot be written: ")
    assert names(tmp_path) == []


def test_what_is_replaced_comes_back_when_the_new_cannot_be_put(command, tiny, pt, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path / "x")
    replace = os.replace

    def failing(source, target):
        if os.path.basename(source) == "new":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    said = command("convert", pt, folder, "--overwrite", "--no-check").sentence()
    assert said == f"wavlm-fast convert: {folder} cannot be written: Input/output error"
    assert names(tmp_path) == ["x"]
    same(weights(folder), weights(tiny))
