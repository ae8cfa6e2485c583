"""The engine ray: the bytes of a plain run, whatever happens to its nodes; and `Extractor` in others' pipelines."""

import json
import os
import threading
import time

import numpy as np
import pytest
import soundfile

from wavlm_fast import Extractor, cli

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(6)
    for i in range(24):
        soundfile.write(root / f"{i:02d}.wav", generator.uniform(-0.3, 0.3, int(generator.uniform(4000, 16000))), 16000)
    (root / "broken.wav").write_text("no audio")
    return root


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        found.second = found.add_node(num_cpus=1)
        found.wait_for_nodes()
    except Exception as error:
        pytest.skip(f"no Ray cluster can be started here: {error}")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def words(checkpoints, corpus, monkeypatch):
    monkeypatch.setattr("wavlm_fast.extract._MOST_SECONDS", 1.0)
    folder = checkpoints["base", "WavLMModel"]
    return lambda out, *more: [
        *("extract", str(corpus), "--model", folder, "--layer", "2", "--batch-seconds", "1", "--out", str(out)), *more
    ]  # fmt: skip


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_node_that_is_lost(cluster, words, tmp_path):
    assert cli.main(words(tmp_path / "plain")) == 3
    out = tmp_path / "ray"

    def kill():
        while len(list(out.glob(".wavlm-fast/blocks/*.jsonl"))) < 3:
            time.sleep(0.02)
        cluster.remove_node(cluster.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    assert cli.main(words(out, "--engine", "ray", "--ray-address", cluster.address, "--ray-actors", "2")) == 3
    killer.join()
    assert tree(out) == tree(tmp_path / "plain")


def test_in_a_dataset_of_ray(cluster, checkpoints, corpus):
    if not ray.is_initialized():
        ray.init(address=cluster.address)
    extractor = Extractor(checkpoints["base", "WavLMModel"], layers=2, average="frames")
    paths = sorted(str(path) for path in corpus.glob("[0-9]*.wav"))
    rows = ray.data.from_items([{"path": path} for path in paths]).map_batches(extractor, batch_size=5).take_all()
    wanted = extractor({"path": paths})["hidden"]
    found = {row["path"]: row["hidden"] for row in rows}  # in any order
    np.testing.assert_allclose([found[path] for path in paths], wanted, rtol=1e-4, atol=1e-5)


def test_in_a_dataset_of_datasets(checkpoints, corpus):
    datasets = pytest.importorskip("datasets")
    extractor = Extractor(checkpoints["base", "WavLMModel"], layers=2)
    paths = sorted(str(path) for path in corpus.glob("[0-9]*.wav"))
    found = datasets.Dataset.from_dict({"path": paths}).map(extractor, batched=True, batch_size=5)
    wanted = extractor({"path": paths})["hidden"]
    for row, value in zip(found, wanted):
        np.testing.assert_allclose(row["hidden"], value, rtol=1e-4, atol=1e-5)


def test_an_address_where_no_cluster_is(words, tmp_path, capsys):
    ray.shutdown()
    assert cli.main(words(tmp_path / "out", "--engine", "ray", "--ray-address", "127.0.0.1:1")) == 2
    assert "the Ray cluster 127.0.0.1:1 cannot be used: " in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / ".wavlm-fast" / "settings.json").read_text())["layers"] == [2]
