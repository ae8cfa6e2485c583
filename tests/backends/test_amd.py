"""Which of AMD's GPUs the Triton kernels run on."""

from types import SimpleNamespace

import pytest
import torch

from wavlm_fast import backends

pytest.importorskip("triton")


@pytest.fixture
def of(monkeypatch):
    """What the Triton backend says of a ROCm device with this architecture."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def ask(name):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
        return backends.load("triton").why_not(torch.device("cuda"))

    return ask


@pytest.mark.parametrize("name", ["gfx908:sramecc+", "gfx90a:sramecc+:xnack-", "gfx942", "gfx950"])
def test_cdna(of, name):
    assert of(name) is None


@pytest.mark.parametrize("name", ["gfx1030", "gfx1100", "gfx1201", "gfx906"])
def test_others_are_refused(of, name):
    assert of(name).endswith(f"were made for CDNA (gfx90a, gfx942 and their kin), this is {name}")
