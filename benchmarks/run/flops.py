"""Floating-point operations of a forward by the direct algorithm, stage by stage, from what the ops say of themselves.

Two operations for every multiplication of a convolution, a linear layer or an attention product. Norms, activations and
softmax count nothing, and whoever gets by with fewer multiplications is credited with all of them: figures of different
algorithms compare.
"""

from __future__ import annotations

from transformers import WavLMConfig

from wavlm_fast.ops import OPS, Sizes

# In the order the signal meets them.
STAGES = (
    "waveform conv", "feature encoder", "projection", "positional conv", "qkv", "gate", "attention", "out proj",
    "feed-forward in", "feed-forward out", "norms", "head",
)  # fmt: skip
# How often each stage's operations count in a training step of adapters alone, if not twice, for the forward and the
# gradient of what comes in: attention has no weights, and what comes before the layers has no gradient.
FROZEN = {"attention": 3, **dict.fromkeys(STAGES[: STAGES.index("qkv")], 1)}


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
    sizes, found = Sizes.of(config, batch, samples), dict.fromkeys(STAGES, 0.0)
    for op in OPS.values():
        for place in op.places(sizes):
            if place.stage in STAGES:  # a whole is in none of them, its parts are
                found[place.stage] += place.times * op.flops(**op.at(place))
    found["head"] = float(_head(config, cls, sizes))
    return found


def _head(config: WavLMConfig, cls: str, sizes: Sizes) -> int:
    """Operations of what is on top of the encoder."""
    B, T, C = sizes.batch, sizes.frames, sizes.channels
    if cls == "WavLMForCTC":
        return _linear(B * T, C, config.vocab_size)
    if cls == "WavLMForSequenceClassification":
        width = config.classifier_proj_size
        return _linear(B * T, C, width) + _linear(B, width, config.num_labels)
    if cls == "WavLMForAudioFrameClassification":
        return _linear(B * T, C, config.num_labels)
    return _xvector(config, sizes) if cls == "WavLMForXVector" else 0


def _xvector(config: WavLMConfig, sizes: Sizes) -> int:
    """Operations of projector, time-delay layers, embedding and classifier."""
    op, embedding = OPS["tdnn"], config.xvector_output_dim
    count = _linear(sizes.batch * sizes.frames, sizes.channels, config.tdnn_dim[0])
    count += sum(op.flops(**op.at(place)) for place in op.places(sizes))
    pooled = 2 * config.tdnn_dim[-1]  # mean and deviation
    return count + _linear(sizes.batch, pooled, embedding) + _linear(sizes.batch, embedding, embedding)


def _linear(rows: int, narrow: int, wide: int) -> int:
    op = OPS["linear_act"]
    return op.flops(**op.example(rows, narrow, outer=wide))


def frames(config: WavLMConfig, samples: int) -> list[int]:
    """Frames after each convolution."""
    return Sizes.of(config, 1, samples).frames_of_convs
