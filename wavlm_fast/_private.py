"""What is used of torch and transformers beside their documented API, and what is done where it is gone.

A private name can go with any release. That may cost speed, never the import and never a right answer. All such names
are fetched here, and everybody else imports from here; a test reads `NAMES` and takes them away one at a time. What is
lost without a name is a sentence, which `report` and `wavlm-fast doctor` tell.

Not here are transformers' WavLM classes, which are what the library stands in for, and the methods that it overrides
for torch or transformers to call: one that nobody calls any more does no harm.
"""

from __future__ import annotations

import copy
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler
from torch.nn.modules import module as for_all_modules
from transformers import PreTrainedModel

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
_WAVLM = "transformers.models.wavlm.modeling_wavlm"


@dataclass(frozen=True)
class Name:
    """A private name: whose it is, what is lost without it, and whether it is there (None: only a live model tells)."""

    owner: str
    name: str
    lost: str
    found: bool | None

    def __str__(self) -> str:
        package = torch if self.owner.startswith("torch") else transformers
        return f"{package.__name__} {package.__version__} has no {self.owner}.{self.name}: {self.lost}"


NAMES: list[Name] = []


def missing() -> tuple[str, ...]:
    """A sentence for each name that is gone."""
    return tuple(str(name) for name in NAMES if name.found is False)


def fetch(owner: str, name: str, lost: str, instead: Any = None, of: object | None = None) -> Any:
    """`owner.name`, or `instead` where it is gone.

    Args:
        owner: a module or a class, with dots.
        name: its attribute.
        lost: what is lost without it.
        instead: stands in for it.
        of: an instance of the owner, to be looked at in its place.
    """
    gone = object()
    try:
        found = getattr(pkgutil.resolve_name(owner) if of is None else of, name, gone)
    except Exception:  # what is imported at first use fails in ways of its own
        found = gone
    NAMES.append(Name(owner, name, lost, found is not gone))
    return instead if found is gone else found


class Nothing:
    """Stands for a class that is gone: nothing is one of it."""


# What nn.Module holds. Hooks that cannot be seen may be there: the module is called then, which runs them.


def _unseen(*args: object) -> None:
    """No hook, but what stands for hooks that cannot be seen."""


Hooks = Mapping[int, Callable[..., Any]]
_UNSEEN: Hooks = {0: _unseen}
_OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE = nn.Module()
_lost = "whether a module has hooks cannot be seen: all are called, none is fused"
_sees_hooks = [fetch("torch.nn.Module", name, _lost, of=_MODULE) is not None for name in _OWN_HOOKS]


def _all_hooks_of(module: nn.Module) -> tuple[Hooks, Hooks, Hooks, Hooks]:
    """A module's own hooks: forward, before forward, backward, before backward."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _seen_hooks_of(module: nn.Module) -> tuple[Hooks, ...]:
    return tuple(getattr(module, name, _UNSEEN) for name in _OWN_HOOKS)


hooks_of = _all_hooks_of if all(_sees_hooks) else _seen_hooks_of  # asked hundreds of times in a forward


def _by_registering(register: Callable[..., Any]) -> Hooks:
    """The hooks of all modules that `register` adds to: the handle that it returns knows where it put its own."""
    try:
        handle = register(_unseen)
        hooks = handle.hooks_dict_ref()
        handle.remove()
    except Exception:
        return _UNSEEN
    return hooks if isinstance(hooks, Mapping) else _UNSEEN


def _global_hooks(name: str, lost: str, register: Callable[..., Any] | None = None) -> Hooks:
    found = fetch("torch.nn.modules.module", name, lost)
    if found is None:
        return _UNSEEN if register is None else _by_registering(register)
    return found


_lost = "nothing, hooks of all modules are found by registering one"
GLOBAL_HOOKS = (
    _global_hooks("_global_forward_hooks", _lost, for_all_modules.register_module_forward_hook),
    _global_hooks("_global_forward_pre_hooks", _lost, for_all_modules.register_module_forward_pre_hook),
    _global_hooks("_global_backward_pre_hooks", _lost, for_all_modules.register_module_full_backward_pre_hook),
    # Registering one of these settles for the whole process which of two kinds all others must be.
    _global_hooks("_global_backward_hooks", "whether all modules have backward hooks cannot be seen: none is fused"),
)

# The module of transformers 5 whose hooks collect outputs. Were it renamed, they would count as anybody's hooks do.
CAPTURING = "transformers.utils.output_capturing"

_lost = "listing them takes longer"
_sees_tensors = [fetch("torch.nn.Module", name, _lost, of=_MODULE) is not None for name in ("_parameters", "_buffers")]


def _parameters_of(module: nn.Module) -> Mapping[str, Tensor | None]:
    """A module's own parameters by name."""
    return module._parameters


