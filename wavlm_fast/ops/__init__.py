"""The ops: what the fused kernels compute, each with its contract and its reference in plain torch.

`references[name]` is the op in differentiable plain torch; run in float64 it is the truth.

What is not finite in the operands, NaN or infinite, reaches the same elements of outputs and gradients on the CPU's
backends: those that the reference in the same dtype makes not finite, wherever the reference in float64 agrees with it.
Whether such an element is NaN or infinite may differ. Large finite numbers leave the range where the reference's do,
save within a factor of two of its end, where the order of a sum decides, and where several operands are large at once.
"""

from ._define import kernels, references, schemas
from .add_layer_norm import add_layer_norm
from .encoder_layer import encoder_layer
from .feature_encoder import feature_encoder
from .gated_attention import gated_attention
from .linear_act import linear_act
from .position_gate import position_gate
from .positional_conv import positional_conv
from .stats_pool import stats_pool
from .strided_conv import strided_conv
from .tdnn import tdnn
from .waveform_conv import waveform_conv

__all__ = [
    "add_layer_norm",
    "encoder_layer",
    "feature_encoder",
    "gated_attention",
    "kernels",
    "linear_act",
    "position_gate",
    "positional_conv",
    "references",
    "schemas",
    "stats_pool",
    "strided_conv",
    "tdnn",
    "waveform_conv",
]
