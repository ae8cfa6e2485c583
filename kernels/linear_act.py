"""Linear layer with bias and activation.

Without an activation the vendor's product does everything: bias is part of its epilogue. With one, writing the product
and reading it again costs as much as a small product itself, so half precision with few input channels runs one kernel
whose epilogue is bias and activation. Longer sums make the product the larger part, which the vendor does better, and
fp32 tiles fill what the epilogue would need: there, product and activation stay apart.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ._finish_backward import finish_backward
from ._frames_product import frames_product
from ._wanted import only

# Up to here, at the balance of arithmetic and memory of an A100 or H100 (about 150 to 300 operations per byte), one
# more pass over the output takes a third of the product's time or more. The fused loop keeps the matrix unit busy for
# four fifths of the time on sm_90 and more elsewhere (benchmarks.gpu_static): it may lose less than the pass costs.
FUSED_CHANNELS = 1024


def _activated(pre: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return F.relu(pre)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op `linear_act`: `[..., C']`, and the product before its activation when `save` asks for it."""
    if activation == "none" or not x.numel():
        return F.linear(x, weight, bias), None
    if x.dtype == torch.float32 or x.shape[-1] > FUSED_CHANNELS:
        pre = F.linear(x, weight, bias)
        return _activated(pre, activation), pre if save else None
    rows = x.contiguous().view(1, -1, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    pre = torch.empty_like(out) if save else None
    frames_product(
        rows, weight.contiguous().t()[None, None], out.view(1, -1, weight.shape[0]), rows.shape[1],
        bias=bias, activation=activation, pre=pre,
    )  # fmt: skip
    return out, pre


def linear_act_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The op `linear_act_backward`: gradients of x, weight and bias, those that are wanted, products by the vendor."""
    grad = grad.contiguous()
    if not grad.numel():
        return only(wanted, *(None if t is None else torch.zeros_like(t) for t in (x, weight, bias)))
    dpre, sums = finish_backward(grad, pre.contiguous(), None, activation, wanted[2])
    rows = dpre.view(-1, weight.shape[0])
    dx = (rows @ weight).view(x.shape) if wanted[0] else None
    dweight = rows.t() @ x.reshape(-1, weight.shape[1]) if wanted[1] else None
    return dx, dweight, sums[0].to(bias.dtype) if wanted[2] else None
