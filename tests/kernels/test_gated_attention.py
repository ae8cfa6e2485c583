"""gated_attention and its gradients, against the reference in float64."""

import pytest
import torch
from cases import DEVICE, DTYPES, assert_close, kernel, randn, wide

from wavlm_fast.backends.reference import TABLE as REFERENCE
from wavlm_fast.kernels._precision import dot_precision
from wavlm_fast.kernels._target import pretend

NAMES = ("dq", "dk", "dv", "dgate", "drel_bias")
ALL = [True] * 5


def inputs(B, T, H, D, lengths=None, dropout_p=0.0, dtype=torch.float32, far=None):
    """Peaked rows, a bias of order one that is constant beyond `far` frames, gates over their whole range."""
    q, k, v = (randn(B, T, 3, H, D, seed=1) * torch.tensor([2.0, 1.0, 1.0])[:, None, None]).to(dtype).unbind(2)
    gate = torch.sigmoid(randn(B, H, T)) * 4
    rel_bias = randn(H, 2 * T - 1, seed=2) * 2
    if far is not None and far < T:
        rel_bias[:, : T - far] = rel_bias[:, :1]
        rel_bias[:, T + far - 2 :] = rel_bias[:, -1:]
    lengths = None if lengths is None else torch.tensor(lengths)
    seed = torch.tensor([9876543210123]) if dropout_p else None
    return [q, k, v, gate, rel_bias, lengths, dropout_p, seed, D**-0.5]


def check(args):
    truth = REFERENCE["gated_attention"].fn(*wide(args))
    plain = REFERENCE["gated_attention"].fn(*args)
    found = kernel("gated_attention")(*args)
    assert_close(found[0], truth[0], plain[0])
    # In half precision a score's sum begins with its bias, and each step of the sum is rounded at the bias's size.
    steps = 1 if args[0].dtype == torch.float32 else 2
    assert_close(found[1], truth[1], plain[1], tiny=4 * steps)
    grad = randn(*args[0].shape, seed=3, dtype=args[0].dtype)
    backward = REFERENCE["gated_attention_backward"].fn
    true = backward(*wide([grad, *args[:6], *truth, *args[6:9], ALL, *args[9:]]))
    theirs = backward(grad, *args[:6], *plain, *args[6:9], ALL, *args[9:])
    ours = kernel("gated_attention_backward")(grad, *args[:6], *found, *args[6:9], ALL, *args[9:])
    # dscores are rounded to the dtype of the values before each product, unlike the reference's, and may cancel.
    eps = torch.finfo(args[0].dtype).eps
    # The rounding of a saved log-sum-exp is a relative error of its size in every weight of its row, as in the parity
    # harness; the reference recomputes the sum.
    saved = truth[1].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    for name, a, t, p in zip(NAMES, ours, true, theirs, strict=True):
        fine = name in ("dgate", "drel_bias")
        try:
            assert_close(a, t, p, tiny=(32 * steps if fine else 8) + saved, floor=4e-6 if fine else 4 * eps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "D", "lengths"),
    [
        (1, 1, 1, 16, None),
        (2, 1, 2, 16, [0, 1]),
        (2, 17, 2, 64, [0, 17]),
        (1, 64, 1, 64, None),
        (2, 129, 1, 32, [128, 63]),
        (1, 1, 1, 80, None),
        (1, 70, 2, 80, [33]),
        (1, 67, 1, 96, None),
        (1, 66, 1, 128, [65]),
        (1, 35, 1, 48, None),
    ],
)
def test_matches_float64(B, T, H, D, lengths, dtype):
    check(inputs(B, T, H, D, lengths, dtype=dtype))


# 530 frames: the bias takes more than one program to copy, and more than one step to find its constant ends.
@pytest.mark.parametrize(("T", "far", "lengths"), [(530, 40, None), (330, 40, [301]), (200, 1, [7])])
def test_far_tiles_load_no_bias(T, far, lengths):
    check(inputs(1, T, 1, 16, lengths, far=far, dtype=DTYPES[-1]))


