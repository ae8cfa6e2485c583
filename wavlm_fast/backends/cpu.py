"""C++ kernels (csrc/) and oneDNN through torch, for tensors on the CPU."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import derived
from ..ops import schemas
from . import Implementation, encoder, front_end, gradients, positional_conv, products

NAME = "cpu"

logger = logging.getLogger("wavlm_fast")

# What csrc/ implements, with the ops' own schemas. A namespace of its own leaves the ops' registration (fake, autograd,
# autocast) the only one.
_KERNELS = (
    "add_layer_norm",
    "add_layer_norm_backward",
    "gated_attention",
    "gated_attention_backward",
    "position_gate",
    "position_gate_backward",
    "stats_pool",
    "stats_pool_backward",
)
_library = torch.library.Library("wavlm_fast_cpu", "DEF")
_RESIZED = "Tensor? offsets=None, Tensor? out_offsets=None, int? out_frames=None"  # as in ops/_packed.py
for _schema in (
    "isa() -> str",
    "isa_levels() -> str[]",
    "isa_problem() -> str",
    "threads() -> int",
    "fingerprint(Tensor x, int samples) -> int",
    "activation_backward(Tensor grad, Tensor pre, str activation) -> Tensor",
    "pack_conv(Tensor[] weights, bool filtered) -> Tensor",
    "peak(str dtype) -> float",
    "packed_conv(Tensor x, Tensor packed, Tensor? bias, int channels, int taps, int stride, int dilation, "
    f"bool filtered, str activation, {_RESIZED}) -> Tensor",
    "encoder_layer(Tensor x, Tensor rel_bias, Tensor? key_lengths, Tensor[] packed, Tensor[] biases, Tensor[] gate, "
    "Tensor[] norms, float[] eps, float scale, str activation, bool norm_first, Tensor? offsets=None) -> Tensor",
    "matmul(Tensor a, Tensor b, Tensor(a!) out, bool add) -> Tensor(a!)",
    "norm_act(Tensor x, Tensor? weight, Tensor? bias, float eps, str activation) -> Tensor",
    "waveform_conv(Tensor waveform, Tensor weight, Tensor packed, Tensor? bias, int stride, bool group_norm, "
    f"Tensor? norm_weight, Tensor? norm_bias, float eps, str activation, bool to_bf16, {_RESIZED}) -> Tensor",
    "waveform_conv_backward(Tensor grad, Tensor waveform, Tensor weight, int stride, Tensor norm_weight, "
    f"Tensor norm_bias, float eps, str activation, bool wants_waveform, {_RESIZED}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "feature_encoder(Tensor waveform, Tensor weight, Tensor[] packed, Tensor?[] biases, Tensor?[] norm_weights, "
    "Tensor?[] norm_biases, int[] taps, int[] strides, int[] channels, bool[] filtered, str norm, float eps, "
    f"str activation, {_RESIZED}) -> Tensor",
    "positional_spectra(Tensor weight) -> Tensor",
    "positional_conv(Tensor x, Tensor weight, Tensor? spectra, Tensor? bias, str activation, bool residual, bool save, "
    "Tensor? offsets=None) -> (Tensor, Tensor)",
    "positional_conv_backward(Tensor grad, Tensor? residual, Tensor x, Tensor weight, bool[] wanted, "
    "Tensor? offsets=None) -> (Tensor, Tensor)",
):
    _library.define(_schema)
for _name in _KERNELS:
    _library.define(_name + schemas[_name])
_native = torch.ops.wavlm_fast_cpu
_FOLDER = Path(__file__).parent.parent


def why_not(device: torch.device | None = None) -> str | None:
    """Why no kernel of this backend can run on `device`; None when one can."""
    if device is not None and device.type != "cpu":
        return f"the cpu backend needs tensors on the CPU, these are on {device.type}"
    return None


def build_record(folder: Path = _FOLDER) -> dict[str, Any]:
    """How the extension was built: {"torch", "compiler", "levels"}, {"failed": a sentence}, or {} if it never was."""
    try:
        return json.loads(folder.joinpath("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def isa() -> str | None:
    """The instruction set level that the C++ kernels use here; None without the extension."""
    return None if EXTENSION_PROBLEM else _native.isa()


def isa_levels() -> list[str]:
    """The levels that both the extension and this CPU have, slowest first."""
    return [] if EXTENSION_PROBLEM else _native.isa_levels()


def threads() -> int | None:
    """How many threads the C++ kernels run on now; None without the extension."""
    return None if EXTENSION_PROBLEM else _native.threads()


def _digest_of(sources: Path) -> str | None:
    """What setup.py calls the state of csrc/; None where there are no sources."""
    if not sources.joinpath("dispatch.h").exists():
        return None
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _load_extension(folder: Path) -> str | None:
    """Load the extension; a sentence when that cannot be done."""
    record = build_record(folder)
    files = sorted(folder.glob("_C*.so"))
    if not files:
        return f"extension not built: {record.get('failed', 'wavlm-fast was not installed, only put on the path')}"
    built_with, installed = record.get("torch", torch.__version__), torch.__version__
    # torch's C++ interface changes with every minor version; a library built for another one may load and then crash.
    if built_with.split(".")[:2] != installed.split(".")[:2]:
        return f"extension built with torch {built_with}, torch {installed} is installed: install wavlm-fast again"
    # In a checkout the sources may have moved on, and with them what the extension is expected to hold.
    if "sources" in record and _digest_of(folder.parent / "csrc") not in (None, record["sources"]):
        return "extension is older than the sources in csrc/: install wavlm-fast again"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        return f"extension cannot be loaded: {str(error).splitlines()[0]}"
    if _native.isa_problem():
        logger.warning("%s", _native.isa_problem())
    return None


EXTENSION_PROBLEM = _load_extension(_FOLDER)
if EXTENSION_PROBLEM is None:
    derived.use_fingerprint(_native.fingerprint.default)
_DTYPES = (torch.float32, torch.bfloat16)


def _cpp(name: str, why_not: Callable[..., str | None]) -> Implementation:
    """The C++ kernel `name`, which needs the extension and whatever else `why_not` asks for."""
    native = getattr(_native, name).default
    return Implementation(native, lambda *args: EXTENSION_PROBLEM or why_not(*args))


def _why_not_add_layer_norm(x: torch.Tensor, residual: torch.Tensor, *rest: object) -> str | None:
    if x.dtype not in _DTYPES or residual.dtype != x.dtype:
        return f"the C++ add_layer_norm takes float32 or bfloat16, x is {x.dtype} and residual {residual.dtype}"
    if x.shape[-1] == 0:
        return "the C++ add_layer_norm needs at least one channel"
    return None


def _why_not_add_layer_norm_backward(
    grad_sum: torch.Tensor, grad_normed: torch.Tensor, sum: torch.Tensor, *rest: object
) -> str | None:
    return _why_not_add_layer_norm(sum, grad_normed)


def _of_frames(op: str) -> dict[str, Implementation]:
    """An op of which the dtype of x alone decides, and its backward."""

    def why_not(x: torch.Tensor, *rest: object) -> str | None:
        if x.dtype not in _DTYPES:
            return f"the C++ {op} takes float32 or bfloat16, x is {x.dtype}"
        return "there is nothing to compute" if x.numel() == 0 else None

    return {op: _cpp(op, why_not), f"{op}_backward": _cpp(f"{op}_backward", lambda grad, *args: why_not(*args))}


def _why_not_gated_attention(q: torch.Tensor, *rest: object) -> str | None:
    if q.dtype not in _DTYPES:
        return f"the C++ gated_attention takes float32 or bfloat16, q is {q.dtype}"
    return "there is nothing to compute" if q.numel() == 0 else None


def _why_not_gated_attention_backward(grad: torch.Tensor, q: torch.Tensor, *rest: object) -> str | None:
    return _why_not_gated_attention(q)


def _why_not_waveform_conv(*args: Any) -> str | None:
    return front_end.why_not_waveform_conv(EXTENSION_PROBLEM, *args)


def _why_not_waveform_conv_backward(*args: Any) -> str | None:
    return front_end.why_not_waveform_conv_backward(EXTENSION_PROBLEM, *args)


def _why_not_feature_encoder(*args: Any) -> str | None:
    return front_end.why_not_feature_encoder(EXTENSION_PROBLEM, *args)


def _why_not_positional_conv(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> str | None:
    return EXTENSION_PROBLEM or positional_conv.why_not(x, weight)


def _why_not_positional_conv_backward(grad: torch.Tensor, x: torch.Tensor, *rest: object) -> str | None:
    return _why_not_positional_conv(x, *rest)


def _why_not_encoder_layer(*args: Any) -> str | None:
    return encoder.why_not(EXTENSION_PROBLEM, *args)


def _why_not_product(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> str | None:
    return products.why_not(EXTENSION_PROBLEM, x, weight)


def _why_not_strided_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    norm_weight: torch.Tensor | None,
    *rest: object,
) -> str | None:
    # The norm is the extension's in both dtypes.
    return _why_not_product(x, weight) or (None if norm_weight is None else EXTENSION_PROBLEM)


def _why_not_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: object) -> str | None:
    return gradients.why_not(EXTENSION_PROBLEM, grad, x, weight)


TABLE: dict[str, Implementation] = {
    "add_layer_norm": _cpp("add_layer_norm", _why_not_add_layer_norm),
    "add_layer_norm_backward": _cpp("add_layer_norm_backward", _why_not_add_layer_norm_backward),
    "gated_attention": _cpp("gated_attention", _why_not_gated_attention),
    "gated_attention_backward": _cpp("gated_attention_backward", _why_not_gated_attention_backward),
    "encoder_layer": Implementation(encoder.encoder_layer, _why_not_encoder_layer),
    "feature_encoder": Implementation(front_end.feature_encoder, _why_not_feature_encoder),
    **_of_frames("position_gate"),
    **_of_frames("stats_pool"),
    "waveform_conv": Implementation(front_end.waveform_conv, _why_not_waveform_conv),
    "waveform_conv_backward": Implementation(front_end.waveform_conv_backward, _why_not_waveform_conv_backward),
    "positional_conv": Implementation(positional_conv.positional_conv, _why_not_positional_conv),
    "positional_conv_backward": Implementation(
        positional_conv.positional_conv_backward, _why_not_positional_conv_backward
    ),
    "linear_act": Implementation(products.linear_act, _why_not_product),
    "linear_act_backward": Implementation(gradients.linear_act_backward, _why_not_gradient),
    "strided_conv": Implementation(products.strided_conv, _why_not_strided_conv),
    "strided_conv_backward": Implementation(gradients.strided_conv_backward, _why_not_gradient),
    "tdnn": Implementation(products.tdnn, _why_not_product),
    "tdnn_backward": Implementation(gradients.tdnn_backward, _why_not_gradient),
}