def _buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name."""
    return module._buffers


def _listed_parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    return dict(module.named_parameters(recurse=False))


def _listed_buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    return dict(module.named_buffers(recurse=False))


parameters_of = _parameters_of if _sees_tensors[0] else _listed_parameters_of
buffers_of = _buffers_of if _sees_tensors[1] else _listed_buffers_of

# Weight norm, as it was and as it is: a convolution is called that has a kind which is gone.
_lost = "the positional convolution is called, not fused"
WeightNormHook = fetch("torch.nn.utils.weight_norm", "WeightNorm", _lost, Nothing)
WeightNormParametrization = fetch("torch.nn.utils.parametrizations", "_WeightNorm", _lost, Nothing)


def _weight_norm_in_steps(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


weight_norm = fetch("torch", "_weight_norm", "the positional convolution's weight takes longer", _weight_norm_in_steps)

# Tensors.

_version = fetch("torch.Tensor", "_version", "without the extension nothing is packed for longer than a call")


def version(tensor: Tensor) -> object:
    """Counts the changes of a tensor in place; where that cannot be known, it has always changed."""
    return object() if _version is None else tensor._version


def reads_no_values(func: Callable[..., Any]) -> bool:
    """Whether torch asks something of a tensor by this private function of its own that takes no values to answer.

    Known by name: without one, torch does not ask.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in ("_version", "_backward_hooks")
    return name == "_has_compatible_shallow_copy_type"


_is_view = fetch("torch.Tensor", "_is_view", "the reference backend's outputs take a little longer")
_unsafe_view = fetch("torch.ops.aten", "_unsafe_view", "outputs that are views are copied")


def unaliased(output: Tensor) -> Tensor:
    """The tensor, as one that is no view to autograd."""
    if _is_view is not None and not _is_view(output):
        return output
    return output.clone() if _unsafe_view is None else _unsafe_view(output, output.shape)


_lost = "layers of other houses than transformers' hand on the dense position bias"
make_wrapper_subclass = fetch("torch.Tensor", "_make_wrapper_subclass", _lost)

# Fake tensors, which torch.compile and torch.export trace with.

FakeTensor = fetch("torch._subclasses.fake_tensor", "FakeTensor", "modules traced with fakes are called", Nothing)
_fake_mode = fetch("torch._subclasses.fake_tensor", "FakeTensorMode", "report takes some memory")
_unset_fakes = fetch("torch._subclasses.fake_tensor", "unset_fake_temporarily", "nothing, a thread does the same")


def without_memory() -> AbstractContextManager:
    """Tensors made inside have no memory, if that can be had."""
    return nullcontext() if _fake_mode is None else _fake_mode(allow_non_fake_inputs=True)


def on_real_tensors(function: Callable[[], Any]) -> Any:
    """`function()`, whose tensors are real ones even while fakes are made."""
    if _unset_fakes is not None:
        with _unset_fakes():
            return function()
    with ThreadPoolExecutor(1) as pool:  # such modes are a thread's own
        return pool.submit(function).result()


# Models that leave eager torch; without a name its case is not noticed, and fails as ops of ours fail there.


def _no_transform() -> None:
    """There is no transform."""


def _tracing() -> bool | None:
    return torch.jit.is_tracing() or None


# What a transform of torch.func is, and what torch.jit.trace has traced, just now; None for nothing.
transform = fetch("torch._C._functorch", "peek_interpreter_stack", "models fail in torch.func", _no_transform)
jit_state = fetch("torch._C", "_get_tracing_state", "nothing, torch.jit.is_tracing answers", _tracing)
_PROXY_TENSOR = "torch.fx.experimental.proxy_tensor"
fetch(_PROXY_TENSOR, "_CURRENT_MAKE_FX_TRACER", "graphs of make_fx hold our ops")
fetch("torch.autograd.forward_ad", "_current_level", "models fail in forward-mode derivatives")


def in_make_fx() -> bool:
    """Whether make_fx, or what is built on it, traces a graph."""
    return getattr(sys.modules.get(_PROXY_TENSOR), "_CURRENT_MAKE_FX_TRACER", None) is not None


