"""`wavlm-fast parity`: is everything here equal to transformers, on this machine?"""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import transformers

from .. import audio, backends, ops
from ..console import (
    add_truncated_argument,
    apply_threads,
    console,
    device_argument,
    positive_int,
    print_table,
    write_json,
)
from ..errors import UserError
from . import run_checkpoint, run_models, run_ops, table
from .cases import cases_of
from .mutation_check import self_test
from .rule import DTYPES, FAIL, SKIPPED, Result

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULT_DTYPES = ("float32", "bfloat16", "float16")
_QUICK_DTYPES = ("float32", "bfloat16")
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast parity`."""
    add = parser.add_argument
    add("audio", nargs="*", help="audio files for --model (default: the clip of speech that comes with the package)")
    add(
        "--model",
        metavar="PATH_OR_ID",
        help="compare this checkpoint, at every layer, in place of the ops and of small models",
    )
    add("--device", type=device_argument, help="cpu, cuda or cuda:N (default: cuda where torch sees one, else cpu)")
    add(
        "--dtype",
        type=_dtype_argument,
        action="append",
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)}; may be repeated (default: {', '.join(_DEFAULT_DTYPES)}, and float64 for the ops)",
    )
    add(
        "--backend",
        choices=("auto", *backends.names()),
        action="append",
        help="may be repeated (default: every backend, and auto where it mixes them)",
    )
    add("--filter", default="", metavar="TEXT", help="only ops, classes and cases with this in their name")
    add("--quick", action="store_true", help="a selection of cases and dtypes: seconds instead of minutes")
    add("--self-test", action="store_true", help="instead: make mistakes on purpose, and see that each is caught")
    add("--json", metavar="FILE", help="write every comparison to FILE, - for standard output")
    add_truncated_argument(parser)
    add("--threads", type=positive_int, metavar="N", help="torch's CPU threads (default: torch's own)")


def _dtype_argument(text: str) -> str:
    name = _ALIASES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"one of {', '.join(DTYPES)} is wanted, got {text!r}")
    return name


def run(args: argparse.Namespace) -> int:
    """Compare; 0 when all that was compared is within what is allowed, 1 when something is not or nothing was."""
    from rich.console import Console

    apply_threads(args.threads)
    # With JSON on standard output, the tables would be in its way.
    out = console() if args.json != "-" else Console(stderr=True, highlight=False)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    if args.self_test:
        return _run_self_test(args, out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_backends(args.backend or ())
    with out.status("comparing") if out.is_terminal else warnings.catch_warnings():
        results = list(_results(args, device, out))
    for level, title in (("op", "Ops"), ("model", "Models")):
        of_level = [r for r in results if r.level == level]
        if any(r.verdict != SKIPPED for r in of_level):
            print_table(out, f"{title} against float64 on {_describe(device)}", table.results_table(of_level))
    for line in table.skipped_lines(results) + table.failure_lines(results) + [table.summary(results)]:
        out.print(line, soft_wrap=True, markup=False)
    if args.json:
        write_json(args.json, {**_versions(device), "results": [r.as_dict() for r in results]})
    failed = any(r.verdict == FAIL for r in results)
    return int(failed or all(r.verdict == SKIPPED for r in results))


def _run_self_test(args: argparse.Namespace, out: Console) -> int:
    verdicts = list(self_test(args.filter))
    print_table(out, "Mistakes made on purpose", table.self_test_table(verdicts))
    unnoticed = sum(not v.caught for v in verdicts)
    out.print(f"{len(verdicts)} mistakes made on purpose, {unnoticed} unnoticed")
    if args.json:
        write_json(args.json, {**_versions(torch.device("cpu")), "mutations": [v.as_dict() for v in verdicts]})
    return int(unnoticed > 0 or not verdicts)


def _check_backends(wanted: Sequence[str]) -> None:
    for name in wanted:
        reason = None if name == "auto" else backends.load(name).why_not()
        if reason is not None:
            raise UserError(f"the {name} backend cannot be used here: {reason}")


def _results(args: argparse.Namespace, device: torch.device, out: Console) -> Iterator[Result]:
    dtypes = [DTYPES[name] for name in args.dtype or (_QUICK_DTYPES if args.quick else _DEFAULT_DTYPES)]
    wanted = args.backend or list(backends.names())
    with_auto = wanted if args.backend else [*wanted, "auto"]
    if args.model or args.audio:
        heard = [audio.load(path, at_least=1, allow_truncated=args.allow_truncated)[1] for path in args.audio]
        for info in heard:
            if info.incomplete:
                out.print(str(info), markup=False, soft_wrap=True)
        yield from run_checkpoint.results(args.model, args.audio, with_auto, dtypes, device, args.allow_truncated)
        return
    of_ops = dtypes if args.dtype or args.quick else [*dtypes, torch.float64]
    yield from op_results(with_auto, of_ops, device, args.quick, args.filter)
    yield from model_results(with_auto, dtypes, device, args.quick, args.filter)


def op_results(
    wanted: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device, quick: bool = False, chosen: str = ""
) -> Iterator[Result]:
    """Every op, forward and gradients, on each backend in each dtype.

    Args:
        wanted: backends. "auto" is tried where it mixes them: a forward pass on one and its gradient on another.
        dtypes: float64 is tried on the reference only, whose oracle's dtype it is.
        device: where the ops run; the truth is computed on the CPU.
        quick: only a selection of the cases.
        chosen: only cases with this in "op case".
    """
    for op in ops.OPS:
        for backend in wanted:
            if backend == "auto" and len(wanted) > 1 and not run_ops.mixes(op, device):
                continue
            for dtype in dtypes:
                if dtype == torch.float64 and backend != "reference":
                    continue
                for case in cases_of(op, quick):
                    if chosen in f"{case.op} {case.name}":
                        yield from run_ops.run_case(case, backend, dtype, device)


def model_results(
    wanted: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device, quick: bool = False, chosen: str = ""
) -> Iterator[Result]:
    """Every model class, norm form and kind of input on each backend in each dtype.

    Args:
        wanted: backends. "auto" is tried where it differs: where a backend beside the reference has kernels.
        dtypes, device, quick, chosen: as for `op_results`.
    """
    only_reference = not any(run_models.absence(b, device) is None for b in backends.names() if b != "reference")
    for case in run_models.cases(quick):
        if chosen not in f"{case.model} {case.name}":
            continue
        for backend in wanted:
            if backend == "auto" and only_reference and len(wanted) > 1:
                continue
            for dtype in dtypes:
                yield from run_models.run_case(case, backend, dtype, device)


def _describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device} ({name}), torch {torch.__version__}, transformers {transformers.__version__}"


def _versions(device: torch.device) -> dict[str, str]:
    return {"device": _describe(device), "torch": torch.__version__, "transformers": transformers.__version__}
