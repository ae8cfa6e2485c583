"""Values derived from weights that want a gradient: remembered, and joined to their sources."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from doubles import Double, fingerprint  # noqa: F401 (a fixture of every test here)
from torch import nn

from wavlm_fast.derived import linked, values


class TestLinked:
    """Remembered, though a gradient is wanted."""

    @pytest.fixture
    def pair(self):
        return tuple(nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2))

    def times(self, pair):
        return linked("times", pair, lambda a, b: a * b.sin())

    def test_value_and_gradients(self, pair):
        a, b = pair
        for _ in range(2):
            assert torch.equal(self.times(pair), a * b.sin())
            assert torch.autograd.gradcheck(lambda *given: linked("times", given, lambda a, b: a * b.sin()), pair)
            assert torch.autograd.gradgradcheck(lambda *given: linked("times", given, lambda a, b: a * b.sin()), pair)
        b.requires_grad_(False)
        (grad,) = torch.autograd.grad(self.times(pair).sum(), a)
        assert torch.equal(grad, b.sin())

    def test_is_computed_once_and_what_is_derived_from_it_too(self, pair):
        first, again = self.times(pair), self.times(pair)
        assert first is not again
        assert first.data_ptr() == again.data_ptr()
        assert first.requires_grad
        with torch.no_grad():
            outer = [Double(value)() for value in (first, again, self.times(pair))]
        assert outer[0] is outer[1] is outer[2]
        assert Double(first)().requires_grad
        assert len(values(pair)) == 2

    def test_follows(self, pair):
        before = self.times(pair)
        with torch.no_grad():
            pair[1].mul_(2)
        after = self.times(pair)
        assert torch.equal(after, pair[0] * pair[1].sin())
        assert not torch.equal(after, before)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.sum().backward()
        pair[0].data.mul_(3)
        assert torch.equal(self.times(pair), pair[0] * pair[1].sin())

    def test_holds_no_graph(self, pair):
        value = weakref.ref(self.times(pair))
        gc.collect()
        assert value() is None
        assert not values(pair)[0].requires_grad
