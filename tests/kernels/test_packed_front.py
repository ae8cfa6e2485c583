"""Packed frames through the kernels of the feature encoder and the x-vector head: each utterance as if alone."""

import sys
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from cases import DEVICE, DTYPES, assert_close, kernel, randn, wide
from test_products import compare
from test_waveform_conv import check as check_waveform
from test_waveform_conv import inputs as waveform_inputs

from wavlm_fast import use_backend
from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels import waveform_conv, waveform_conv_backward
from wavlm_fast.kernels._target import pretend

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_contract import learning
from packed_calls import CALLS, EXTRA

# Out frames of utterances that end before, at and behind the end of a tile: of 16, 32 and 64 frames.
AROUND_TILES = (63, 1, 64, 65, 15, 128, 17, 16, 31)


def offsets_of(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_by(lengths, span, stride=1):
    """The arguments of packed frames, of a convolution whose windows span `span` of them."""
    out = [(n - span) // stride + 1 for n in lengths]
    return offsets_of(lengths), offsets_of(out), sum(out)


def strided(lengths, taps, stride, norm, dtype=torch.float32, C=24, N=20):
    """strided_conv's arguments without `save`, and those of packed frames."""
    x, weight = randn(1, sum(lengths), C, dtype=dtype), randn(N, C, taps, dtype=dtype, scale=(C * taps) ** -0.5)
    vectors = [randn(N, seed=i, dtype=dtype) for i in range(3)]
    norms = [vectors[1] + 1, vectors[2]] if norm else [None, None]
    return [x, weight, vectors[0], stride, *norms, 1e-5, "gelu"], packed_by(lengths, taps, stride)


def dilated(lengths, taps, dilation, dtype=torch.float32):
    x, weight = randn(1, sum(lengths), 16, dtype=dtype), randn(20, taps * 16, dtype=dtype, scale=(16 * taps) ** -0.5)
    args = [x, weight, randn(20, dtype=dtype), taps, dilation, "relu"]
    return args, packed_by(lengths, (taps - 1) * dilation + 1)


def waveform(lengths, norm, dtype=torch.float32, K=10, stride=5, C=20):
    args = waveform_inputs(1, sum(lengths), C, K, stride, norm, "gelu", bias=norm != "group", dtype=dtype)
    return args, packed_by(lengths, K, stride)


# By op and what it is like: fewest frames of an utterance, stride, and arguments of lengths and dtype.
FORMS = {
    **{
        f"strided_conv {taps} {stride} {norm}": (
            taps, stride, lambda n, dtype, how=(taps, stride, norm): strided(n, *how, dtype)
        )
        for taps, stride, norm in ((3, 2, False), (2, 2, True), (4, 3, False), (2, 3, False))
    },
    **{
        f"tdnn {taps} {dilation}": (
            (taps - 1) * dilation + 1, 1, lambda n, dtype, how=(taps, dilation): dilated(n, *how, dtype)
        )
        for taps, dilation in ((3, 2), (1, 1))
    },
    **{
        f"waveform_conv {norm}": (least, 5, lambda n, dtype, norm=norm: waveform(n, norm, dtype))
        # Of one frame a group norm leaves the sign of rounding errors, and of two no gradient but such errors.
        for norm, least in (("none", 10), ("group", 20), ("layer", 10))
    },
}  # fmt: skip


def check(form, args, packed):
    if form.startswith("waveform_conv"):
        return check_waveform(args, packed=packed)
    return compare(form.split()[0], args, save=form.startswith("strided"), packed=packed)


def cases():
    """All lengths in fp32 for one form of each op, and for the others what the slow interpreter has time for."""
    for form, extra, dtype in product(FORMS, EXTRA, DTYPES):
        first = form in ("strided_conv 3 2 False", "tdnn 3 2", "waveform_conv group")
        if DEVICE != "cpu" or extra == "sorted" or ((first or "among" in extra) and dtype == torch.float32):
            yield form, extra, dtype


@pytest.mark.parametrize(("form", "extra", "dtype"), [*cases()])
def test_each_utterance_is_as_if_alone(form, extra, dtype):
    least, _, arguments = FORMS[form]
    lengths = [least + n for n in EXTRA[extra]]
    if extra == "many" and form.startswith("waveform") and DEVICE == "cpu":
        lengths = lengths[:12]
    check(form, *arguments(lengths, dtype))


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("waveform")])
def test_lengths_around_those_of_tiles(form):
    least, stride, arguments = FORMS[form]
    lengths = [least + (frames - 1) * stride + i % stride for i, frames in enumerate(AROUND_TILES)]
    check(form, *arguments(lengths, torch.float32))


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_waveforms_around_the_lengths_of_tiles(norm):
    lengths = [10 + 5 * (frames - 1) + i for i, frames in enumerate((15, 16, 17, 3, 32))]
    check_waveform(*_with_packed(waveform(lengths, norm)))


