"""`wavlm-fast doctor`: what is installed, what this machine can do, and what will run where."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from . import _private, audio, backends, machine, ops
from .backends.cpu import choices
from .console import console, print_table, table, write_json
from .kernels import _tuned  # type: ignore[attr-defined]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `wavlm-fast doctor`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="as JSON, to FILE or to standard output instead of the text",
    )


def run(args: argparse.Namespace) -> int:
    """Tell; 0 whatever is missing, since everything has a fallback."""
    found = examine()
    if args.json:
        write_json(args.json, found)
    if args.json != "-":
        _print(found)
    return 0


def examine() -> dict[str, Any]:
    """Everything that doctor knows, ready for JSON."""
    return {
        "versions": machine.versions(),
        "cpu": {"name": machine.cpu_name(), "features": machine.cpu_features()},
        "threads": machine.threads(),
        "extension": extension(),
        "choices": {"processor": choices.processor(), "torch": [row.reason for row in choices.here()]},
        "triton": {"problem": machine.triton_problem()},
        "private": {"names": len(_private.NAMES), "missing": list(_private.missing())},
        "tuning": _tuning(),
        "devices": machine.devices(),
        "why_no_device": None if machine.devices() else machine.why_no_device(),
        "audio": _audio(),
        "environment": machine.environment(),
        "backend": backends.current(),
        "backends": {name: {"problem": backends.load(name).why_not()} for name in backends.names()},
        "ops": _places(),
    }


def extension() -> dict[str, Any]:
    """The C++ extension: how it was built and which instruction set it uses, or why there is none."""
    cpu = backends.load("cpu")
    return {
        "build": cpu.build_record(),
        "level": cpu.isa(),
        "levels": cpu.isa_levels(),
        "reason": cpu.arithmetic(),
        "threads": cpu.threads(),
        "problem": cpu.extension.problem() or cpu.extension.isa_problem(),
    }


def _tuning() -> dict[str, Any]:
    """Where the tuned choices of Triton kernels lie, and how many there are for each device, found here or shipped."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if machine.triton_problem() is not None:
        devices = []
    return {
        "file": str(_tuned.path()),
        "choices": {name: _tuned.count(name) for name in devices},
        "shipped": {name: _tuned.count(name, _tuned.SHIPPED) for name in devices},
    }


def _audio() -> dict[str, Any]:
    try:
        _, info = audio.load(audio.clip())
    except audio.AudioError as error:
        return {"problem": str(error)}
    return {"problem": None, "clip": f"{info.seconds:.1f} s of speech, {info.format}"}


def _places() -> dict[str, dict[str, dict[str, Any]]]:
    """Op -> "cpu float32" and the like -> backend and the reasons against faster ones."""
    places = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        places += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for device, dtype in places:
        name = f"{device} {str(dtype).removeprefix('torch.')}"
        for op in ops.OPS:
            found.setdefault(op, {})[name] = _choose(op, example(op, dtype, device))
    return found


def example(op: str, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """The arguments of an op's schema where WavLM-base has most for it to do in one second of audio.

    Tensors have no values: choosing reads none.
    """
    known = ops.OPS[op]
    return known.for_schema(ops.empty(known.largest(ops.Sizes()), dtype, device))


def _choose(op: str, arguments: tuple) -> dict[str, Any]:
    try:
        choice = backends.choose(op, arguments)
    except backends.BackendUnavailable as error:
        return {"backend": "none", "reasons": [str(error)]}
    return {"backend": choice.backend, "reasons": [f"{name}: {reason}" for name, reason in choice.refused]}


def _print(found: dict[str, Any]) -> None:
    out = console()

    def say(name: str, text: str) -> None:
        out.print(f"{name:<12} {text}", markup=False, soft_wrap=True)

    for package, version in found["versions"].items():
        say(package, version or "not installed")
    features = ", ".join(found["cpu"]["features"]) or "none that matter here"
    say("CPU", f"{found['cpu']['name']}: {features}")
    say("threads", _threads_line(found["threads"]))
    say("extension", _extension_line(found["extension"]))
    say("choices", _choices_line(found["choices"]))
    say("Triton", found["triton"]["problem"] or "importable")
    say("private", _private_line(found["private"]))
    say("tuning", _tuning_line(found["tuning"]))
    say("devices", "; ".join(found["devices"]) or f"none: {found['why_no_device']}")
    say("audio", found["audio"]["problem"] or f"readable; the clip of the package is {found['audio']['clip']}")
    say(
        "environment", ", ".join(f"{k}={v}" for k, v in found["environment"].items()) or "nothing that steers us is set"
    )
    say("backend", f"{found['backend']!r} is asked for")
    for name, state in found["backends"].items():
        say("", f"{name}: {state['problem'] or 'usable'}")
    out.print()
    _print_places(out, found["ops"])


def _threads_line(found: dict[str, float]) -> str:
    told = ", ".join(f"{value:g} {name}" for name, value in found.items())
    quota = found.get(machine.QUOTA, math.inf)
    if found["torch threads"] <= max(1, quota):
        return told
    return f"{told}; threads beyond the quota stop all of them: OMP_NUM_THREADS={max(1, math.floor(quota))}"


def _extension_line(found: dict[str, Any]) -> str:
    if found["level"] is None:
        return f"none: {found['problem']}"
    build = found["build"]
    made = f"built by {build.get('compiler', 'an unknown compiler')} for torch {build.get('torch', '?')}"
    levels = f"instruction set {found['level']} of {', '.join(found['levels'])}"
    return "; ".join(filter(None, (made, levels, found["reason"], found["problem"])))


def _choices_line(found: dict[str, Any]) -> str:
    return "; ".join(found["torch"]) or f"nothing is known that torch's own ops train faster on {found['processor']}"


def _private_line(found: dict[str, Any]) -> str:
    told = "; ".join(found["missing"])
    return told or f"torch and transformers have all {found['names']} names that are used beside their documented API"


def _tuning_line(found: dict[str, Any]) -> str:
    told = []
    for name, count in found["choices"].items():
        shipped = found["shipped"][name]
        have = [f"{count} for {name} in {found['file']}"] if count else []
        have += [f"{shipped} for {name} that came with the package"] if shipped else []
        none = f"none for {name}: kernels run with their defaults, WAVLM_FAST_AUTOTUNE=1 searches"
        told.append(", ".join(have) or none)
    return "; ".join(told) or f"nothing to tune here; choices would lie in {found['file']}"


def _print_places(out: Any, ops: dict[str, dict[str, dict[str, Any]]]) -> None:
    names = list(next(iter(ops.values())))
    places = table("op", *names, text=1 + len(names))
    for op, chosen in ops.items():
        places.add_row(op, *(chosen[name]["backend"] for name in names))
    print_table(out, "What runs where", places)
    reasons: dict[str, list[str]] = {}
    for op, chosen in ops.items():
        for place in chosen.values():
            for reason in place["reasons"]:
                backend, _, sentence = reason.partition(": ")
                key = f"{backend}: {sentence.replace(op, 'this op')}"
                if op not in reasons.setdefault(key, []):
                    reasons[key].append(op)
    if reasons:
        out.print("[bold]Why not faster[/]")
    for reason, refused in reasons.items():
        out.print(f"- {reason} ({', '.join(refused)})", markup=False, soft_wrap=True)
