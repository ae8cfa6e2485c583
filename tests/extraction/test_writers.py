"""Every format is read back by the library whose format it is."""

import json
import tarfile

import numpy as np
import pytest
import torch

from wavlm_fast.errors import UserError
from wavlm_fast.extraction.blocks import Block
from wavlm_fast.extraction.folder import Folder
from wavlm_fast.extraction.sources import Utterance
from wavlm_fast.extraction.writers import FORMATS, check, path_of

IDS = ("one", "sub/two.x", "naïve", "sub/one")


def written(kind, tmp_path, outputs, ids=IDS, blocks=2, name="out"):
    """Write outputs in so many blocks, as a run does, and give the folder and its records."""
    out = tmp_path / (f"{name}.parquet" if kind == "parquet" else name)
    folder = Folder(out, one_file=kind == "parquet")
    folder.begin({"format": kind}, False)
    per_block = -(-len(ids) // blocks)
    for index in range(blocks):
        some = range(index * per_block, min(len(ids), (index + 1) * per_block))
        block = Block(index, tuple(Utterance(ids[i], f"/audio/{ids[i]}.wav") for i in some))
        writer = FORMATS[kind](folder, index, {"what": "text" if isinstance(outputs[0], str) else "hidden"})
        records = [{"id": ids[i], "audio": f"/audio/{ids[i]}.wav", "seconds": 1.5} for i in some]
        for record, i in zip(records, some):
            if not isinstance(outputs[i], str):
                record["shape"] = list(outputs[i].shape)
            writer.write(record, outputs[i])
        writer.close()
        folder.commit(block, records)
        assert all(map(folder.stands, records))
    folder.finish({"format": kind})
    FORMATS[kind].finish(folder, str(out))
    return out, [json.loads(line) for line in folder.manifest.read_text().splitlines()[1:]]


@pytest.fixture
def states():
    """Features of frames, views into more."""
    return [torch.randn(3, n, 8)[1] for n in (5, 1, 7, 2)]


READERS = {
    "npy": np.load,
    "npz": lambda path: np.load(path)["hidden_states"],
    "pt": lambda path: torch.load(path, weights_only=True).numpy(),
    "safetensors": lambda path: __import__("safetensors.numpy").numpy.load_file(path)["features"],
    "lhotse": np.load,
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_for_each(kind, tmp_path, states):
    out, records = written(kind, tmp_path, states)
    assert [r["id"] for r in records] == list(IDS)
    for record, wanted in zip(records, states):
        assert record["file"].startswith(record["id"] + ".")
        np.testing.assert_array_equal(READERS[kind](out / record["file"]), wanted)


def test_lhotse_reads_its_manifest(tmp_path, states):
    lhotse = pytest.importorskip("lhotse")
    out, _ = written("lhotse", tmp_path, states)
    found = lhotse.FeatureSet.from_file(out / "features.jsonl")
    for features, identity, wanted in zip(found, IDS, states):
        assert features.recording_id == identity
        np.testing.assert_array_equal(features.load(), wanted)


def test_kaldiio_reads_its_scp(tmp_path, states):
    kaldiio = pytest.importorskip("kaldiio")
    out, records = written("kaldi", tmp_path, states)
    found = kaldiio.load_scp(str(out / "feats.scp"))
    assert list(found) == list(IDS)
    for identity, wanted in zip(IDS, states):
        np.testing.assert_array_equal(found[identity], wanted)
    assert len({r["file"] for r in records}) == 2
    with pytest.raises(UserError, match="kaldi wants ids without blanks, got 'two words'"):
        written("kaldi", tmp_path, states, ids=("two words", "b", "c", "d"), name="other")


@pytest.mark.parametrize("text", [False, True], ids=["vectors", "text"])
def test_pyarrow_reads_one_table(tmp_path, text):
    pq = pytest.importorskip("pyarrow.parquet")
    outputs = [f"words {i}" for i in range(4)] if text else list(torch.randn(4, 8).half())
    out, records = written("parquet", tmp_path, outputs)
    table = pq.read_table(out)
    assert table["id"].to_pylist() == list(IDS)
    assert table["seconds"].to_pylist() == [1.5] * 4
    if text:
        assert table["text"].to_pylist() == outputs
    else:
        assert str(table.schema.field("hidden").type).startswith("fixed_size_list<")
        np.testing.assert_array_equal(np.array(table["hidden"].to_pylist(), np.float16), torch.stack(outputs))
    assert {r["file"] for r in records} == {"out.parquet"}
    assert (tmp_path / "out.manifest.jsonl").exists()


@pytest.mark.parametrize("text", [False, True], ids=["features", "text"])
def test_webdataset_reads_its_shards(tmp_path, states, text):
    webdataset = pytest.importorskip("webdataset")
    outputs = [f"words {i}" for i in range(4)] if text else states
    out, records = written("webdataset", tmp_path, outputs)
    shards = sorted(str(path) for path in out.glob("*.tar"))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in found] == list(IDS)
    assert [sample["__key__"] for sample in found] == [r["key"] for r in records]
    for sample, wanted in zip(found, outputs):
        if text:
            assert sample["txt"] == wanted
        else:
            np.testing.assert_array_equal(sample["npy"], wanted)
    with tarfile.open(shards[0]) as tar:
        assert {member.mtime for member in tar} == {0}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_bytes_twice(kind, tmp_path, states):
    pytest.importorskip({"kaldi": "kaldiio", "parquet": "pyarrow"}.get(kind, "numpy"))
    outputs = ["a", "b", "c", "d"] if kind == "txt" else [s[0] for s in states] if kind == "parquet" else states
    trees = []
    for name in ("first", "second"):
        out, _ = written(kind, tmp_path / name, outputs)
        # A manifest of Kaldi's or lhotse's says where it lies.
        paths = [path for path in out.parent.rglob("*") if path.is_file()]
        trees.append({path.name: path.read_bytes().replace(b"/second/", b"/first/") for path in paths})
    assert trees[0] == trees[1]


@pytest.mark.parametrize("identity", ["../up", "/etc/x", "a//b", ".", "..", "", "a/../../b", "nul\0", "a/./b", "~"])
def test_no_id_leaves_the_folder(tmp_path, identity):
    path = (tmp_path / path_of(identity)).resolve()
    assert path.is_relative_to(tmp_path)
    assert path != tmp_path
    out, (record,) = written("npy", tmp_path, [torch.zeros(2, 2)], ids=(identity,), blocks=1)
    assert np.load(out / record["file"]).shape == (2, 2)


def test_ids_that_differ_do_not_share_a_file():
    ids = ["a", "a/", "/a", "./a", "../a", "a/.", "a/..", "a//", "", ".", "..", "%2E", "%"]
    paths = [path_of(identity) for identity in ids]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("identity", ["x" * 300, "one.npy/below"])
def test_a_name_that_no_file_can_have(tmp_path, identity):
    with pytest.raises(UserError, match="cannot be a file: "):
        written("npy", tmp_path, [torch.zeros(2, 2)] * 2, ids=("one", identity), blocks=1)


def test_a_lost_folder_is_not_made_again(tmp_path):
    folder = Folder(tmp_path / "out")
    folder.begin({}, False)
    writer = FORMATS["npy"](folder, 0, {"what": "hidden"})
    (tmp_path / "out").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        writer.write({"id": "a/b", "audio": "x"}, torch.zeros(2, 2))
    assert not (tmp_path / "out").exists()


def test_what_each_format_holds():
    check("npy", "hidden", 3, torch.float16)
    for kind, what, dims, dtype, sentence in (
        ("npy", "text", 1, torch.float32, "text can be written as txt, parquet, webdataset, got npy"),
        ("kaldi", "hidden", 2, torch.float16, "kaldi holds float32, got --dtype-out float16"),
        ("lhotse", "xvector", 1, torch.float32, "lhotse holds features of frames, got one vector"),
        ("parquet", "hidden", 2, torch.float32, "parquet holds one vector or text for each utterance"),
    ):
        pytest.importorskip({"kaldi": "kaldiio", "parquet": "pyarrow"}.get(kind, "numpy"))
        with pytest.raises(UserError, match=sentence):
            check(kind, what, dims, dtype)
