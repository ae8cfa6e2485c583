"""A forward on a GPU that is not there: fake tensors on "cuda", and whatever would wait for the device is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wavlm_fast.backends.reference import TABLE as REFERENCE

aten = torch.ops.aten
LIBRARY = Path(torch.__file__).parent / "lib/libc10.so"
# The host needs to know a value, or how many there are.
WAITS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_static, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.argwhere,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Waits(AssertionError):
    """The host would wait for the device, or copy memory that a graph's capture refuses."""


class DeviceOnly(TorchDispatchMode):
    """Refuses what waits for the device, and runs the ops of wavlm_fast as the Triton backend does."""

    def __init__(self, kernels: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.kernels = kernels or {}
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "wavlm_fast":
            name = func.overloadpacket.__name__
            implementation = self.kernels.get(name) or REFERENCE[name]
            self.ran.add(name)
            with self:
                return implementation.fn(*args)
        packet = func.overloadpacket
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        on_device = any(a.device.type == "cuda" for a in given)
        if packet in WAITS and on_device:
            raise Waits(f"{func} waits for the device")
        if packet is aten.repeat_interleave and "Tensor" in func._overloadname and on_device:
            raise Waits(f"{func} waits for the device")
        if packet in INDEXING:
            _check_indexing(func, args)
        found = func(*args, **kwargs)
        if func in (aten.copy_.default, aten._to_copy.default):
            target = args[0] if func is aten.copy_.default else found
            source = args[1] if func is aten.copy_.default else args[0]
            if {target.device.type, source.device.type} == {"cuda", "cpu"}:
                raise Waits(f"{func} copies from {source.device} to {target.device}")
        return found


def _check_indexing(func: Any, args: tuple) -> None:
    indices = [i for i in args[1] if i is not None]
    if args[0].device.type != "cuda":
        return
    put = func.overloadpacket not in (aten.index, aten._unsafe_index)
    scalar = put and args[2].device.type == "cpu" and args[2].numel() == 1
    accumulates = put and len(args) > 3 and args[3]
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
        # A number written through a mask becomes masked_fill_ (canDispatchToMaskedFill of TensorAdvancedIndexing.cpp).
        if not scalar or accumulates:
            raise Waits(f"{func} with a mask waits for the device: it counts the entries")
    elif scalar:
        raise Waits(f"{func} copies the number that it writes to the device")


@contextmanager
def _any_device_is_current() -> Iterator[None]:
    """Let torch's own methods make a CUDA device the current one where there is none.

    They ask a registry by device type, which a torch without CUDA leaves empty; that of the CPU does nothing.
    """
    registry = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(LIBRARY)), "_ZN3c104impl26device_guard_impl_registryE")
    before = registry[1]
    registry[1] = registry[0]
    try:
        yield
    finally:
        registry[1] = before


@contextmanager
def no_gpu_needed(kernels: dict[str, Any] | None = None) -> Iterator[DeviceOnly]:
    """Make tensors on "cuda" without memory inside, and refuse what waits for the device."""
    mode = DeviceOnly(kernels)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        stack.enter_context(_any_device_is_current())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(mode)
        yield mode


def to_device(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Put fake parameters and buffers on "cuda" in place of a model's own; call inside of `no_gpu_needed`."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cuda")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model
