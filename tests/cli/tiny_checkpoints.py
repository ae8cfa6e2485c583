"""Sizes at which a model runs in milliseconds."""

from transformers import WavLMConfig


def tiny_config(**options):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    return WavLMConfig(**{**sizes, **options})
