"""What differs between the two lines of transformers, read off the installed one."""

from __future__ import annotations

import inspect

from transformers.models.wavlm import modeling_wavlm as hf

# transformers 4 collects hidden states and attentions in the encoder, 5 by hooks on the layers.
ENCODER_COLLECTS = "output_hidden_states" in inspect.signature(hf.WavLMEncoder.forward).parameters
LAYERS_RETURN_ATTENTIONS = ENCODER_COLLECTS
# transformers 4 computes attention weights only where they are asked for, 5 hands them to whoever hooks the module.
RETURNS_WEIGHTS_UNASKED = not ENCODER_COLLECTS
# transformers 4 draws a random number for every layer, 5 only where a layer may be dropped.
DRAWS_FOR_EVERY_LAYER = ENCODER_COLLECTS
