"""fp32 products of pieces: the emulation, and what the kernels' choice rests on."""

import re
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux alone", allow_module_level=True)

from wavlm_fast.benchmarks.gpu import fp32  # noqa: E402
from wavlm_fast.benchmarks.gpu.compile import _source  # noqa: E402
from wavlm_fast.benchmarks.gpu.devices import DEVICES  # noqa: E402
from wavlm_fast.benchmarks.gpu.matrix_unit import PRODUCTS, _cut, chain, pieces, product  # noqa: E402
from wavlm_fast.kernels._precision import conv_precision  # noqa: E402
from wavlm_fast.kernels._target import pretend  # noqa: E402


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found, a, b):
    return (found.double() - a.double() @ b.double()).abs().max().item()


def test_three_bf16_pieces_hold_an_fp32_number_and_two_do_not():
    x = randn(1000) * randn(1000, seed=1).mul(5).exp()
    assert torch.equal(sum(p.double() for p in pieces(x, "bf16", 3)), x.double())
    assert not torch.equal(sum(p.double() for p in pieces(x, "bf16", 2)), x.double())
    for piece in pieces(x, "bf16", 3):
        assert torch.equal(piece, piece.bfloat16().float())


def test_tf32_keeps_ten_bits_and_rounds_halves_away_from_zero():
    x = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, float("inf")])
    assert pieces(x, "tf32", 1)[0].tolist() == [1 + 2**-10, -1 - 2**-10, 1.0, float("inf")]


def test_the_unit_cuts_off_what_lies_below_the_last_bit_of_the_largest():
    assert _cut(torch.tensor([1.0, -(2.0**-23), 1.5 * 2.0**-23, 2.0**-24]).double(), torch.tensor(1.0)).tolist() == [
        1.0, -(2.0**-23), 2.0**-23, 0.0,
    ]  # fmt: skip
    # Eight products a step: each of the small ones is lost beside the large one, where one rounding would keep half.
    a = torch.tensor([[1.0] + 7 * [2.0**-12]])
    assert product(a, a.T.clone(), "bf16x6", 16).item() == 1.0
    assert chain(a[:, [1, 2, 3, 4, 5, 6, 7, 0]], a[:, [1, 2, 3, 4, 5, 6, 7, 0]].T).item() == 1 + 4 * 2.0**-23


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_stays_what_it_is(sign):
    a, b = randn(2, 16), randn(16, 2, seed=1).abs()
    a[0, 3] = sign * float("inf")
    found = product(a, b, "bf16x6", 16)
    assert found[0].tolist() == 2 * [sign * float("inf")]
    assert found[1].isfinite().all()


@pytest.mark.parametrize(("precision", "holds"), [("bf16x6", True), ("bf16x3", False), ("tf32", False)])
def test_only_six_products_are_as_exact_as_fp32(precision, holds):
    a, b = randn(16, 1536), randn(1536, 16, seed=1)
    ratio = error(product(a, b, precision, 16), a, b) / error(chain(a, b), a, b)
    assert (ratio <= fp32.RULE) == holds
    assert ratio > 0


def test_each_product_counts():
    """The sum is as exact as it is because of all six of them."""
    a, b = randn(16, 64), randn(64, 16, seed=1)
    whole = error(product(a, b, "bf16x6", 16), a, b)
    kind, pairs = PRODUCTS["bf16x6"]
    for left_out in pairs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRODUCTS, "bf16x6", (kind, tuple(p for p in pairs if p != left_out)))
            assert error(product(a, b, "bf16x6", 16), a, b) > 2 * whole


def test_the_compiler_makes_the_products_that_are_emulated():
    """Read in what it compiles for sm_80: the pieces of both operands, and their products in order."""
    device = DEVICES["A100"]
    _, launch = next(fp32.launches("bf16x6", device, ["tdnn", "strided_conv"]))
    text = triton.compile(_source(launch), target=device.architecture.target, options=launch.options).asm["ttgir"]
    # In the loop: a number's pieces are truncated one after the other, first those of the left operand.
    loop = text[text.index("scf.for") : text.index("scf.yield")]
    cut = re.findall(r"(%\w+) = arith\.truncf %\w+ : tensor<\d+x\d+xf32, #ttg\.dot_op<\{opIdx = (\d)", loop)
    order = {name: [n for n, side in cut if side == own].index(name) for name, own in cut}
    found = [tuple(order[name] for name in pair) for pair in re.findall(r"tt\.dot (%\w+), (%\w+),", loop)]
    assert tuple(found) == PRODUCTS["bf16x6"][1]


def test_where_pieces_are_chosen():
    device = torch.device("meta")
    allowed = torch.backends.cudnn.allow_tf32
    try:
        for tf32 in (True, False):
            torch.backends.cudnn.allow_tf32 = tf32
            found = {}
            for target in ("ampere", "hopper", "blackwell", "cuda", "cdna3", "cdna"):
                with pretend(target):
                    found[target] = conv_precision(torch.float32, device)
                    assert conv_precision(torch.bfloat16, device) == "ieee"
            chosen = {target for target, precision in found.items() if precision == "bf16x6"}
            assert chosen == (set() if tf32 else {"ampere", "hopper"})
        with pretend("hopper"):  # the interpreter
            assert conv_precision(torch.float32, torch.device("cpu")) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(fp32, "_LENGTHS", {"short": 32})
    assert fp32.main(["--precision", "bf16x6", "--device", "A100", "--op", "strided_conv"]) == 0
    said = capsys.readouterr().out
    assert "bf16x6: at most" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("A100")]
    assert [("ieee" in line, "bf16x6" in line) for line in lines] == [(True, False), (False, True)]


def test_devices_that_gain_are_those_that_choose_it():
    """By the estimate: the least time of the front end's product, of pieces and on the fp32 units."""
    for name, gains in (("A100", True), ("RTX 4090", False)):
        times = {}
        for precision in ("ieee", "bf16x6"):
            _, launch = next(fp32.launches(precision, DEVICES[name], ["strided_conv"]))
            built = fp32.roofline.compiled(launch, DEVICES[name])
            times[precision] = max(fp32.roofline.of_launch(launch, built, DEVICES[name]).values())
            assert not built.spilled
        assert (times["bf16x6"] < 0.5 * times["ieee"]) == gains
        assert (times["bf16x6"] < times["ieee"]) == gains
