"""What plain torch trains faster: the rows, and which calls they mean."""

import pytest
import torch

import wavlm_fast
from wavlm_fast import backends, ops
from wavlm_fast.backends.cpu import choices

HERE = "a made-up processor"
FIRST = choices.Row(HERE, "linear_act", "0.70", 100)
HALF = choices.Row(HERE, "tdnn", "0.80", 100, (torch.bfloat16,))
SHIPPED, PROCESSOR = choices.ROWS, choices.processor


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(choices, "ROWS", (FIRST, HALF))
    monkeypatch.setattr(choices, "processor", lambda: HERE)
    monkeypatch.setattr(choices.extension, "problem", lambda: None)


def why(op, frames, dtype=torch.float32):
    return choices.why_torch_trains(op, torch.ones(2, frames // 2, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype))


def test_frames_of_the_whole_batch():
    assert why("linear_act", 100) == f"torch's own linear_act trains faster on {HERE} up to 100 frames (0.70 x)"
    assert why("linear_act", 102) is None
    assert why("add_layer_norm", 2) is None


def test_dtypes():
    assert why("tdnn", 100, torch.bfloat16) is not None
    assert why("tdnn", 100, torch.float32) is None


def test_under_autocast_the_dtype_is_that_of_the_product():
    with torch.autocast("cpu", torch.bfloat16):
        assert why("tdnn", 100) is not None
    with torch.autocast("cpu", torch.float16):
        assert why("linear_act", 100) is None


def test_rows_are_of_one_processor(monkeypatch):
    monkeypatch.setattr(choices, "processor", lambda: "another processor")
    assert why("linear_act", 2) is None


def test_without_kernels_there_is_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(choices.extension, "problem", lambda: "extension not built")
    assert why("linear_act", 2) is None


def calls():
    """Each op that may have a row, its tensors in float32, the first of them frames."""
    torch.manual_seed(0)
    x, vector = torch.randn(2, 9, 8), torch.randn(8)
    return {
        "linear_act": ((x, torch.randn(8, 8), vector), lambda *t: ops.linear_act(*t, "gelu")),
        "add_layer_norm": ((x, torch.randn(2, 9, 8), vector, vector + 1), lambda *t: ops.add_layer_norm(*t, 1e-5)[1]),
        "tdnn": (
            (x, torch.randn(8, 24), vector),
            lambda *t: ops.tdnn(*t, kernel_size=3, dilation=2, activation="relu"),
        ),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("op", list(calls()))
def test_left_to_torch_an_op_is_what_it_was(monkeypatch, op, autocast):
    """The reference, outputs and gradients, in dtype and layout too."""
    tensors, call = calls()[op]

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with wavlm_fast.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    monkeypatch.setattr(choices, "ROWS", (choices.Row(HERE, op, "0.70", 100),))
    with backends.noting() as noted:
        got = run("auto")
    assert [(name, choice.backend) for name, choice in noted if not name.endswith("_backward")] == [(op, "reference")]
    for mine, wanted in zip(got, run("reference"), strict=True):
        assert (mine.dtype, mine.stride()) == (wanted.dtype, wanted.stride())
        torch.testing.assert_close(mine, wanted, rtol=2**-6 if autocast else 1e-5, atol=2**-5 if autocast else 1e-5)


WRONG = {
    "residual of one frame": {"residual": torch.ones(2, 1, 8)},
    "residual of other frames": {"residual": torch.ones(2, 4, 8)},
    "residual in another dtype": {"residual": torch.ones(2, 3, 8, dtype=torch.float64)},
    "no frames": {"x": torch.ones(()), "residual": torch.ones(())},
    "integers": {"x": torch.ones(2, 3, 8, dtype=torch.int64), "residual": torch.ones(2, 3, 8, dtype=torch.int64)},
    "fewer gains": {"weight": torch.ones(4)},
    "one gain": {"weight": torch.ones(1)},
    "gains of every frame": {"weight": torch.ones(3, 8), "bias": torch.ones(3, 8)},
    "gains in another dtype": {"weight": torch.ones(8, dtype=torch.bfloat16)},
    "fewer offsets": {"bias": torch.ones(4)},
    "one offset": {"bias": torch.ones(1)},
    "offsets in another dtype": {"bias": torch.ones(8, dtype=torch.float64)},
    "offsets elsewhere": {"bias": torch.ones(8, device="meta")},
    "residual elsewhere": {"residual": torch.ones(2, 3, 8, device="meta")},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_left_to_torch_a_wrong_norm_is_refused_as_ever(monkeypatch, wrong):
    """Torch itself checks most of it there."""
    monkeypatch.setattr(choices, "ROWS", (choices.Row(HERE, "add_layer_norm", "0.70", 100),))
    given = {"x": torch.ones(2, 3, 8), "residual": torch.ones(2, 3, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    ops.add_layer_norm(**given | {"weight": torch.ones(8, requires_grad=True)})
    given |= WRONG[wrong]
    with pytest.raises((ValueError, TypeError)) as expected:
        torch.ops.wavlm_fast.add_layer_norm(*given.values(), 1e-5, True)
    given["weight"] = given["weight"].clone().requires_grad_()
    with pytest.raises(expected.type) as raised:
        ops.add_layer_norm(**given)
    assert str(raised.value) == str(expected.value)


def test_every_row_is_of_a_processor_that_is_told_apart_and_of_an_op_that_asks():
    assert {row.processor for row in SHIPPED} <= {choices._AMX, choices._AMD}
    assert {row.op for row in SHIPPED} <= calls().keys()
    assert all(row.frames > 0 for row in SHIPPED)


@pytest.mark.parametrize(
    ("machine", "level", "amx", "name", "kind"),
    [
        ("x86_64", "avx512_bf16", True, "Intel(R) Xeon(R) Processor", choices._AMX),
        ("x86_64", "avx512", False, "Intel(R) Xeon(R) Processor", "Intel with AVX-512"),
        ("x86_64", "avx512_bf16", False, "AMD EPYC", choices._AMD),
        ("x86_64", "avx2", True, "Intel(R) Xeon(R) Processor", "a processor with AVX2"),
        ("x86_64", "default", False, "AMD Opteron", "another processor"),
        ("arm64", "default", False, "Apple M1", "aarch64"),
        ("x86_64", None, True, "Intel(R) Xeon(R) Processor", "another processor"),
    ],
)
def test_processors(monkeypatch, machine, level, amx, name, kind):
    monkeypatch.setattr(choices.platform, "machine", lambda: machine)
    monkeypatch.setattr(choices.extension, "isa", lambda: level)
    monkeypatch.setattr(choices, "is_amx_supported", lambda: amx)
    monkeypatch.setattr(choices, "cpu_name", lambda: name)
    assert PROCESSOR.__wrapped__() == kind
