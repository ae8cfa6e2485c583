"""How fp32 products are computed: torch's own settings decide for these kernels too."""

import torch

from ._target import has_tf32, target


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of `tl.dot`: "tf32" where torch's products may use it and the GPU has it, else "ieee"."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and has_tf32(device)
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def conv_precision(dtype: torch.dtype, device: torch.device) -> str:
    """The same of convolutions, which torch has use TF32 unless somebody says otherwise, and on AMD never."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32" and target(device) != "cdna"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"
