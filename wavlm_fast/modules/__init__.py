"""The stages of WavLM, one file each, in the order in which the signal meets them.

A stage is a class that does the work with submodules under the names of transformers' modules. Whose modules it works
with, and how they are called, a family says (`families/`).
"""

from __future__ import annotations

from ._steps import FastModule, Inline, Signal, Step, steps_of, steps_of_children
from .attention import Attention
from .encoder_layer import EncoderLayer, FeedForward
from .feature_encoder import ConvLayer, FeatureEncoder
from .feature_projection import FeatureProjection
from .positional_conv import PositionalConv
from .xvector import TimeDelayLayer, pool_statistics

__all__ = [
    "Attention",
    "ConvLayer",
    "EncoderLayer",
    "FastModule",
    "FeatureEncoder",
    "FeatureProjection",
    "FeedForward",
    "Inline",
    "PositionalConv",
    "Signal",
    "Step",
    "TimeDelayLayer",
    "pool_statistics",
    "steps_of",
    "steps_of_children",
]
