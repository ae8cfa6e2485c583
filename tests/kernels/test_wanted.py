"""Gradients that nobody wants are not computed, and those that are wanted are the same without them, bit for bit."""

import pytest
import torch
from cases import kernel, randn
from test_bytes import CASES
from test_gated_attention import deterministic, inputs  # noqa: F401


def attention():
    args = inputs(2, 70, 2, 16, [70, 33])
    return (randn(*args[0].shape, seed=3), *args[:6], *kernel("gated_attention")(*args), *args[6:], [True] * 5)


def linear():
    x, weight, bias, pre = randn(2, 7, 48), randn(72, 48), randn(72), randn(2, 7, 72)
    return randn(2, 7, 72, seed=1), x, weight, bias, pre, "gelu", [True] * 3


CALLS = {name: lambda args=args: args for name, (_, args) in CASES.items() if isinstance(args[-1], list)}
CALLS |= {"gated_attention_backward": attention, "linear_act_backward": linear}


@pytest.mark.parametrize("name", CALLS)
def test_each_alone_is_as_among_all(name, deterministic):  # noqa: F811
    op, args = name.partition(" ")[0], CALLS[name]()
    at = next(i for i, a in enumerate(args) if isinstance(a, list))
    among_all = kernel(op)(*args)
    present = [i for i, wanted in enumerate(args[at]) if wanted]
    for only in present:
        wanted = [i == only for i in range(len(args[at]))]
        found = kernel(op)(*args[:at], wanted, *args[at + 1 :])
        for i, gradient in enumerate(found):
            if wanted[i]:
                assert torch.equal(gradient, among_all[i]), f"gradient {i}"
            else:
                assert not gradient.numel(), f"gradient {i}"
