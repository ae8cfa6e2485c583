"""What a checker is to refuse, each line for what it says."""

from __future__ import annotations

import torch
from torch import nn

import wavlm_fast
from wavlm_fast import original

model = wavlm_fast.WavLMModel.from_pretrained("folder")
waveform = torch.zeros(1600)

wavlm_fast.accelerate("microsoft/wavlm-base")  # refused: type-var
wavlm_fast.accelerate(model, padding="longest")  # refused: arg-type
wavlm_fast.accelerate(model, keep_original=False)  # refused: call-arg
sequential: nn.Sequential = wavlm_fast.accelerate(model)  # refused: assignment
wavlm_fast.install(padding=True)  # refused: arg-type
wavlm_fast.truncate(model)  # refused: call-arg
wavlm_fast.truncate(model, layers="6")  # refused: arg-type
wavlm_fast.restore(model).nothing()  # refused: operator
wavlm_fast.use_backend(wavlm_fast)  # refused: arg-type
wavlm_fast.report(model).rows.backend  # refused: attr-defined
wavlm_fast.report(model)["rows"]  # refused: index
wavlm_fast.WavLMModel.from_pretrained("folder", padding="none")  # refused: call-overload
head: wavlm_fast.WavLMForCTC = wavlm_fast.WavLMModel.from_pretrained("folder")  # refused: assignment
wavlm_fast.forward_ragged(model, waveform)  # refused: call-overload
wavlm_fast.forward_ragged(model, [waveform])[0].logits  # refused: attr-defined
wavlm_fast.graphed(model, {"input_values": waveform}, True)  # refused: call-arg
wavlm_fast.Extractor("folder", what="embedding")  # refused: arg-type
wavlm_fast.Extractor("folder", layers="last")  # refused: arg-type
wavlm_fast.Extractor("folder", average="time")  # refused: arg-type
wavlm_fast.Extractor("folder")([waveform])  # refused: arg-type
original.WavLM({})  # refused: arg-type
original.WavLMConfig().hidden_size  # refused: attr-defined
original.WavLM(original.WavLMConfig()).extract_features(waveform)[0].last_hidden_state  # refused: attr-defined
wavlm_fast.WavLMForPreTraining  # refused: attr-defined
