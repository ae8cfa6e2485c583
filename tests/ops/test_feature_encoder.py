"""The front end as one op: what transformers computes, and what every op owes."""

from __future__ import annotations

import re

import op_contract as contract
import pytest
import torch
from transformers import WavLMConfig
from transformers.models.wavlm.modeling_wavlm import WavLMFeatureEncoder

from wavlm_fast import backends, ops
from wavlm_fast.ops import references

NORMS = ["none", "group", "layer"]


def operands(norm="group", bias=True, dtype=torch.float64):
    """Waveform, weights, biases, norm weights, norm biases of three layers."""
    shapes = [(4, 1, 7), (6, 4, 3), (4, 6, 2)]
    weights = [contract.randn(*s, seed=i, scale=0.5, dtype=dtype) for i, s in enumerate(shapes)]
    normed = shapes[: {"none": 0, "group": 1, "layer": 3}[norm]]
    biases = [contract.randn(s[0], seed=5 + i, dtype=dtype) for i, s in enumerate(shapes if bias else [])]
    gains = [1 + contract.randn(s[0], seed=9 + i, scale=0.2, dtype=dtype) for i, s in enumerate(normed)]
    shifts = [contract.randn(s[0], seed=13 + i, scale=0.2, dtype=dtype) for i, s in enumerate(normed)]
    return contract.randn(2, 61, seed=20, dtype=dtype), weights, biases, gains, shifts


def encode(waveform, weights, biases, gains, shifts, norm="group"):
    options = {"strides": [3, 2, 2], "norm": norm, "norm_weights": gains, "norm_biases": shifts}
    return ops.feature_encoder(waveform, weights, biases, **options)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_transformers(norm, bias):
    config = WavLMConfig(conv_dim=(8, 12, 8), conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), feat_extract_norm=norm,
                         conv_bias=bias)  # fmt: skip
    encoder = WavLMFeatureEncoder(config).double().eval()
    layers = encoder.conv_layers
    norms = [layer.layer_norm for layer in layers if hasattr(layer, "layer_norm")]
    waveform = contract.randn(2, 333)
    found = ops.feature_encoder(
        waveform, [layer.conv.weight for layer in layers], [layer.conv.bias for layer in layers if bias],
        strides=config.conv_stride, norm=norm, norm_weights=[n.weight for n in norms],
        norm_biases=[n.bias for n in norms],
    )  # fmt: skip
    torch.testing.assert_close(found, encoder(waveform).transpose(1, 2))


@pytest.mark.parametrize("norm", NORMS)
def test_registration(norm):
    waveform, weights, biases, gains, shifts = operands(norm, dtype=torch.float32)
    tail = ([3, 2, 2], norm, gains, shifts, 1e-5)
    contract.check_registration("feature_encoder", waveform, weights, biases, *tail, "gelu")
    contract.check_registration("feature_encoder", waveform, weights, [], *tail, "relu")


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_layers(norm):
    waveform, *lists = operands(norm)
    waveform.requires_grad_()
    lists = [list(contract.learning(*tensors)) for tensors in lists]
    leaves = [waveform, *(t for tensors in lists for t in tensors)]
    found = torch.autograd.grad(encode(waveform, *lists, norm=norm).square().sum(), leaves)
    weights, biases, gains, shifts = lists
    plain = references["feature_encoder"](waveform, weights, biases, [3, 2, 2], norm, gains, shifts, 1e-5, "gelu")
    torch.testing.assert_close(found, torch.autograd.grad(plain.square().sum(), leaves))


def test_compiles():
    waveform, *lists = operands(dtype=torch.float32)
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(waveform, *lists), encode(waveform, *lists))


def test_autocast():
    waveform, *lists = operands(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = encode(waveform, *lists)
    low = [[t.bfloat16() for t in tensors] for tensors in lists[:2]]
    with torch.no_grad():
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, encode(waveform.bfloat16(), *low, *lists[2:]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"waveform": torch.ones(2, 61, dtype=torch.int64)}, TypeError, "floating"),
        ({"waveform": torch.ones(61, dtype=torch.float64)}, ValueError, "[B, S]"),
        ({"waveform": torch.ones(2, 18, dtype=torch.float64)}, ValueError, "at least 19 samples, got 18"),
        ({"weights": []}, ValueError, "one layer or more"),
        ({"biases": [torch.ones(4, dtype=torch.float64)]}, ValueError, "0 or 3 biases here, got 1"),
        ({"gains": []}, ValueError, "1 norm_weights here, got 0"),
        ({"norm": "batch"}, ValueError, "norm of ('none', 'group', 'layer')"),
        ({"weights": [torch.ones(4, 1, 7)] * 3}, TypeError, "weights[0]"),
    ],
)
def test_refusals(change, error, message):
    names = ("waveform", "weights", "biases", "gains", "shifts")
    values = dict(zip(names, operands(), strict=True)) | change
    with pytest.raises(error, match=re.escape(message)):
        encode(**values)


def test_a_backend_without_the_op_runs_the_layers():
    waveform, *lists = operands(dtype=torch.float32)
    with torch.no_grad(), backends.use_backend("reference"):
        torch.testing.assert_close(encode(waveform, *lists), encode(waveform.double(), *(
            [t.double() for t in tensors] for tensors in lists)).float())  # fmt: skip
