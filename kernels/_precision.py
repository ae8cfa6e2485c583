"""How fp32 matrix products are computed: torch's own setting decides for these kernels too."""

import torch

from ._target import has_tf32


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of `tl.dot`: "tf32" where torch's products may use it and the GPU has it, else "ieee"."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and has_tf32(device) else "ieee"
