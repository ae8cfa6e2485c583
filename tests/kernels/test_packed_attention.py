"""gated_attention and its gradients on packed frames: what each utterance alone gives, nothing of its neighbours."""

import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE, DTYPES, assert_close, kernel, randn, wide
from test_gated_attention import NAMES, check, deterministic, inputs  # noqa: F401  a fixture

from wavlm_fast import ops, use_backend
from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels._packed import places
from wavlm_fast.kernels._packed_tiles import utterance_at
from wavlm_fast.kernels._target import pretend

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from packed_calls import EXTRA, offsets_of

FORWARD, BACKWARD = "gated_attention", "gated_attention_backward"


def packed(lengths, H=1, D=16, dropout_p=0.0, dtype=torch.float32, far=None, longer=3):
    """As `inputs` of all frames, with a bias of `longer` frames more than the longest utterance has."""
    args = inputs(1, sum(lengths), H, D, None, dropout_p, dtype)
    args[4] = inputs(1, max(lengths) + longer, H, 16, far=far)[4]
    return [*args, offsets_of(lengths)]


def own(args, lengths):
    """The arguments of each utterance alone."""
    q, k, v, gate, rel_bias, *rest, offsets = args
    L = (rel_bias.shape[1] + 1) // 2
    for first, end in pairwise(offsets.tolist()):
        frames = slice(first, end)
        entries = rel_bias[:, L - (end - first) : L + end - first - 1]
        yield [*(x[:, frames] for x in (q, k, v)), gate[..., frames].contiguous(), entries.contiguous(), *rest]


def gradients(args, grad, table):
    out = table(FORWARD)(*args)
    return *out, *table(BACKWARD)(grad, *args[:6], *out, *args[6:9], [True] * 5, *args[9:])


def reference(op):
    return REFERENCE[op].fn


