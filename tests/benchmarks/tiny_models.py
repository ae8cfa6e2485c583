"""Sizes at which a model runs in milliseconds; an odd positional kernel computes no frame that is cut off."""

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 15,
    "num_conv_pos_embedding_groups": 4,
    "tdnn_dim": (16, 16, 16, 16, 24),
    "xvector_output_dim": 12,
}