@pytest.mark.parametrize("target", ["cuda", "hopper", "cdna"])
@pytest.mark.parametrize("D", [64, 128] if DEVICE == "cuda" else [64])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_tiles_of_each_target(target, D, dtype):
    """More than one tile of queries and of keys, whichever is chosen."""
    with pretend(target):
        check(inputs(1, 150, 1, D, [139], 0.1, dtype, far=30))


def test_a_constant_bias_all_over():
    args = inputs(1, 140, 1, 16)
    args[4] = torch.full_like(args[4], 1.5)
    check(args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_draws_the_reference_mask(dtype):
    check(inputs(2, 70, 2, 16, [70, 41], 0.3, dtype))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_bias_gradient(dtype, deterministic):
    check(inputs(2, 140, 1, 16, [0, 133], dtype=dtype))


def test_deterministic_gradients_repeat(deterministic):
    args = inputs(9, 33, 1, 16)
    grad, saved = randn(*args[0].shape, seed=3), kernel("gated_attention")(*args)
    first, second = (kernel("gated_attention_backward")(grad, *args[:6], *saved, *args[6:], ALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_strides():
    args = inputs(2, 20, 2, 16)
    grad = randn(*args[0].shape, seed=3)

    def run(*args):
        out = kernel("gated_attention")(*args)
        return *out, *kernel("gated_attention_backward")(grad, *args[:6], *out, *args[6:9], ALL, *args[9:])[:4]

    contiguous = run(*(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args))
    args[1] = args[1].transpose(1, 2).contiguous().transpose(1, 2)
    args[2] = torch.cat((args[2], args[2]), -1)[..., :16]
    for a, b in zip(run(*args), contiguous, strict=True):
        assert torch.equal(a, b)


def test_many_programs_per_diagonal():
    check(inputs(20, 20, 1, 16, [20 - i for i in range(20)]))


def test_many_parts_per_diagonal(deterministic):
    check(inputs(10, 9, 1, 16, [9 - i for i in range(10)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads_with_far_tiles(dtype):
    """Their last tile is one of the loop over tiles that load their bias, which others surround."""
    check(inputs(1, 300, 1, 80, [283], dtype=dtype, far=30))


@pytest.mark.parametrize("D", [32, 64, 80])
def test_whole_tiles_in_float32(D):
    """As on AMD, whose matrix unit has fp32; elsewhere products of queries and keys are made in pieces."""
    with pretend("cdna"):
        check(inputs(1, 75, 1, D, [69], far=30))


@pytest.mark.parametrize(("target", "expected"), [("cuda", "tf32"), ("cdna3", "tf32"), ("cdna", "ieee")])
def test_tf32_only_where_the_gpu_has_it(target, expected):
    torch.backends.cuda.matmul.allow_tf32 = True
    with pretend(target):
        assert dot_precision(torch.float32, torch.device("cpu")) == expected
        assert dot_precision(torch.float16, torch.device("cpu")) == "ieee"


def cut_off(x):
    """What the matrix unit sees of fp32 numbers in TF32: ten bits, the others cut off and not rounded."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("D", [64, 80])
def test_tf32(D):
    """Where torch's setting allows it: against float64 arithmetic on operands that were cut off."""
    args = inputs(1, 70, 1, D, [63])
    truth = REFERENCE["gated_attention"].fn(*wide(args))
    coarse = REFERENCE["gated_attention"].fn(*wide([*map(cut_off, args[:3]), *args[3:]]))
    torch.backends.cuda.matmul.allow_tf32 = True
    found = kernel("gated_attention")(*args)
    error, allowed = ((x[0].double() - truth[0]).abs().max().item() for x in (found, coarse))
    assert error <= 2 * allowed
    if DEVICE == "cuda":  # the interpreter multiplies in full precision
        assert error > 1e-5


@pytest.mark.parametrize("D", [64, 80])
def test_tf32_gradients(D):
    args = inputs(1, 70, 1, D, [63])
    grad = randn(*args[0].shape, seed=3)

    def reference(grad, q, k, v, *rest):
        values = wide([grad, q, k, v, *rest])
        saved = REFERENCE["gated_attention"].fn(*values[1:])
        return REFERENCE["gated_attention_backward"].fn(*values[:7], *saved, *values[7:10], ALL, *values[10:])

    truth, coarse = reference(grad, *args), reference(*map(cut_off, (grad, *args[:3])), *args[3:])
    torch.backends.cuda.matmul.allow_tf32 = True
    found = kernel("gated_attention_backward")(grad, *args[:6], *kernel("gated_attention")(*args), *args[6:], ALL)
    for name, a, t, c in zip(NAMES, found, truth, coarse, strict=True):
        error, allowed = ((x.double() - t).abs().max().item() for x in (a, c))
        assert error <= 2 * allowed, name


@pytest.mark.parametrize("mutation", ["no gate", "bias shifted", "tail tile skipped", "k and v swapped"])
def test_mutations_are_caught(mutation):
    args = inputs(1, 130, 1, 16)
    truth = REFERENCE["gated_attention"].fn(*wide(args))
    plain = REFERENCE["gated_attention"].fn(*args)
    q, k, v, gate, rel_bias, lengths, *rest = args
    if mutation == "no gate":
        gate = torch.ones_like(gate)
    elif mutation == "bias shifted":
        rel_bias = rel_bias.roll(1, 1)
    elif mutation == "tail tile skipped":
        lengths = torch.tensor([128])
    else:
        k, v = v, k
    found = kernel("gated_attention")(q, k, v, gate, rel_bias, lengths, *rest)
    with pytest.raises(AssertionError):
        assert_close(found[0], truth[0], plain[0])


def test_refusals():
    from wavlm_fast.backends.triton import TABLE

    refuse = TABLE["gated_attention"].why_not
    args = inputs(1, 4, 1, 16)
    assert "multiple of 16" in refuse(*[randn(1, 4, 1, 20)] * 3, *args[3:])
    assert "up to 128" in refuse(*[randn(1, 4, 1, 144)] * 3, *args[3:])
    assert "float64" in refuse(*wide(args))
    assert "scale" in refuse(*args[:-1], -1.0)
    assert refuse(*args) is None
    if DEVICE == "cpu":
        assert "bfloat16" in refuse(*wide(args, torch.bfloat16))


@pytest.mark.parametrize("far", [None, 5])
@pytest.mark.parametrize("of_all", [True, False])
def test_scores_of_minus_infinity(far, of_all):
    """Of a whole tile, or of whole rows: weights of 0, where a difference of infinities would be NaN."""
    T = 150
    q, k, v, gate, rel_bias, *rest = inputs(1, T, 2, 16, far=far)
    gate = gate + 0.5
    # Entry j - i + T - 1 of query i and key j: keys more than 20 frames ahead, or all of them for the first head.
    rel_bias[:, T + 20 :] = -torch.inf
    if of_all:
        rel_bias[0] = -torch.inf
    args = [q, k, v, gate, rel_bias, *rest]
    plain, truth = REFERENCE["gated_attention"].fn(*args), REFERENCE["gated_attention"].fn(*wide(args))
    assert truth[0].isfinite().all()
    found = kernel("gated_attention")(*args)
    for f, t, p in zip(found, truth, plain, strict=True):
        assert_close(f, t, p)
    grad = randn(*q.shape, seed=3)
    operands = [grad, *args[:6], *plain, *args[6:9], ALL, *args[9:]]
    theirs = REFERENCE["gated_attention_backward"].fn(*operands)
    ours = kernel("gated_attention_backward")(*operands)
    for name, a, p in zip(NAMES, ours, theirs, strict=True):
        if name != "dgate":  # 0 times the bias: NaN in torch as well, and in a few more rows of the last tile
            assert torch.equal(a.isfinite(), p.isfinite()), name


def test_a_length_out_of_range_reads_no_more_than_there_is():
    args = inputs(2, 40, 2, 16, lengths=[40, 13])
    beyond = [*args[:5], torch.tensor([10**6, 13]), *args[6:]]
    for f, t in zip(kernel("gated_attention")(*beyond), kernel("gated_attention")(*args), strict=True):
        assert torch.equal(f, t)
