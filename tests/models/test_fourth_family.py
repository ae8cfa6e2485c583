"""Another house of WavLM is one more file in `wavlm_fast/families/`, of which nobody else is told."""

from __future__ import annotations

import sys

import pytest
import torch
from another_house import FAMILY, Attention
from torch import nn
from wavlm_cases import ours_only, subject

from wavlm_fast import families

pytestmark = ours_only


@pytest.fixture
def house(tmp_path, monkeypatch):
    tmp_path.joinpath("another_house_of_wavlm.py").write_text(FAMILY)
    with monkeypatch.context() as patch:
        patch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
        families.find()
        yield
    sys.modules.pop("wavlm_fast.families.another_house_of_wavlm")
    families.find()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), Attention(32, 4, 6), Attention(32, 4, 6)).eval()


def test_without_its_file_it_is_unknown():
    with pytest.raises(TypeError, match="contains none"):
        subject.accelerate(model())


def test_its_modules_are_fast_and_come_back(house):
    plain, fast = model(), subject.accelerate(model())
    x = torch.randn(2, 19, 32)
    assert "FastAttention(" in repr(fast) and isinstance(fast[1], Attention)
    with torch.no_grad():
        wanted = plain(x)
        torch.testing.assert_close(fast(x), wanted)
        assert torch.equal(subject.restore(fast)(x), wanted) and type(fast[1]) is Attention
    rows = {row.op for row in subject.report(subject.accelerate(fast)).rows}
    assert {"gated_attention", "position_gate", "linear_act"} <= rows


def test_it_learns(house):
    gradients = []
    for each in (model(), subject.accelerate(model())):
        x = torch.linspace(-1, 1, 2 * 19 * 32).view(2, 19, 32).requires_grad_()
        each(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in each.parameters())])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_copy_that_was_changed_keeps_its_own_code(house):
    class Changed(Attention):
        def forward(self, x):
            return super().forward(x) + 0.01 * x

    changed = nn.Sequential(Changed(32, 4, 6)).eval()
    x = torch.randn(2, 19, 32)
    with torch.no_grad():
        wanted = changed(x)
        assert torch.equal(subject.accelerate(changed)(x), wanted)
    assert "computes something else than the published one" in str(subject.report(changed))
