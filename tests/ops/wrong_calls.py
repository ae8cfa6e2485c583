"""A fuzzer of wrong calls, to run in a process of its own: `python tests/ops/wrong_calls.py FIRST LAST REPORT`.

Each seed takes a call that is right (some_calls.py), changes some of its arguments, and makes it: through
`torch.ops.wavlm_fast.*` once under "auto" and once on the reference, which must agree on whether it is a call at all;
through `torch.ops.wavlm_fast_cpu.*`, which must come back. REPORT gets the seed before the call is made, so that a
crash is known by its last line, and findings as they come.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import warnings
from pathlib import Path

import torch
from some_calls import NATIVE, OPS, Draw, any_call, any_native_call

from wavlm_fast import use_backend
from wavlm_fast.backends.reference import TABLE as REFERENCE

MEMORY = 1 << 30  # what a call may take beyond what the process has
SECONDS = 20
INTEGERS = (0, -1, 1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300)
STRINGS = ("", "none", "gelu", "relu", "group", "layer", "swish")
DTYPES = (torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64)


def leaves(args: list, at: tuple = ()) -> list[tuple]:
    """Where the arguments are, lists and what is in them."""
    found = []
    for i, a in enumerate(args):
        found.append((*at, i))
        if isinstance(a, list):
            found += leaves(a, (*at, i))
    return found


def changed(args: list, where: tuple, draw: Draw) -> list:
    """A copy of the arguments with another one at `where`."""
    first, *rest = where
    copy = list(args)
    copy[first] = changed(args[first], tuple(rest), draw) if rest else mutated(args[first], draw)
    return copy


def mutated(value: object, draw: Draw) -> object:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.int32 and value.layout == torch.strided and draw.one(True, False):
            return _other_offsets(value, draw)
        untouched = value.layout != torch.strided or value.numel() > 10**6  # changed before
        return value if untouched else draw.one(*TENSORS)(value, draw)
    if value is None:
        return draw.tensor(*(draw.size(9) for _ in range(draw.size(3))))
    if isinstance(value, list):
        return draw.one(value[:-1], value + value[-1:], [], value[::-1], value * 100)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.one(*INTEGERS, value + 1, value - 1)
    return draw.one(*(FLOATS if isinstance(value, float) else STRINGS))


def _resized(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    sizes = list(x.shape) or [1]
    at = draw.random.randrange(len(sizes))
    sizes[at] = draw.one(0, 0, 1, sizes[at] + 1, max(sizes[at] - 1, 0), 2 * sizes[at], 200)
    return draw.tensor(*sizes).to(x.dtype)


def _stretched(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """More of one element, without memory."""
    sizes = list(x.shape)
    if not sizes or x.numel() == 0:
        return x.new_zeros(1).expand(2**40)
    at = draw.random.randrange(len(sizes))
    sizes[at] = draw.one(sizes[at], sizes[at], 5000, 2**31, 2**40, 2**60)
    one = x.narrow(at, 0, 1)
    return one.expand(sizes) if sizes[at] * max(x.numel() // x.shape[at], 1) < 2**62 else one


def _other_rank(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    if not x.dim():
        return x[None]
    return draw.one(x.flatten(), x[None], x[..., None], x[:0], x[0] if len(x) else x)


def _transposed(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    return x.transpose(draw.random.randrange(x.dim()), draw.random.randrange(x.dim())) if x.dim() else x


def _filled(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    # Out of range as lengths, seeds and numbers.
    value = draw.one(0, -1, 5, 10**6, 2**62, -(2**62))
    return torch.full_like(x, bool(value) if x.dtype == torch.bool else value)


def _other_offsets(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Boundaries elsewhere: one moved, the last one, the first one, all; none; out of order."""
    if x.device.type == "meta" or x.numel() == 0 or x.numel() > 10**6:
        return x.new_zeros(2)
    x = x.clone()
    at = draw.one(0, -1, draw.random.randrange(x.numel()))
    x.view(-1)[at] = draw.one(*(n for n in INTEGERS if abs(n) < 2**31), int(x.view(-1)[at]) + draw.one(-1, 1))
    return draw.one(x, x, x, x + 1, x.flip(0), x[:1], x[:0], torch.zeros_like(x)) if x.dim() else x


TENSORS = (
    _resized, _resized, _stretched, _other_rank, _transposed, _filled,
    lambda x, draw: x.to(draw.one(*DTYPES)),
    lambda x, draw: x.to("meta"),
    lambda x, draw: draw.one(x.to_sparse(), x.to_mkldnn()) if x.dtype == torch.float32 and x.dim() > 1 else x,
    lambda x, draw: torch._neg_view(x) if x.dtype.is_floating_point else x,
    lambda x, draw: None,
)  # fmt: skip


def attempt(run, args: list) -> tuple[str, list]:
    """What came of a call: "memory", an error's type, or "ran" with shapes and dtypes of the outputs."""
    signal.alarm(SECONDS)
    try:
        outputs = run(*args)
    except Exception as error:
        memory = isinstance(error, MemoryError) or "allocate" in str(error) or "bad_alloc" in str(error)
        return ("memory" if memory else type(error).__name__), [str(error).splitlines()[:1]]
    finally:
        signal.alarm(0)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return "ran", [(list(o.shape), str(o.dtype)) for o in outputs if isinstance(o, torch.Tensor)]


def mutant(seed: int) -> tuple[str, bool, list]:
    """Name, whether it is one of csrc/'s own, and arguments of the wrong call with this number."""
    draw = Draw(seed, torch.bfloat16 if seed % 5 == 0 else torch.float32)
    native = draw.random.random() < 0.5
    name = draw.one(*(NATIVE if native else OPS))
    args = (any_native_call if native else any_call)(name, seed, draw.dtype)
    for _ in range(draw.one(1, 1, 1, 2, 3)):
        args = changed(args, draw.one(*leaves(args)), draw)
    return name, native, args


def described(args: object) -> object:
    if isinstance(args, torch.Tensor):
        layout = list(args.stride()) if args.layout == torch.strided else str(args.layout)
        return f"{args.dtype} {list(args.shape)} {layout} {args.device}{' negated' * args.is_neg()}"
    return [described(a) for a in args] if isinstance(args, list) else repr(args)


def difference(name: str, args: list) -> str | None:
    """How the op differs from its reference on a call that is wrong, or may be."""
    op = getattr(torch.ops.wavlm_fast, name)
    found, details = attempt(op, args)
    with use_backend("reference"):
        wanted, wanted_details = attempt(op, args)
    if "memory" in (found, wanted):
        return None
    if (found == "ran") != (wanted == "ran") or (found == "ran" and details != wanted_details):
        return f"{found} {details}, the reference: {wanted} {wanted_details}"
    return None


def main(first: int, last: int, report: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    assert set(OPS) == set(REFERENCE)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    with Path(report).open("w", buffering=1) as out:
        for seed in range(first, last):
            try:
                name, native, args = mutant(seed)
            except RuntimeError:  # torch does not make such a tensor of that one
                continue
            out.write(json.dumps({"seed": seed, "op": f"{'native ' * native}{name}", "args": described(args)}) + "\n")
            if native:
                attempt(getattr(torch.ops.wavlm_fast_cpu, name), args)
            elif (problem := difference(name, args)) is not None:
                out.write(json.dumps({"finding": problem}) + "\n")
        out.write(json.dumps({"done": last - first}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
