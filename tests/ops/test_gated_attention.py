"""The contract of gated_attention."""

import importlib
import subprocess
import sys

import op_contract as contract
import pytest
import torch
from op_contract import randn

from wavlm_fast import ops, use_backend
from wavlm_fast.parity.definitions import kept_weights, toeplitz

# The package re-exports the function under the module's name.
module = importlib.import_module("wavlm_fast.ops.gated_attention")


def operands(batch=2, frames=4, heads=2, width=3, dtype=torch.float64):
    q, k, v = (randn(batch, frames, heads, width, seed=i) for i in (1, 2, 3))
    gate, rel_bias = randn(batch, heads, frames, seed=4), randn(heads, 2 * frames - 1, seed=5, scale=2)
    wide = torch.promote_types(dtype, torch.float32)
    return (*(x.to(dtype) for x in (q, k, v)), gate.to(wide), rel_bias.to(wide))


def dense(q, k, v, gate, rel_bias, lengths=None, scale=None):
    """softmax(q @ k.mT * scale + gate · bias) @ v, per head."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + gate[..., None] * toeplitz(rel_bias)
    if lengths is not None:
        scores = scores.masked_fill(torch.arange(k.shape[2]) >= lengths[:, None, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1]), torch.tensor([4, 2], dtype=torch.int32)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_is_its_torch_equivalent(lengths, scale):
    args = operands()
    found = ops.gated_attention(*args, lengths, scale=scale)
    contract.check_equal(found, dense(*args, lengths, scale))
    assert found.is_contiguous()


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_bias_rows_are_the_dense_bias(frames):
    rel_bias = randn(3, 2 * frames - 1)
    assert torch.equal(module.bias_rows(rel_bias, 0, frames), toeplitz(rel_bias))
    assert torch.equal(module.bias_rows(rel_bias, frames // 2, frames), toeplitz(rel_bias)[:, frames // 2 :])


def test_no_keys():
    lengths = torch.tensor([0, 4])
    out, lse = torch.ops.wavlm_fast.gated_attention(*operands(), lengths, 0.0, None, 0.5)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    mine = contract.learning(*operands())
    for g in torch.autograd.grad(ops.gated_attention(*mine, lengths).square().sum(), mine):
        assert g.isfinite().all()


def test_nan_stays_visible():
    q, *rest = operands()
    q[0, 1, 0, 0] = float("nan")
    out = ops.gated_attention(q, *rest)
    assert out[0, 1, 0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 0])])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_registration(lengths, dropout):
    args = operands(dtype=torch.float32)
    tail = (dropout, torch.tensor([7]) if dropout else None, 0.5)
    contract.check_registration("gated_attention", *contract.learning(*args), lengths, *tail)
    out, lse = torch.ops.wavlm_fast.gated_attention(*args, lengths, *tail)
    given = torch.ones_like(out), *args, lengths, out, lse, *tail
    contract.check_registration("gated_attention_backward", *given, [True] * 5)


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("chunk", [None, 8])
def test_gradients(lengths, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(module, "_CHUNK_SCORES", chunk)
    contract.check_gradients(lambda *a: ops.gated_attention(*a, lengths), *operands(frames=3, width=2))


def test_gradients_with_dropout():
    seed = torch.tensor([11])
    op = torch.ops.wavlm_fast.gated_attention
    contract.check_gradients(lambda *a: op(*a, None, 0.3, seed, 0.5)[0], *operands(frames=3, width=2))


def test_compiles():
    contract.check_compiles(ops.gated_attention, *operands(dtype=torch.float32))
    lengths = torch.tensor([3, 2])
    contract.check_compiles(lambda *a: ops.gated_attention(*a, lengths), *operands(dtype=torch.float32))


def test_compiles_with_dropout():
    compiled = torch.compile(
        lambda *a: ops.gated_attention(*a, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert compiled(*operands(dtype=torch.float32)).shape == (2, 4, 2, 3)


def test_autocast_lowers_q_k_v_only():
    inputs = operands(dtype=torch.float32)
    contract.check_autocast(ops.gated_attention, inputs, (torch.bfloat16,))
    contract.check_autocast_gradients(ops.gated_attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.gated_attention(*inputs)
    wanted = ops.gated_attention(*(x.bfloat16() for x in inputs[:3]), *inputs[3:])
    assert torch.equal(found, wanted)


def test_strided_operands():
    qkv, gate, rel_bias = randn(2, 5, 3, 2, 4), randn(2, 2, 5, seed=1), randn(2, 9, seed=2)
    q, k, v = qkv.unbind(2)
    wanted = ops.gated_attention(q.contiguous(), k.contiguous(), v.contiguous(), gate, rel_bias)
    contract.check_equal(ops.gated_attention(q, k, v, gate, rel_bias), wanted)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    contract.check_equal(ops.gated_attention(*turned, gate, rel_bias), wanted)
    contract.check_equal(ops.gated_attention(q, k, v, contract.strided(gate), contract.strided(rel_bias)), wanted)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_dropout_is_drawn_from_the_seed(name):
    args, seed = operands(frames=40, width=8, dtype=torch.float32), torch.tensor([2**40 + 5])
    v = torch.eye(40)[None, :, None, :].expand(2, 40, 2, 40).contiguous()  # the output is the weights
    q, k = (torch.nn.functional.pad(x, (0, 32)) for x in args[:2])
    with use_backend(name):
        out, _ = torch.ops.wavlm_fast.gated_attention(q, k, v, *args[3:], None, 0.25, seed, 0.5)
        plain, _ = torch.ops.wavlm_fast.gated_attention(q, k, v, *args[3:], None, 0.0, None, 0.5)
    kept = kept_weights(5, 2, 2, 40, 0.25).transpose(1, 2)
    torch.testing.assert_close(out, plain * kept / 0.75)
    assert abs(kept.float().mean().item() - 0.75) < 0.02


def test_dropout_follows_torchs_generator():
    args = operands()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(ops.gated_attention(*args, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_long_audio_in_chunks(monkeypatch):
    args = contract.learning(*operands(batch=1, frames=3001, heads=1, width=8, dtype=torch.float32))
    lengths = torch.tensor([2500])
    found = []
    for scores in (2**30, 3001 * 170):
        monkeypatch.setattr(module, "_CHUNK_SCORES", scores)
        with use_backend("reference"):
            out = ops.gated_attention(*args, lengths)
            found.append((out, *torch.autograd.grad(out.square().sum(), args)))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


_LONG = """
import resource, torch
from wavlm_fast import ops, use_backend
T, D = 12_000, 16
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, T, 1, D).unbind(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with use_backend("reference"), torch.no_grad():
    out = ops.gated_attention(q, k, v, torch.ones(1, 1, T), torch.randn(1, 2 * T - 1))
assert out.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured as Linux counts it")
def test_memory_of_long_audio_is_bounded():
    """Four minutes: one matrix of scores would take 576 MB, and there are several on the way."""
    done = subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 450  # MB


def test_refusals():
    q, k, v, gate, rel_bias = operands()

    def refused(error, sentence, **changes):
        values = {"q": q, "k": k, "v": v, "gate": gate, "rel_bias": rel_bias, **changes}
        with contract.refuses(error, f"gated_attention wants {sentence}"):
            ops.gated_attention(**values)

    refused(ValueError, "q of shape [B, T, H, D], got [4, 2, 3]", q=q[0])
    refused(ValueError, "k of shape [2, 4, 2, 3], got [2, 3, 2, 3]", k=k[:, :3])
    refused(ValueError, "v of shape [2, 4, 2, 3], got [2, 4, 2, 2]", v=v[..., :2])
    refused(ValueError, "gate of shape [2, 2, 4], got [2, 4, 2]", gate=gate.transpose(1, 2))
    refused(ValueError, "rel_bias of shape [2, 7], got [2, 4, 4]", rel_bias=toeplitz(rel_bias))
    refused(TypeError, "v of the dtype of q, torch.float64, got torch.float32", v=v.float())
    refused(TypeError, "a gate of torch.float64 for q of torch.float64, got torch.float32", gate=gate.float())
    refused(TypeError, "rel_bias of the dtype of gate, torch.float64, got torch.float32", rel_bias=rel_bias.float())
    refused(TypeError, "q of a floating-point dtype, got torch.int64", q=q.long())
    refused(ValueError, "key_lengths of shape [2], got [3]", key_lengths=torch.tensor([1, 2, 3]))
    refused(TypeError, "key_lengths of an integer dtype, got torch.bool", key_lengths=torch.tensor([True, False]))
    refused(ValueError, "0 <= dropout_p < 1, got 1.5", dropout_p=1.5)
    refused(ValueError, "0 <= dropout_p < 1, got -0.5", dropout_p=-0.5)
    refused(
        ValueError,
        "k with its last dimension contiguous, got strides (48, 12, 6, 2)",
        k=torch.empty(2, 4, 2, 6, dtype=torch.float64)[..., ::2],
    )


def test_a_dropout_of_one_leaves_zeros_and_their_gradients():
    q, k, v, gate, rel_bias = (x.requires_grad_() for x in operands_for_dropout_of_one())
    out = ops.gated_attention(q, k, v, gate, rel_bias, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v, gate, rel_bias))


def operands_for_dropout_of_one():
    frames, heads, width = 5, 2, 4
    qkv = (torch.randn(1, frames, heads, width) for _ in range(3))
    return *qkv, torch.rand(1, heads, frames), torch.randn(heads, 2 * frames - 1)
