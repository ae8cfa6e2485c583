"""Floating-point operations of a forward by the direct algorithm, stage by stage.

Two operations for every multiplication of a convolution, a linear layer or an attention product. Norms, activations and
softmax count nothing, and whoever gets by with fewer multiplications is credited with all of them: figures of different
algorithms compare.
"""

from __future__ import annotations

from itertools import pairwise

from transformers import WavLMConfig

# In the order the signal meets them.
STAGES = (
    "waveform conv", "feature encoder", "projection", "positional conv", "qkv", "gate", "attention", "out proj",
    "feed-forward in", "feed-forward out", "norms", "head",
)  # fmt: skip


def forward(config: WavLMConfig, batch: int, samples: int, cls: str = "WavLMModel") -> dict[str, float]:
    """Operations of each stage.

    Args:
        config: of the model.
        batch: utterances.
        samples: of each, padding included: transformers and ours compute padded frames too.
        cls: transformers' class, which decides what head is on top.

    Returns:
        Stage -> operations, for every one of STAGES.
    """
    found = dict.fromkeys(STAGES, 0.0)
    lengths, channels = frames(config, samples), (1, *config.conv_dim)
    for index, (narrow, wide) in enumerate(pairwise(channels)):
        stage = "feature encoder" if index else "waveform conv"
        found[stage] += lengths[index] * narrow * wide * config.conv_kernel[index]
    T, C, H = lengths[-1], config.hidden_size, config.num_attention_heads
    found["projection"] = T * channels[-1] * C
    found["positional conv"] = T * C * C // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layer = {
        "qkv": 3 * T * C * C,
        "gate": 8 * T * H * (C // H),
        "attention": 2 * T * T * C,
        "out proj": T * C * C,
        "feed-forward in": T * C * config.intermediate_size,
        "feed-forward out": T * C * config.intermediate_size,
    }
    found |= {stage: config.num_hidden_layers * count for stage, count in layer.items()}
    found["head"] = _head(config, cls, T)
    return {stage: 2.0 * batch * count for stage, count in found.items()}


def _head(config: WavLMConfig, cls: str, T: int) -> int:
    """Multiplications of what is on top of the encoder for one utterance."""
    C = config.hidden_size
    if cls == "WavLMForCTC":
        return T * C * config.vocab_size
    if cls == "WavLMForSequenceClassification":
        return T * C * config.classifier_proj_size + config.classifier_proj_size * config.num_labels
    if cls == "WavLMForAudioFrameClassification":
        return T * C * config.num_labels
    return _xvector(config, T) if cls == "WavLMForXVector" else 0


def _xvector(config: WavLMConfig, T: int) -> int:
    """Multiplications of projector, time-delay layers, embedding and classifier."""
    count, width = T * config.hidden_size * config.tdnn_dim[0], config.tdnn_dim[0]
    for wide, kernel, dilation in zip(config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation, strict=True):
        T -= (kernel - 1) * dilation
        count += T * width * wide * kernel
        width = wide
    embedding = config.xvector_output_dim
    return count + 2 * width * embedding + embedding * embedding  # twice: mean and deviation


def frames(config: WavLMConfig, samples: int) -> list[int]:
    """Frames after each convolution."""
    found = []
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
        found.append(samples)
    return found
