"""A transformer layer as one op: what transformers computes, and what every op owes."""

from __future__ import annotations

import re

import op_contract as contract
import pytest
import torch
from transformers import WavLMConfig
from transformers.models.wavlm import modeling_wavlm as hf

from wavlm_fast import backends, ops
from wavlm_fast.backends import cpu
from wavlm_fast.backends.cpu import packed_conv
from wavlm_fast.ops import references

NORM_FIRST = pytest.mark.parametrize("norm_first", [True, False])


def operands(dtype=torch.float64, batch=2, frames=7, heads=3, width=4, inner=10):
    """All arguments but the options."""
    channels = heads * width
    shapes = [(channels, channels)] * 4 + [(inner, channels), (channels, inner)]
    weights = [contract.randn(*s, seed=i, scale=0.4, dtype=dtype) for i, s in enumerate(shapes)]
    biases = [contract.randn(s[0], seed=10 + i, scale=0.3, dtype=dtype) for i, s in enumerate(shapes)]
    gate = [contract.randn(8, width, seed=20, dtype=dtype), contract.randn(8, seed=21, dtype=dtype)]
    gate.append(contract.randn(heads, seed=22, dtype=dtype))
    norms = [contract.randn(channels, seed=30 + i, scale=0.3, dtype=dtype) + (i % 2 == 0) for i in range(4)]
    wide = dtype if dtype == torch.float64 else torch.float32
    rel_bias = contract.randn(heads, 2 * frames - 1, seed=40, dtype=wide)
    lengths = torch.tensor([frames, frames - 3][:batch])
    x = contract.randn(batch, frames, channels, seed=50, dtype=dtype)
    return x, rel_bias, lengths, weights, biases, gate, norms


def options(norm_first=False, activation="gelu"):
    return {"eps": [1e-5, 1e-3], "scale": 0.5, "activation": activation, "norm_first": norm_first}


def tail(norm_first=False):
    return tuple(options(norm_first).values())


@NORM_FIRST
def test_equals_transformers(norm_first):
    config = WavLMConfig(hidden_size=12, num_attention_heads=3, intermediate_size=10, do_stable_layer_norm=norm_first)
    cls = hf.WavLMEncoderLayerStableLayerNorm if norm_first else hf.WavLMEncoderLayer
    layer = cls(config).double().eval()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.add_(contract.randn(*parameter.shape, seed=seed, scale=0.3))
    x, attention, feed_forward = contract.randn(2, 7, 12), layer.attention, layer.feed_forward
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
    linears += [feed_forward.intermediate_dense, feed_forward.output_dense]
    gate = attention.gru_rel_pos_linear
    bias = attention.compute_bias(7, 7)  # [H, T, T]
    with torch.no_grad():
        found = ops.encoder_layer(
            x, torch.cat((bias[:, :, 0].flip(1)[:, :-1], bias[:, 0]), 1), None,
            [linear.weight for linear in linears], [linear.bias for linear in linears],
            [gate.weight, gate.bias, attention.gru_rel_pos_const.flatten()],
            [p for norm in (layer.layer_norm, layer.final_layer_norm) for p in (norm.weight, norm.bias)],
            eps=[1e-5, 1e-5], scale=attention.scaling, activation="gelu", norm_first=norm_first,
        )  # fmt: skip
        contract.check_equal(found, layer(x, position_bias=bias.repeat(2, 1, 1))[0], rtol=1e-9, atol=1e-9)


@NORM_FIRST
def test_registration(norm_first):
    contract.check_registration("encoder_layer", *operands(torch.float32), *tail(norm_first))
    x, rel_bias, _, *parameters = operands(torch.float32, batch=1)
    contract.check_registration("encoder_layer", x, rel_bias, None, *parameters, *tail(norm_first))


@NORM_FIRST
def test_against_its_reference(norm_first):
    wanted = references["encoder_layer"](*operands(), *tail(norm_first))
    with torch.no_grad():
        contract.check_equal(ops.encoder_layer(*operands(), **options(norm_first)), wanted)


