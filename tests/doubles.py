"""What tests of derived state derive."""

from __future__ import annotations

import pytest
import torch

import wavlm_fast.derived
from wavlm_fast.backends import cpu
from wavlm_fast.derived import derived


@pytest.fixture(autouse=True, params=["C++", "Python"])
def fingerprint(request, monkeypatch):
    """Changes are seen in two ways, with the extension and without."""
    if request.param == "Python":
        monkeypatch.setattr(wavlm_fast.derived, "_fingerprint", None)
    elif cpu.extension.problem() is not None:
        pytest.skip(cpu.extension.problem())


class Double:
    """Twice the parameters, side by side; counts how often they are computed."""

    def __init__(self, *sources, kind="double"):
        self.sources, self.kind, self.built = sources, kind, 0

    def __call__(self):
        return derived(self.kind, self.sources, self._build)

    def _build(self):
        self.built += 1
        return torch.cat([s.flatten() for s in self.sources]) * 2
