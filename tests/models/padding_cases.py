"""What the tests of exact batches share: utterances of different lengths, their batch, and what its rows must equal."""

from __future__ import annotations

import copy

import torch
from wavlm_cases import assert_tensor_close, tensors, truth_of

from wavlm_fast import accelerate

WIDTH = 640
LENGTHS = (600, 337, 250, 640, 600, 431)


def exact(model):
    return accelerate(copy.deepcopy(model), padding="exact")


def utterances(lengths=LENGTHS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(n, generator=generator) * (1 + i)).to(dtype) for i, n in enumerate(lengths)]


def batch_of(waveforms, width=WIDTH, padding=float("nan")):
    """Padded with what would be seen anywhere."""
    x = waveforms[0].new_full((len(waveforms), width), padding)
    mask = torch.zeros(len(waveforms), width, dtype=torch.long)
    for row, own in enumerate(waveforms):
        x[row, : len(own)], mask[row, : len(own)] = own, 1
    return {"input_values": x, "attention_mask": mask}


def rows_of(name, out, alone):
    """Pairs of named tensors: what the batch gives for each utterance, cut to its frames, and the outputs for it
    alone. What is past an utterance's end has to be zero.
    """
    for row, expected in enumerate(alone):
        found = dict(tensors(out))
        wanted = dict(tensors(expected))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            own = found[key][row : row + 1]
            if own.shape != value.shape:
                assert own.dim() > 2, key
                for dim in range(1, own.dim()):
                    assert not own.narrow(dim, value.shape[dim], own.shape[dim] - value.shape[dim]).any(), key
                    own = own.narrow(dim, 0, value.shape[dim])
            yield f"{key} of row {row}", own, row, key


def assert_rows_are_alone(plain, out, waveforms, **kwargs):
    """The rule of the house: truth is transformers in float64 on each utterance alone."""
    with torch.no_grad():
        alone = [plain(w[None], **kwargs) for w in waveforms]
        truth = [truth_of(plain)(w[None].double(), **kwargs) for w in waveforms]
    for name, own, row, key in rows_of(plain, out, alone):
        assert_tensor_close(name, own, dict(tensors(alone[row]))[key], dict(tensors(truth[row]))[key])


def frames_of(model, samples):
    return int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