def merged(args):
    """The same operands, with one projection to queries, keys and values."""
    x, rel_bias, lengths, weights, biases, gate, norms = args
    weights, biases = ([torch.cat(own[:3]), *own[3:]] for own in (weights, biases))
    return x, rel_bias, lengths, weights, biases, gate, norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@NORM_FIRST
def test_one_projection_to_all_three_is_the_same(norm_first, dtype):
    args = operands(dtype)
    with torch.no_grad():
        wanted = ops.encoder_layer(*args, **options(norm_first))
        assert torch.equal(ops.encoder_layer(*merged(args), **options(norm_first)), wanted)
    contract.check_registration("encoder_layer", *merged(operands(torch.float32)), *tail(norm_first))


def test_a_wrong_merged_projection_is_refused():
    x, rel_bias, lengths, weights, *rest = merged(operands())
    weights[0] = weights[0][:24]
    with torch.no_grad(), pytest.raises(ValueError, match=re.escape("merged q, k and v weight of shape [36, 12]")):
        ops.encoder_layer(x, rel_bias, lengths, weights, *rest, **options())


def test_compiles():
    args = operands(torch.float32)
    function = lambda *args: ops.encoder_layer(*args, **options())  # noqa: E731
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), function(*args))


def test_autocast():
    x, rel_bias, lengths, weights, biases, gate, norms = operands(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = ops.encoder_layer(x, rel_bias, lengths, weights, biases, gate, norms, **options())
    low = [[t.bfloat16() for t in tensors] for tensors in (weights, biases)]
    with torch.no_grad():
        wanted = ops.encoder_layer(x.bfloat16(), rel_bias, lengths, *low, gate, norms, **options())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


def test_no_gradient_is_refused_not_lost():
    x, *rest = operands()
    with pytest.raises(RuntimeError, match="encoder_layer has no gradient"):
        ops.encoder_layer(x.requires_grad_(), *rest, **options())


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.ones(2, 7, 12, dtype=torch.int32), TypeError, "floating"),
        (0, torch.ones(7, 12, dtype=torch.float64), ValueError, "x of shape [B, T, C]"),
        (1, torch.ones(3, 12, dtype=torch.float64), ValueError, "rel_bias of shape [3, 13]"),
        (1, torch.ones(3, 13), TypeError, "rel_bias of torch.float64"),
        (2, torch.ones(3, dtype=torch.int64), ValueError, "key_lengths of shape [2]"),
        (3, [torch.ones(12, 12, dtype=torch.float64)] * 5, ValueError, "6 weights, got 5"),
        (3, [torch.ones(12, 12)] * 6, TypeError, "the q weight"),
        (4, [torch.ones(11, dtype=torch.float64)] * 6, ValueError, "the q bias of shape [12]"),
        (5, [torch.ones(8, 4), torch.ones(8), torch.ones(2)], ValueError, "gate weight of shape [8, 6]"),
        (6, [torch.ones(12)] * 3, ValueError, "4 norms, got 3"),
    ],
)
def test_refusals(index, value, error, message):
    args = list(operands())
    args[index] = value
    with torch.no_grad(), pytest.raises(error, match=re.escape(message)):
        ops.encoder_layer(*args, **options())


@pytest.mark.skipif(cpu.extension.problem() is not None, reason=str(cpu.extension.problem()))
def test_the_cpu_refuses_what_its_level_lacks():
    x, *rest = operands(torch.bfloat16)
    reason = cpu.TABLE["encoder_layer"].why_not(x, *rest, *tail())
    assert (reason is None) == (not packed_conv.in_onednn(x))
    x, *rest = operands(torch.float16)
    assert "float32 or bfloat16" in cpu.TABLE["encoder_layer"].why_not(x, *rest, *tail())
    with torch.no_grad(), backends.use_backend("cpu"), pytest.raises(backends.BackendUnavailable):
        ops.encoder_layer(x, *rest, **options())
