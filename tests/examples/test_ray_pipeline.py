"""The pipeline of Ray Data: a table of what the model gives of each recording alone."""

import os

import numpy as np
import pytest

from wavlm_fast import Extractor

ray = pytest.importorskip("ray", reason="the pipeline is Ray Data's")
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def test_ray_pipeline(example, hub, corpus, capfd, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the table is Parquet")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    corpus.joinpath("broken.wav").write_text("no audio")
    model, out = hub("microsoft/wavlm-base-plus"), corpus.parent / "vectors.parquet"
    try:
        ray.init(num_cpus=2, include_dashboard=False)
    except Exception as error:
        pytest.skip(f"Ray cannot be started here: {error}")
    try:
        example("ray_pipeline").main([str(corpus), str(out), "--model", model, "--layer", "3", "--batch-size", "2"])
    finally:
        ray.shutdown()
    found = {row["path"]: row for row in parquet.read_table(out).to_pylist()}
    paths = sorted(map(str, corpus.glob("**/[0-9].wav")))
    assert sorted(found) == paths
    wanted = Extractor(model, layers=3, average="frames")({"path": paths})["hidden"]
    for path, vector in zip(paths, wanted):
        assert found[path].keys() == {"path", "seconds", "hidden"}
        np.testing.assert_allclose(found[path]["hidden"], vector, rtol=1e-4, atol=1e-5)
    assert found[os.path.join(corpus, "anna", "1.wav")]["seconds"] == 1
    assert f"{out}: features of 6 recordings" in capfd.readouterr().out
