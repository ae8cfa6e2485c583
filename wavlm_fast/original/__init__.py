"""WavLM with the constructor, parameter names and `extract_features` of Microsoft's own class, in plain torch.

    from wavlm_fast.original import WavLM, WavLMConfig  # in place of: from WavLM import WavLM, WavLMConfig

    checkpoint = torch.load("WavLM-Base+.pt", weights_only=True)
    model = WavLM(WavLMConfig(checkpoint["cfg"])).eval()
    model.load_state_dict(checkpoint["model"])
    x, _ = model.extract_features(waveform)  # [B, T, C]

WavLM (Chen et al., 2022) is a stack of convolutions over the waveform (`ConvFeatureExtractionModel`), a convolution
that tells each frame its neighbourhood, and a transformer (`TransformerEncoder`) whose attention knows how far apart
two frames are, each frame gating that knowledge by what it holds (`MultiheadAttention`).
"""

from .config import WavLMConfig
from .masking import compute_mask_indices
from .modules import Fp32GroupNorm, Fp32LayerNorm, GLU_Linear, MultiheadAttention, SamePad, TransposeLast
from .wavlm import ConvFeatureExtractionModel, TransformerEncoder, TransformerSentenceEncoderLayer, WavLM

__all__ = [
    "ConvFeatureExtractionModel",
    "Fp32GroupNorm",
    "Fp32LayerNorm",
    "GLU_Linear",
    "MultiheadAttention",
    "SamePad",
    "TransformerEncoder",
    "TransformerSentenceEncoderLayer",
    "TransposeLast",
    "WavLM",
    "WavLMConfig",
    "compute_mask_indices",
]
