"""Runs the cases of the ops on the backends and judges them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops
from . import definitions, plain
from .cases import Case
from .rule import FAIL, PASS, Result, allowed_error, dtype_name, error_of, magnitude, poisoned, ratio, rms


def _by_position(op: ops.Op, *args: Any) -> Any:
    return op.run(**dict(zip(op.arguments, args, strict=False)))


# Op name -> the public function, on the arguments that a case arranges.
FRONTS: dict[str, Callable[..., Any]] = {name: partial(_by_position, op) for name, op in ops.OPS.items()}
# The front draws a seed of its own and keeps the log-sum-exp to itself; both matter here.
FRONTS["gated_attention"] = torch.ops.wavlm_fast.gated_attention

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """Truth and allowance for one case in one dtype."""

    outputs: Named
    gradients: Named
    allowed_outputs: dict[str, float]
    allowed_gradients: dict[str, float]


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def rounded(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs as the dtype holds them, on the CPU."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: value.to(wide if name in case.wide else dtype) if _is_leaf(value) else value
        for name, value in case.leaves().items()
    }


def evaluate(
    case: Case, function: Callable[..., Any], leaves: dict[str, Any], upstream: list[Tensor] | None
) -> tuple[Named, Named]:
    """Outputs, and gradients with respect to every floating leaf when `upstream` gradients are given."""
    track = upstream is not None
    leaves = {k: v.detach().clone().requires_grad_(track) if _is_leaf(v) else v for k, v in leaves.items()}
    outputs = function(*case.arrange(leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip(ops.OPS[case.op].outputs, outputs, strict=True))
    if upstream is None:
        return named, {}
    wanted = {k: v for k, v in leaves.items() if _is_leaf(v)}
    flowing = [outputs[i] for i in case.upstream]
    grads = [g.to(o.device, o.dtype) for g, o in zip(upstream, flowing, strict=True)]
    found = torch.autograd.grad(flowing, list(wanted.values()), grads, allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return named, {f"d{k}": torch.zeros_like(v) if g is None else g for (k, v), g in pairs}


def upstream_of(case: Case, outputs: Named, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [list(outputs.values())[i].shape for i in case.upstream]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def moved(leaves: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in leaves.items()}


@cache
def expected(case: Case, dtype: torch.dtype, device: torch.device) -> Expected:
    """Truth in float64 on the CPU, and what the plain path on the device leaves as allowance."""
    return expect(case, dtype, device, definitions.TABLE[case.op], torch.device("cpu"))


def expect(
    case: Case, dtype: torch.dtype, device: torch.device, meaning: Callable[..., Any], where: torch.device
) -> Expected:
    """Truth as `meaning` computes it in float64 on the device `where`, and what the plain path on `device` leaves as
    allowance; all on the CPU."""
    leaves = rounded(case, dtype)
    exact = {k: v.double() if _is_leaf(v) else v for k, v in leaves.items()}
    there = moved(exact, where)
    truth, gradients = evaluate(case, meaning, there, None)
    upstream = upstream_of(case, truth, dtype) if case.differentiate else None
    if upstream is not None:
        truth, gradients = evaluate(case, meaning, there, [g.double() for g in upstream])
    truth, gradients = ({k: v.detach().cpu() for k, v in found.items()} for found in (truth, gradients))
    usual, usual_gradients = evaluate(case, plain.TABLE[case.op], moved(leaves, device), upstream)
    allowed = {k: allowed_error(usual[k], t, dtype) for k, t in truth.items()}
    allowed_gradients = {
        k: allowed_error(usual_gradients[k], t, dtype, _natural(case, truth, upstream, exact[k[1:]], t, dtype))
        for k, t in gradients.items()
    }
    return Expected(truth, gradients, allowed, allowed_gradients)


def _natural(
    case: Case, truth: Named, upstream: list[Tensor], leaf: Tensor, gradient: Tensor, dtype: torch.dtype
) -> float:
    """The magnitude whose rounding a gradient carries; at least that of a gradient in which nothing cancels: what the
    outputs' share in the loss warrants for this input.

    With one frame the gradients of scores are exactly zero, as differences of equal numbers: their rounding errors are
    those of the numbers, not of the difference. Attention weights recomputed from a saved log-sum-exp carry the
    rounding of that number, which is so much larger than theirs as it is larger than one.
    """
    size, level = magnitude(gradient), rms(leaf)
    if level and leaf.numel():
        outputs = [list(truth.values())[i] for i in case.upstream]
        share = max(rms(o) * rms(g) * o.numel() ** 0.5 for o, g in zip(outputs, upstream, strict=True))
        size = max(size, share / (level * leaf.numel() ** 0.5))
    if "lse" in truth and dtype in (torch.float32, torch.float64):
        size *= max(1.0, magnitude(truth["lse"]) / 4)
    return size


def mixes(op: str, device: torch.device) -> bool:
    """Whether a forward pass of `op` on the fastest backend and its gradient may run on different backends."""
    return any(
        (op in backends.load(name).TABLE) != (f"{op}_backward" in backends.load(name).TABLE)
        and backends.load(name).why_not(device) is None
        for name in backends.names()
    )


def absence(backend: str, op: str, device: torch.device) -> str | None:
    """Why a backend has nothing to try for an op, forward or backward; None when it has."""
    if backend == "auto":
        return None
    module = backends.load(backend)
    reason = module.why_not(device) or module.why_not()
    if reason is None and op not in module.TABLE and f"{op}_backward" not in module.TABLE:
        return f"the {backend} backend has no kernel for {op}"
    return reason


def run_case(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """The forward and the gradient of a case on one backend, twice: as it is, and with fresh memory poisoned."""
    table = backends.load("reference" if backend == "auto" else backend).TABLE
    base = {"level": "op", "name": case.op, "backend": backend, "dtype": dtype_name(dtype), "case": case.name}
    quantities = ("forward", "gradient") if case.differentiate else ("forward",)
    reason = absence(backend, case.op, device)
    if reason is None:
        try:
            want = expected(case, dtype, device)
        except RuntimeError as error:
            reason = f"the plain path does not run in {dtype}: {error}"
    if reason is not None:
        yield from (Result(quantity=q, reason=reason, **base) for q in quantities)
        return
    for quantity in quantities:
        op = case.op if quantity == "forward" else f"{case.op}_backward"
        if op not in table:
            yield Result(quantity=quantity, reason=f"the {backend} backend has no kernel for {op}", **base)
            continue
        yield _judge(case, backend, dtype, device, quantity, want, base)


def _judge(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, quantity: str, want: Expected, base: dict
) -> Result:
    upstream = upstream_of(case, want.outputs, dtype) if quantity == "gradient" else None
    truth = want.outputs if upstream is None else want.gradients
    allowed = want.allowed_outputs if upstream is None else want.allowed_gradients
    worst = ("", 0.0, 0.0)
    try:
        for run in (_as_it_is, _poisoned):
            outputs, gradients = run(case, backend, moved(rounded(case, dtype), device), upstream)
            _check_contract(case.op, outputs, dtype)
            found = outputs if upstream is None else gradients
            errors = [(k, error_of(found[k], t), allowed[k]) for k, t in truth.items()]
            worst = max(worst, *errors, key=lambda e: ratio(e[1], e[2]))
    except backends.BackendUnavailable as refusal:
        return Result(quantity=quantity, reason=str(refusal), **base)
    except Exception as error:
        # A harness reports what a kernel does wrong, whatever it is, and goes on with the next.
        reason = f"{type(error).__name__}: {error}"
        return Result(quantity=quantity, verdict=FAIL, reason=reason, **base)
    tensor, error, most = worst
    verdict = PASS if error <= most else FAIL
    return Result(quantity=quantity, tensor=tensor, error=error, allowed=most, verdict=verdict, **base)


def _check_contract(op: str, outputs: Named, dtype: torch.dtype) -> None:
    """Outputs are contiguous, and of the dtype of the inputs, but for gates and log-sum-exps."""
    for name, x in outputs.items():
        wide = op == "position_gate" or name == "lse"
        wanted = torch.promote_types(dtype, torch.float32) if wide else dtype
        if x.dtype != wanted:
            raise TypeError(f"{name} is {x.dtype} where the contract of {op} says {wanted}")
        if not x.is_contiguous():
            raise ValueError(f"{name} is not contiguous: shape {list(x.shape)}, strides {x.stride()}")


def _as_it_is(case: Case, backend: str, leaves: dict[str, Any], upstream: list[Tensor] | None) -> tuple[Named, Named]:
    with backends.use_backend(backend):
        return evaluate(case, FRONTS[case.op], leaves, upstream)


def _poisoned(case: Case, backend: str, leaves: dict[str, Any], upstream: list[Tensor] | None) -> tuple[Named, Named]:
    with poisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operators without a deterministic form
        return _as_it_is(case, backend, leaves, upstream)
