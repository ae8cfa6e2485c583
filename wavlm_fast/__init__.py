"""Microsoft's WavLM speech models, fast: transformers' classes with fused kernels in their modules.

    from wavlm_fast import WavLMForXVector
    model = WavLMForXVector.from_pretrained("microsoft/wavlm-base-plus-sv")

or, for a model that exists already, `wavlm_fast.accelerate(model)`.
"""

from ._signals import guard as _guard

_guard()  # first: what follows takes seconds

from transformers import WavLMConfig

from .backends import use_backend
from .cache import empty_cache
from .extraction.extractor import Extractor
from .graphed import graphed
from .models import (
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
    WavLMModel,
)
from .ragged import forward_ragged
from .report import report
from .swap import accelerate, install, restore, uninstall
from .truncated import truncate

__version__ = "0.2.0"

__all__ = [
    "Extractor",
    "WavLMConfig",
    "WavLMForAudioFrameClassification",
    "WavLMForCTC",
    "WavLMForSequenceClassification",
    "WavLMForXVector",
    "WavLMModel",
    "accelerate",
    "empty_cache",
    "forward_ragged",
    "graphed",
    "install",
    "report",
    "restore",
    "truncate",
    "uninstall",
    "use_backend",
]