def test_waveforms_around_the_lengths_of_smaller_tiles():
    """Layer norm takes eight frames on sm_100."""
    lengths = [10 + 5 * (frames - 1) + i for i, frames in enumerate((7, 8, 9, 3, 16, 17))]
    with pretend("blackwell"):
        check_waveform(*_with_packed(waveform(lengths, "layer")))


def test_statistics_of_more_than_one_part():
    """Of 511, 512 and 513 frames, and two other utterances between."""
    args, packed = waveform([10 + 5 * (frames - 1) for frames in (512, 2, 513, 3, 511)], "group", C=3)
    truth, plain = (REFERENCE["waveform_conv"].fn(*a, *packed) for a in (wide(args), args))
    assert_close(kernel("waveform_conv")(*args, *packed), truth, plain)


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_programs_that_take_several_tiles(norm, monkeypatch):
    monkeypatch.setattr(waveform_conv, "PROGRAMS", 4)
    monkeypatch.setattr(waveform_conv_backward, "PARTS", 2)
    check_waveform(*_with_packed(waveform([330, 20, 500, 25, 160], norm)))


def _with_packed(made):
    return made[0], 0.0, made[1]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_passes_a_boundary(form):
    """NaN in one utterance reaches no other, and the others are what they were, bit for bit."""
    least, _, arguments = FORMS[form]
    op, extra = form.split()[0], (20, 7, 0, 23)
    args, packed = arguments([least + n for n in extra], torch.float32)
    offsets, out_offsets, _ = packed
    tail = [True] if op == "strided_conv" else []
    frames = packed[2]
    saved = [] if op == "waveform_conv" else [randn(1, frames, 20, seed=3)]
    grad = randn(1, frames, 20, seed=2)
    wanted = [args[i] is not None for i in ((0, 1, 2, 5, 6) if op == "waveform_conv" else (0, 1, 2, 4, 5))]
    wanted = wanted[:3] if op == "tdnn" else wanted

    def run(x, grad, *saved):
        out = kernel(op)(x, *args[1:], *tail, *packed)
        inner = [x, *args[1:]] if op == "waveform_conv" else [x, *args[1:3], *saved, *args[3:]]
        dx, *_ = kernel(f"{op}_backward")(grad, *inner, wanted, *packed)
        return (*(out if isinstance(out, tuple) else (out,)), dx)

    clean = run(args[0], grad, *saved)
    assert not any(x.isnan().any() for x in clean)
    for b in (1, 2):
        poisoned = [t.clone() for t in (args[0], grad, *saved)]
        for at, t in zip((offsets, out_offsets, out_offsets), poisoned, strict=False):
            t[:, at[b] : at[b + 1]] = float("nan")
        found = run(*poisoned)
        ends = [out_offsets] * (len(found) - 1) + [offsets]
        for at, own, before in zip(ends, found, clean, strict=True):
            others = torch.ones(own.shape[1], dtype=torch.bool)
            others[at[b] : at[b + 1]] = False
            assert torch.equal(own[:, others], before[:, others])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["strided_conv", "tdnn", "waveform_conv, group"])
def test_the_ops_are_computed_here(name, shared):
    """Forward and backward, where all gradients are wanted and where the first alone is."""
    call, found = CALLS[name], []
    lengths = [call.least + n for n in EXTRA["shortest among others"]]
    packed, parameters = call.inputs(lengths, torch.float32)
    for backend, run in (("triton", call.packed), ("reference", call.alone)):
        with use_backend(backend), torch.device(DEVICE):
            mine = learning(*(x.to(DEVICE) for x in packed))
            theirs = [None if t is None else t.to(DEVICE).requires_grad_(shared) for t in parameters]
            out = run(lengths, mine, theirs)
            learn = [t for t in (*mine, *theirs) if t is not None and t.requires_grad]
            found.append([out, *torch.autograd.grad(out.square().sum(), learn)])
    for ours, alone in zip(*found, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item())
