"""The notebook runs from top to bottom, without a network, and shows what it says."""

import json
import os
import sys

import pytest
from doc_blocks import ROOT

PATH = ROOT / "examples" / "tour.ipynb"
CLAIMS = """
pairs = zip(differences["ours and the truth"], differences["transformers and the truth"], strict=True)
assert all(our <= 2 * their + 1e-5 for our, their in pairs), differences
assert layers.shape == (len(theirs.encoder.layers) + 1,) * 2 and frames.shape == (length, length)
assert torch.allclose(layers.diagonal(), torch.ones(len(layers)), atol=1e-4)
added, inner = [], attention.torch_multi_head_self_attention
attention.torch_multi_head_self_attention = lambda *args: added.append(args[2]) or inner(*args)
attention(states[:1])
scores = added[0].view(-1, length, length)[head]
assert torch.allclose(scores, gate[:, None] * bias, atol=1e-4), "not what transformers' attention adds"
assert all(value < 1e-4 for name in ("ours, padded", "ours, a list") for value in errors[name]), errors
assert all(value > 1e-3 for value in errors["transformers, padded"][1:]), errors
"""


def test_that_it_holds_no_outputs():
    cells = json.loads(PATH.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_that_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="it runs notebooks")
    nbformat = pytest.importorskip("nbformat", reason="it reads notebooks")
    pytest.importorskip("ipykernel", reason="notebooks run in it")
    from jupyter_client import KernelManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS))
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    nbclient.NotebookClient(notebook, km=manager, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [list(output.get("data", ())) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in kinds for kinds in shown) == 5