def in_forward_mode() -> bool:
    """Whether a level of dual numbers is open."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def _somebody() -> int:
    """What stands for as many watchers as cannot be counted."""
    return 1


_lost = "each call of an op takes longer"
_function_modes = fetch("torch._C", "_len_torch_function_stack", _lost, _somebody)
_dispatch_modes = fetch("torch._C", "_len_torch_dispatch_stack", _lost, _somebody)
fetch("torch.autograd.profiler", "_is_profiler_enabled", _lost)


class _Keys:
    """Keys that nobody knows."""

    def raw_repr(self) -> int:
        return 0


def _no_keys(tensor: Tensor) -> _Keys:
    return _Keys()


dispatch_keys = fetch("torch._C", "_dispatch_keys", _lost, _no_keys)
# Keys of tensors that are nothing but memory, not batched by a transform, conjugated, sparse, quantized or wrapped:
# those of every kind of device that `is_plain` has met. They name the device too.
PLAIN_KEYS: set[int] = set()


@cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """What a tensor on such a device is to the dispatcher when it is no more than that, inference tensors too."""
    found = set()
    for mode in (False, True):
        with torch.inference_mode(mode):
            found.add(dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return frozenset(found - {0})


def is_plain(tensor: Tensor) -> bool:
    """Whether `dispatch_keys(tensor).raw_repr()` is or belongs in PLAIN_KEYS, where it is after this."""
    PLAIN_KEYS.update(_plain_keys(tensor.device.type))
    return dispatch_keys(tensor).raw_repr() in PLAIN_KEYS


def is_watched() -> bool:
    """Whether a mode or a profiler is to hear of each op that is called."""
    return bool(_function_modes() or _dispatch_modes() or getattr(profiler, "_is_profiler_enabled", True))


def _lowering_somewhere() -> bool:
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


# Whether autocast is on, for whatever kind of device.
is_autocast_enabled = fetch(
    "torch._C", "_is_any_autocast_enabled", "nothing, CPUs and GPUs are asked for", _lowering_somewhere
)


# The kernels by which a program is decomposed, and one of those that torch lays over them meanwhile.
_keys = fetch("torch._C", "DispatchKey", "run_decompositions leaves our ops in a program")
_COMPOSITE, _LAID_OVER = (getattr(_keys, key, None) for key in ("CompositeImplicitAutograd", "AutogradCPU"))


def is_decomposed(op: Any) -> bool:
    """Whether a program that may hold the op is being decomposed."""
    return _LAID_OVER in op.py_kernels


def decompose_by(op: Any, decomposition: Callable[..., Any]) -> None:
    """Let `decomposition` be asked wherever torch looks for one of an op."""
    if _COMPOSITE is not None and _LAID_OVER is not None and hasattr(op, "py_impl"):
        op.py_impl(_COMPOSITE)(decomposition)
        op._can_decompose = lambda: is_decomposed(op)  # else torch.export warns that it keeps the op


def inductor_tables() -> tuple[dict[Any, Any], ...]:
    """What inductor takes apart, if it is imported."""
    inductor = sys.modules.get("torch._inductor.decomposition")
    return () if inductor is None else (inductor.decompositions, inductor.fast_random_decomps())


# Ops.

# Tells torch.compile that an op keeps to the rules, where it would find out.
_tag = fetch("torch.Tag", "pt2_compliant_tag", "nothing, torch.compile takes ops without it")
TAGS = () if _tag is None else (_tag,)

_supports_amx = fetch("torch.cpu", "_is_amx_tile_supported", "nothing, /proc/cpuinfo is read")


def is_amx_supported() -> bool:
    """Whether the CPU multiplies tiles of bfloat16."""
    return _flags_show_amx() if _supports_amx is None else _supports_amx()


def _flags_show_amx() -> bool:
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


# oneDNN's products on packed weights; backends/cpu/onednn.py tries them all before it relies on one.
_lost = "bfloat16 products run in C++ only, also where the CPU has AMX"
reorder_linear_weight, linear_pointwise, reorder_convolution_weight, convolution_pointwise, is_mkldnn_bf16_supported = (
    fetch("torch.ops.mkldnn", name, _lost)
    for name in (
        "_reorder_linear_weight",
        "_linear_pointwise",
        "_reorder_convolution_weight",
        "_convolution_pointwise",
        "_is_mkldnn_bf16_supported",
    )
)

# Python.


def is_set(variable: str) -> bool:
    """`variable in os.environ`, which raises and catches two errors to say no: as long as the choice of a backend."""
    environment: Any = os.environ
    try:
        return environment.encodekey(variable) in environment._data
    except AttributeError:  # another Python's, or somebody's own
        return variable in environment


# transformers.

_lost = "feed-forward layers and convolutions call it, and fuse none"
_activations = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}
# An activation's class -> its name as ops know it.
ACTIVATIONS: dict[type, str] = {
    fetch("transformers.activations", cls, _lost, type(cls, (Nothing,), {})): name for cls, name in _activations.items()
}


def _in_company(*modules: nn.Module) -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# Whether every process must run every layer, for one of two reasons.
_lost = "no distributed training drops layers"
is_deepspeed_zero3_enabled = fetch("transformers.integrations", "is_deepspeed_zero3_enabled", _lost, _in_company)
is_fsdp_managed_module = fetch("transformers.integrations", "is_fsdp_managed_module", _lost, _in_company)

# With this function transformers takes only -100 for padding: another negative CTC label would be a target.
_lost = "negative CTC labels other than -100 are not refused"
EVERY_NEGATIVE_CTC_LABEL_PADS = not TRANSFORMERS_5 or fetch("transformers.loss.loss_ctc", "ForCTCLoss", _lost) is None

# SpecAugment's spans; transformers 5 cannot mask features by itself, for want of a config entry.
_lost = "features are masked by transformers, which may fail"
compute_mask_indices = fetch(_WAVLM, "_compute_mask_indices", _lost)

# What can be recorded of a model, by its class; transformers 4 records nothing.
_lost = "accelerate and restore take a little longer"
_recordable = fetch("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY", _lost) if TRANSFORMERS_5 else None


def let_record(model: PreTrainedModel) -> None:
    """Tell transformers 5 what it can record of a model whose class is another one now."""
    if _recordable is not None:
        _recordable[model] = model.can_record_outputs
    elif TRANSFORMERS_5:  # does so itself for whatever is constructed
        PreTrainedModel.__init__(type(model).__new__(type(model)), copy.deepcopy(model.config))


_lost = "nothing, its formula is known"
_METHODS = {
    "frame_lengths": fetch(f"{_WAVLM}.WavLMPreTrainedModel", "_get_feat_extract_output_lengths", _lost),
    "tdnn_lengths": fetch(f"{_WAVLM}.WavLMForXVector", "_get_tdnn_output_lengths", _lost),
    "buckets": fetch(f"{_WAVLM}.WavLMAttention", "_relative_positions_bucket", _lost),
}


# The method of a model by which transformers makes a mask over frames of one over samples.
FRAME_MASK = "_get_feature_vector_attention_mask"
fetch(f"{_WAVLM}.WavLMPreTrainedModel", FRAME_MASK, "GPUs are waited for once where a mask is given")


def frame_lengths(model: Any, samples: Tensor, add_adapter: bool | None = None) -> Tensor:
    """How many frames a WavLM makes of so many samples."""
    if _METHODS["frame_lengths"] is not None:
        return model._get_feat_extract_output_lengths(samples, add_adapter=add_adapter)
    config = model.config
    convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
    if config.add_adapter if add_adapter is None else add_adapter:
        convolutions += [(1, config.adapter_stride)] * config.num_adapter_layers
    for kernel, stride in convolutions:
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples


def tdnn_lengths(model: Any, frames: Tensor) -> Tensor:
    """How many frames transformers takes the time-delay layers of a `WavLMForXVector` to leave, dilation ignored."""
    if _METHODS["tdnn_lengths"] is not None:
        return model._get_tdnn_output_lengths(frames)
    return frames - sum(kernel - 1 for kernel in model.config.tdnn_kernel)


def relative_positions_bucket(attention: Any, positions: Tensor) -> Tensor:
    """The rows of `rel_attn_embed` for distances in frames, int64."""
    if _METHODS["buckets"] is not None:
        return attention._relative_positions_bucket(positions)
    half = attention.num_buckets // 2
    exact = half // 2  # as many short distances have a bucket each; the others share, the more the longer they are
    distances = positions.abs()
    share = torch.log(distances.clamp(min=1).float() / exact) / math.log(attention.max_distance / exact)
    shared = (exact + share * (half - exact)).long().clamp(max=half - 1)
    return (positions > 0).long() * half + torch.where(distances < exact, distances, shared)


_lost = "checkpointing computes a frozen front end twice"
NAMES.append(Name(f"{_WAVLM}.WavLMFeatureEncoder", "_requires_grad", _lost, None))


def is_frozen(feature_encoder: nn.Module) -> bool:
    """Whether `freeze_feature_encoder` was called, which says more than that no parameter learns."""
    return not getattr(feature_encoder, "_requires_grad", True)
