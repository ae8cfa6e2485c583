"""The reference tells of every public name, each docstring of every argument, and each op's line of torch is true."""

from __future__ import annotations

import importlib
import inspect
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from doc_blocks import ROOT

import wavlm_fast
from wavlm_fast import cli, ops, original

sys.path.append(str(ROOT / "docs" / "extensions"))
import from_code

PYTHON = ROOT.joinpath("docs", "reference", "python.md").read_text()
TOLD = re.findall(r"^\.\. auto(?:function|class|exception|method):: ([\w.]+)$", PYTHON, re.MULTILINE)


def _found(path):
    """What a dotted name means; a module goes before a function of the same name."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise LookupError(path)


def test_every_public_name_is_in_the_reference():
    told = {id(_found(name)) for name in TOLD}
    for module in (wavlm_fast, original):
        for name in module.__all__:
            mentioned = f"`wavlm_fast.{name}` is transformers' own" in PYTHON
            assert mentioned or id(getattr(module, name)) in told, f"{module.__name__}.{name}"


FUNCTIONS = [name for name in TOLD if inspect.isfunction(_found(name))]


@pytest.mark.parametrize("name", [*FUNCTIONS, "wavlm_fast.Extractor", *(f"wavlm_fast.ops.{name}" for name in ops.OPS)])
def test_every_argument_and_error_is_described(name):
    of = _found(name)
    said = inspect.getdoc(of)
    described = {n.strip() for names in re.findall(r"^    ([\w, ]+): ", said, re.MULTILINE) for n in names.split(",")}
    missing = set(inspect.signature(of).parameters) - described
    assert not missing, f"{name} does not describe {missing}"
    assert "Raises:" in said or "raise " not in inspect.getsource(of), f"{name} does not say what it raises"


def test_commands_are_written_with_all_that_their_parsers_have():
    lines = list(from_code.commands())
    assert [line for line in lines if line.startswith("## ")] == [f"## wavlm-fast {name}" for name in cli.COMMANDS]
    options = [line for line in lines if line.startswith(".. option:: --layer")]
    assert options == [".. option:: --layer N|all [N|all ...]"]
    assert ".. option:: --dtype-out DTYPE" in lines
    assert r"   0 is the embedding before the first layer, N the output" in "\n".join(lines)


def _lines_of(name):
    """The code in what an op is said to be equivalent to."""
    return re.findall(r"`([^`]+)`", from_code.equivalent(name))


def _drawn(*shape):
    return torch.randn(shape, dtype=torch.float64)


B, T, C, OUT, K, H, D = 2, 11, 6, 4, 3, 2, 3


def _linear_act(line):
    x, weight, bias = _drawn(B, T, C), _drawn(OUT, C), _drawn(OUT)
    names = {"F": F, "activation": F.gelu, "x": x, "weight": weight, "bias": bias}
    return ops.linear_act(x, weight, bias, "gelu"), eval(line, names)


def _add_layer_norm(line):
    names = {"F": F, "C": C, "x": _drawn(B, T, C), "residual": _drawn(B, T, C), "weight": _drawn(C), "bias": _drawn(C)}
    names["eps"] = 1e-5
    exec(f"def run(): {line}", names)
    found = ops.add_layer_norm(*(names[n] for n in ("x", "residual", "weight", "bias", "eps")))
    return torch.stack(found), torch.stack(names["run"]())


def _waveform_conv(line, _, __):
    waveform, weight, bias, scale, shift = _drawn(B, 40), _drawn(OUT, 1, K), _drawn(OUT), _drawn(OUT), _drawn(OUT)
    names = {"F": F, "activation": F.gelu, "norm": lambda x: F.group_norm(x, OUT, scale, shift), "stride": 2}
    names |= {"waveform": waveform, "weight": weight, "bias": bias}
    norm = {"norm": "group", "norm_weight": scale, "norm_bias": shift}
    return ops.waveform_conv(waveform, weight, bias, stride=2, activation="gelu", **norm), eval(line, names)


def _strided_conv(line, _, __):
    x, weight, bias, scale, shift = _drawn(B, T, C), _drawn(OUT, C, K), _drawn(OUT), _drawn(OUT), _drawn(OUT)
    names = {"F": F, "activation": F.gelu, "layer_norm": lambda x: F.layer_norm(x, (OUT,), scale, shift), "stride": 2}
    names |= {"x": x, "weight": weight, "bias": bias}
    norm = {"norm_weight": scale, "norm_bias": shift}
    return ops.strided_conv(x, weight, bias, stride=2, activation="gelu", **norm), eval(line, names)


def _positional_conv(line, _):
    x, weight, bias = _drawn(B, T, C), _drawn(C, C // 2, 4), _drawn(C)
    names = {"F": F, "activation": F.gelu, "x": x, "weight": weight, "bias": bias, "K": 4, "groups": 2, "T": T}
    return ops.positional_conv(x, weight, bias, groups=2), eval(line, names)


def _position_gate(line, before):
    x, weight, bias, const = _drawn(B, T, H * D), _drawn(8, D), _drawn(8), _drawn(H)
    names = {"F": F, "x": x.unflatten(-1, (H, D)), "weight": weight, "bias": bias, "const": const}
    exec(before, names)
    return ops.position_gate(x, weight, bias, const), eval(line, names).transpose(1, 2)


def _gated_attention(line, before):
    q, k, v = (_drawn(B, T, H, D) for _ in range(3))
    gate, rel_bias = _drawn(B, H, T), _drawn(H, 2 * T - 1)
    expected = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            names = {"softmax": lambda x: x.softmax(-1), "scale": D**-0.5, "gate": gate[b, h], "T": T}
            names |= {"q": q[b, :, h], "k": k[b, :, h], "v": v[b, :, h], "bias": _drawn(T, T), "rel_bias": rel_bias[h]}
            for i in range(T):
                for j in range(T):
                    exec(before, names, {"i": i, "j": j})
            expected[b, :, h] = eval(line, names)
    return ops.gated_attention(q, k, v, gate, rel_bias), expected


def _tdnn(_, line, before):
    x, weight, bias = _drawn(B, T, C), _drawn(OUT, K * C), _drawn(OUT)
    names = {"F": F, "relu": F.relu, "x": x, "weight": weight, "bias": bias, "dilation": 2, "C": C, "K": K, "OUT": OUT}
    exec(before.replace("C'", "OUT"), names)
    return ops.tdnn(x, weight, bias, kernel_size=K, dilation=2), eval(line, names)


def _stats_pool(line, _):
    names = {"torch": torch, "x": _drawn(B, T, C), "lengths": torch.tensor([T, 4])}
    return ops.stats_pool(names["x"], names["lengths"]), torch.stack([eval(line, names, {"b": b}) for b in range(B)])


CALLS = {
    call.__name__[1:]: call
    for call in (
        _waveform_conv, _strided_conv, _positional_conv, _linear_act, _add_layer_norm, _position_gate, _gated_attention,
        _tdnn, _stats_pool,
    )
}  # fmt: skip
# Made of other ops, and said to be what a class of transformers' is.
COMPOSED = {"feature_encoder", "encoder_layer"}


@pytest.mark.parametrize("name", CALLS)
def test_an_op_is_what_its_line_of_torch_computes(name):
    torch.manual_seed(0)
    found, expected = CALLS[name](*_lines_of(name))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_every_op_says_what_it_is_equivalent_to():
    assert {*CALLS, *COMPOSED} == set(ops.OPS)
    assert all("transformers' `WavLM" in from_code.equivalent(name) for name in COMPOSED)
    assert all(name in "\n".join(from_code.all_ops()) for name in ops.schemas)
