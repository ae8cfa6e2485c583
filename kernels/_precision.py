"""How fp32 products are computed: torch's own settings decide for these kernels too.

Convolutions that torch is not to make in TF32 are made of bf16 pieces where that pays: three of them hold an fp32
number, and six products of them on the matrix unit err no more than one on the fp32 units does.
`python -m benchmarks.gpu_fp32` has the errors, emulated, and what becomes of registers and time. Attention keeps the
fp32 units: its tiles of pieces are more than a thread has registers for.
"""

import torch

from ._target import has_tf32, pieces_pay, target


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of `tl.dot`: "tf32" where torch's products may use it and the GPU has it, else "ieee"."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and has_tf32(device)
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def conv_precision(dtype: torch.dtype, device: torch.device) -> str:
    """The same of convolutions, which torch has use TF32 unless somebody says otherwise, and on AMD never; "bf16x6"
    where that is as exact as "ieee" and faster.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cudnn.conv.fp32_precision == "tf32" and target(device) != "cdna":
        return "tf32"
    return "bf16x6" if pieces_pay(device) else "ieee"
