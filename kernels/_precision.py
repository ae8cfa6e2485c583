"""How fp32 matrix products are computed: torch's own setting decides for these kernels too."""

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: "tf32" where torch's matrix products may use it, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9: its getter follows the settings above it
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
