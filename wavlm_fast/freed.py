"""Weights given up for their packed form: `accelerate(model, keep_originals=False)`.

A freed weight keeps its shape, dtype and place in the model; its values are gone, and only what was packed from it is
left. Whatever asks for the values is refused in one place: torch calls `FreedWeight.__torch_function__`. Below the
dispatcher torch does not; there `refuse` is the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ._private import reads_no_values

_T = Tensor
_PROPERTIES: tuple[Any, ...] = (
    _T.shape, _T.dtype, _T.device, _T.layout, _T.ndim, _T.itemsize, _T.is_cpu, _T.is_cuda, _T.is_meta, _T.is_sparse,
    _T.is_quantized, _T.is_nested, _T.requires_grad, _T.is_leaf, _T.grad, _T.grad_fn,
)  # fmt: skip
# What can be said without values.
_HARMLESS = {
    *(p.__get__ for p in _PROPERTIES), _T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.stride,
    _T.is_contiguous, _T.is_floating_point, _T.is_complex, _T.is_inference,
}  # fmt: skip
_CONVERSIONS = (_T.to, _T.cpu, _T.cuda, _T.float, _T.double, _T.half, _T.bfloat16)
_DATA: Any = _T.data
_NAMESPACES = ("wavlm_fast", "wavlm_fast_cpu")

if TYPE_CHECKING:
    _Mixin = nn.Module  # what MayBeFreed is mixed into
else:
    _Mixin = object
_Module = TypeVar("_Module", bound="MayBeFreed")


class FreedWeight(nn.Parameter):
    """A parameter without values."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.contiguous or (func in _CONVERSIONS and _stays(func, args, kwargs)):
            return args[0]
        # nn.Module.to sets what such a conversion gave, nn.Module.requires_grad_ what is so already.
        sets_itself = func == _DATA.__set__ and args[0] is args[1]
        unchanged = sets_itself or (func is Tensor.requires_grad_ and not _wants_gradient(*args, **kwargs))
        ours = getattr(func, "namespace", None) in _NAMESPACES
        if func in _HARMLESS or unchanged or ours or reads_no_values(func):
            return super().__torch_function__(func, types, args, kwargs)
        attribute = getattr(func, "__self__", None)  # a property's, whose function is but called __get__
        name = getattr(attribute, "__name__", None) or getattr(func, "__name__", str(func))
        refuse(str(name), (*args, *kwargs.values()))
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return f"FreedWeight({tuple(self.shape)}, {self.dtype})"


class MayBeFreed(_Mixin):
    """Mixed into every fast class: refuses before anything is changed, not when the first freed weight is met."""

    def train(self: _Module, mode: bool = True) -> _Module:
        """As torch's.

        Raises:
            RuntimeError: weights were freed by `accelerate(model, keep_originals=False)`.
        """
        if mode:
            refuse("train()", self.parameters())
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse("load_state_dict()", self.parameters())
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        for parameter in self.parameters():
            if type(parameter) is FreedWeight:
                fn(parameter)
        return super()._apply(fn, *args, **kwargs)


def free(parameter: Tensor) -> None:
    """Give up the values of a parameter in place: whoever holds it now holds a `FreedWeight`."""
    parameter.grad = None
    parameter.requires_grad_(False)
    # One element behind all, and not a number, should anything read it after all.
    parameter.data = torch.full((1,), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
    parameter.__class__ = FreedWeight


def contiguous(weight: Tensor) -> Tensor:
    """`weight.contiguous()`; a freed one as it is, also where torch does not ask `FreedWeight`: inside of an op."""
    return weight if type(weight) is FreedWeight else weight.contiguous()


def refuse(what: str, args: Iterable[Any]) -> None:
    """Raise RuntimeError if one of the arguments of `what`, alone or in a list, has no values."""
    for a in args:
        if type(a) is FreedWeight:
            raise RuntimeError(
                f"{what} needs the values of a weight {tuple(a.shape)}, which accelerate(model, keep_originals=False) "
                "has freed: what it left does inference without gradients on this device in this dtype; load the model "
                "again for anything else"
            )
        if isinstance(a, (list, tuple)):
            refuse(what, a)


def _wants_gradient(tensor: Tensor, requires_grad: bool = True) -> bool:
    """What `tensor.requires_grad_(...)` says."""
    return requires_grad


def _stays(conversion: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a conversion of `args[0]` would give its own dtype and device."""
    probe = conversion(torch.empty(0, dtype=args[0].dtype), *args[1:], **kwargs)
    return (probe.dtype, probe.device) == (args[0].dtype, args[0].device)
