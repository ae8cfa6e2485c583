"""add_layer_norm of one backend against float64, as a program: `python add_layer_norm_cases.py cpu`.

An instruction set level and Triton's interpreter are chosen once per process, so the tests run this in processes of
their own. It prints one JSON object per comparison: what was compared, its error, and the error allowed, which is
twice that of plain torch in the same dtype.
"""

import json
import sys

import torch
import torch.nn.functional as F

SHAPES = [(1, 1), (3, 7), (1, 768), (2, 37, 96), (129, 768), (33, 1024), (0, 8)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.float16)}


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual, grad_sum, grad_normed = (torch.randn(shape, generator=generator) for _ in range(4))
    x[..., shape[-1] // 2] += 50  # an outlier channel, as trained models have them
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return tuple(t.to(dtype) for t in (x, residual, weight, bias, grad_sum, grad_normed))


def plain(x, residual, weight, bias, grad_sum, grad_normed):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    total = x + residual
    normed = F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5)
    torch.autograd.backward((total, normed), (grad_sum, grad_normed))
    return total.detach(), normed.detach(), x.grad, weight.grad, bias.grad


def fast(table, x, residual, weight, bias, grad_sum, grad_normed):
    total, normed = table["add_layer_norm"].fn(x, residual, weight, bias, 1e-5, True)
    _, alone = table["add_layer_norm"].fn(x, residual, weight, bias, 1e-5, False)
    assert torch.equal(normed, alone)
    backward = table["add_layer_norm_backward"].fn
    of_norm, zeros = (backward(g, grad_normed, total, weight, 1e-5, [True] * 3) for g in (x.new_empty(0), x * 0))
    assert all(torch.equal(a, b) for a, b in zip(of_norm, zeros, strict=True))
    gradients = backward(grad_sum, grad_normed, total, weight, 1e-5, [True] * 3)
    return total, normed, *gradients


def error(found, truth):
    return (found.double() - truth).abs().max().item() if truth.numel() else 0.0


def main(backend):
    from wavlm_fast import backends

    table = backends.load(backend).TABLE
    one = torch.ones(1, 1)
    assert table["add_layer_norm"].why_not(one, one, one[0], one[0], 1e-5, True) is None
    for dtype in DTYPES[backend]:
        for shape in SHAPES:
            case = inputs(shape, dtype)
            # Both norms are of the sum as it was rounded: that rounding is the contract, not an error.
            rounded = ((case[0] + case[1]).double(), torch.zeros(shape, dtype=torch.float64))
            truth = plain(*rounded, *(t.double() for t in case[2:]))
            names = ("sum", "normed", "dx", "dweight", "dbias")
            for name, ours, theirs, true in zip(names, fast(table, *case), plain(*case), truth, strict=True):
                tiny = 4 * torch.finfo(dtype).eps * (true.abs().max().item() if true.numel() else 0)
                if dtype == torch.float32:
                    tiny += 1e-4 * (shape[-1] == 1)  # one channel: the gradient is a difference of equal numbers
                row = {
                    "case": f"{name} {list(shape)} {dtype}",
                    "error": error(ours, true),
                    "allowed": 2 * error(theirs, true) + tiny,
                    "dtype": ours.dtype == dtype and ours.shape == true.shape,
                }
                print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1])
