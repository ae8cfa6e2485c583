"""The position bias that layers hand on, by itself: what anybody sees of it is the dense one."""

from __future__ import annotations

import copy
import pickle

import torch
from wavlm_cases import ours_only

from wavlm_fast.modules._position_bias import PositionBias, dense, handed_on, taken

pytestmark = ours_only


def test_a_lazy_position_bias_is_the_dense_one():
    compact = torch.randn(2, 9, requires_grad=True)
    for shape in ((6, 5, 5), (3, 2, 5, 5)):
        lazy, whole = handed_on(compact, shape, torch.float32), dense(compact, shape, torch.float32)
        assert type(lazy) is PositionBias and taken(lazy) is compact
        assert lazy.shape == whole.shape and lazy.requires_grad and not lazy.is_leaf
        assert torch.equal(lazy, whole) and (lazy.detach().numpy() == whole.detach().numpy()).all()
        assert torch.equal(torch.cat([lazy[:1], lazy[1:]]), whole) and torch.equal(lazy.transpose(-1, -2), whole.mT)
        assert torch.equal(copy.deepcopy(lazy), whole) and torch.equal(pickle.loads(pickle.dumps(lazy)), whole)
        weights = torch.randn(shape)
        grads = [torch.autograd.grad((own * weights).sum(), compact)[0] for own in (lazy, whole)]
        assert torch.allclose(*grads)
        assert taken(lazy) is compact  # looking changes nothing


def test_what_is_written_to_a_lazy_position_bias_stays():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            lazy = handed_on(torch.randn(2, 9), (4, 5, 5), torch.float32)
            lazy[:, 1:] = 0
            lazy.add_(1)
            assert (taken(lazy)[:, 1:] == 1).all() and (lazy[:, 1:] == 1).all() and not (lazy[:, 0] == 1).all()
    assert taken(torch.ones(1)).item() == 1 and taken(None) is None


def test_a_lazy_position_bias_through_functions_of_autograd():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    compact, weights = torch.randn(2, 9, requires_grad=True), torch.randn(4, 5, 5)
    expected = torch.autograd.grad((dense(compact, (4, 5, 5), torch.float32) * weights).sum(), compact)[0]
    for function, factor in ((Twice, 2), (Same, 3)):
        out = taken(function.apply(handed_on(compact, (4, 5, 5), torch.float32)))
        assert torch.allclose(torch.autograd.grad((out * weights).sum(), compact)[0], factor * expected)


def test_a_hook_on_the_gradient_of_a_lazy_position_bias():
    compact, seen = torch.randn(2, 9, requires_grad=True), []
    lazy = handed_on(compact, (4, 5, 5), torch.float32)
    lazy.register_hook(seen.append)
    taken(lazy).sum().backward()
    assert len(seen) == 1 and seen[0].shape == (4, 5, 5)