def joined(alone):
    """out, lse, dq, dk, dv and dgate of all utterances."""
    return [torch.cat(parts, 2 if i in (1, 5) else 1) for i, parts in enumerate(list(zip(*alone, strict=True))[:6])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", EXTRA)
def test_ragged_batches(extra, dtype):
    # Every utterance has programs of its own, in small tiles several times as slow to interpret.
    step = 1 if extra != "many" else 8 if dtype == torch.float32 else 2
    check(packed([n + 1 for n in EXTRA[extra][::step]], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_for_bit_each_utterance_alone(dtype):
    lengths = [20, 1, 34, 7]
    args, grad = packed(lengths, H=2, dtype=dtype), randn(1, sum(lengths), 2, 16, seed=3, dtype=dtype)
    found = gradients(args, grad, kernel)
    alone = [gradients(a, g, kernel) for a, g in zip(own(args, lengths), grad.split(lengths, 1), strict=True)]
    for name, a, b in zip(("out", "lse", *NAMES), found, joined(alone), strict=False):
        assert torch.equal(a, b), name


def test_the_reference_here_is_each_utterance_alone():
    lengths = [5, 1, 18]
    args, grad = wide(packed(lengths)), randn(1, sum(lengths), 1, 16, seed=3, dtype=torch.float64)
    found = gradients(args, grad, reference)
    alone = [gradients(a, g, reference) for a, g in zip(own(args, lengths), grad.split(lengths, 1), strict=True)]
    for a, b in zip(found, joined(alone), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# Tiles of queries and keys: 32x16 and 64x32 frames in float32, 128x128 and 128x32 in half precision.
@pytest.mark.parametrize(
    ("D", "dtype", "lengths"),
    [
        (64, torch.float32, [31, 32, 33, 70, 15, 16, 17]),
        (80, torch.float32, [63, 64, 65, 1, 31, 32, 33]),
        (64, DTYPES[-1], [127, 128, 129, 260]),
        (80, DTYPES[-1], [129, 31, 32, 33, 260]),
        (16, DTYPES[-1], [128, 128]),
    ],
)
def test_lengths_around_those_of_tiles(D, dtype, lengths):
    check(packed(lengths, D=D, dtype=dtype, longer=0))


@pytest.mark.parametrize("target", ["hopper", "cdna"])
def test_tiles_of_each_target(target):
    with pretend(target):
        check(packed([63, 65, 150], D=64, dropout_p=0.1, dtype=DTYPES[-1], far=30))


@pytest.mark.parametrize("D", [16, 80])
def test_far_tiles(D):
    check(packed([20, 300, 131], D=D, dtype=DTYPES[-1], far=40, longer=100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_draws_the_reference_mask(dtype):
    check(packed([5, 70, 33], H=2, dropout_p=0.3, dtype=dtype))


@pytest.mark.parametrize("lengths", [[140, 3, *[5] * 7], [9 - i for i in range(9)]])
def test_deterministic_bias_gradient(lengths, deterministic):  # noqa: F811
    args = packed(lengths, dtype=DTYPES[-1])
    check(args)
    grad, saved = randn(*args[0].shape, seed=3, dtype=DTYPES[-1]), kernel(FORWARD)(*args)
    first, second = (kernel(BACKWARD)(grad, *args[:6], *saved, *args[6:9], [True] * 5, *args[9:]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nothing_passes_a_boundary(poisoned):
    """drel_bias apart, which all utterances share."""
    lengths = [33, 18, 47]
    args, grad = packed(lengths), randn(1, sum(lengths), 1, 16, seed=3)
    clean = gradients(args, grad, kernel)
    ends = list(accumulate(lengths, initial=0))
    frames = slice(ends[poisoned], ends[poisoned + 1])
    q, k, v, gate, *rest = args
    q, k, v, gate, grad = (x.clone() for x in (q, k, v, gate, grad))
    for x in (q, k, v, grad):
        x[:, frames] = float("nan")
    gate[..., frames] = float("nan")
    found = gradients([q, k, v, gate, *rest], grad, kernel)
    for name, a, b in zip(("out", "lse", *NAMES[:4]), found, clean, strict=False):
        at = (slice(None), slice(None), frames) if a.ndim == 3 else (slice(None), frames)
        assert a[at].isnan().all(), name
        assert torch.equal(*(x.masked_fill(a.isnan(), 0) for x in (a, b))), name


def test_offsets_past_the_end_read_no_more_than_there_is():
    """Nor do utterances longer than the bias is for: a kernel cannot refuse them."""
    lengths = [33, 18]
    args = packed(lengths, longer=0)
    surrounded = [torch.full((1, 151, *x.shape[2:]), float("nan")) for x in args[:3]]
    for x, around in zip(args[:3], surrounded, strict=True):
        around[:, :51] = x
    q, k, v = (x[:, :51] for x in surrounded)
    wrong = torch.tensor([0, 33, 151], dtype=torch.int32)
    grad = randn(*q.shape, seed=3)
    right, found = gradients(args, grad, kernel), gradients([q, k, v, *args[3:-1], wrong], grad, kernel)
    for name, a, b in zip(("out", "lse", *NAMES), found, right, strict=True):
        assert torch.equal(a, b), name
    wrong = torch.tensor([0, 40, 51], dtype=torch.int32)
    assert gradients([*args[:-1], wrong], grad, kernel)[0][:, :33].isfinite().all()


@triton.jit
def _utterances_kernel(offsets_ptr, utterances, found_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    tl.store(found_ptr + place, utterance_at(offsets_ptr, utterances, place, BLOCK))


@pytest.mark.parametrize(("utterances", "block"), [(10, 16), (150, 128)])
def test_every_tile_has_a_place(utterances, block):
    lengths = [1, 15, 16, 17, 300, 1, 1, 128, 129, 2, *((n * 37) % 261 + 1 for n in range(140))][:utterances]
    found = torch.full((places(sum(lengths), utterances, block),), -1, dtype=torch.int32, device=DEVICE)
    _utterances_kernel[found.shape](offsets_of(lengths).to(DEVICE), utterances, found, BLOCK=block)
    assert found.cpu().equal(found.cpu().sort().values)
    for b, n in enumerate(lengths):
        assert 0 <= (found == b).sum().item() - -(-n // block) <= 1


def test_through_the_op():
    lengths = [17, 40, 3]
    q, k, v, gate, rel_bias, *_, offsets = (
        a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in packed(lengths, H=2)
    )
    found = []
    for backend in ("triton", "reference"):
        mine = [x.detach().clone().requires_grad_() for x in (q, k, v, gate, rel_bias)]
        with use_backend(backend):
            out = ops.gated_attention(*mine, offsets=offsets[: len(lengths) + 1])
            found.append([out, *torch.autograd.grad(out.square().sum(), mine)])
    for a, b in zip(*found, strict=True):
        assert_close(a.detach().cpu(), b.detach().cpu().double(), b.detach().cpu(), tiny=64)
