"""`wavlm-fast doctor`: what is installed, what this machine can do, and what will run where."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from . import _private, audio, backends, machine
from .console import console, print_table, table, write_json
from .kernels import _tuned

_FRAMES, _HEADS, _HEAD_DIM, _CHANNELS, _CONV = 49, 12, 64, 768, 512  # one second of WavLM-base


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
        "threads": cpu.threads(),
        "problem": cpu.extension.problem() or cpu.extension.isa_problem(),
    }


def _tuning() -> dict[str, Any]:
    """Where the tuned choices of Triton kernels lie, and how many there are for each device here."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    importable = machine.triton_problem() is None
    return {"file": str(_tuned.path()), "choices": {name: _tuned.count(name) for name in devices if importable}}


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
        for op, arguments in EXAMPLES.items():
            found.setdefault(op, {})[name] = _choose(op, arguments(torch.device(device), dtype))
    return found


def _choose(op: str, arguments: tuple) -> dict[str, Any]:
    try:
        choice = backends.choose(op, arguments)
    except backends.BackendUnavailable as error:
        return {"backend": "none", "reasons": [str(error)]}
    return {"backend": choice.backend, "reasons": [f"{name}: {reason}" for name, reason in choice.refused]}


class _Make:
    """Tensors of one device and dtype, without values: choosing reads none."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)


def _waveform_conv(new: _Make) -> tuple:
    return new(1, 16000), new(_CONV, 1, 10), None, 5, "group", new(_CONV), new(_CONV), 1e-5, "gelu"


def _strided_conv(new: _Make) -> tuple:
    return new(1, 199, _CONV), new(_CONV, _CONV, 3), None, 2, None, None, 1e-5, "gelu", False


def _positional_conv(new: _Make) -> tuple:
    x, weight = new(1, _FRAMES, _CHANNELS), new(_CHANNELS, _CHANNELS // 16, 128)
    return x, weight, new(_CHANNELS), 16, "gelu", True, False


def _linear_act(new: _Make) -> tuple:
    x, weight = new(1, _FRAMES, _CHANNELS), new(4 * _CHANNELS, _CHANNELS)
    return x, weight, new(4 * _CHANNELS), "gelu", False


def _add_layer_norm(new: _Make) -> tuple:
    return new(1, _FRAMES, _CHANNELS), new(1, _FRAMES, _CHANNELS), new(_CHANNELS), new(_CHANNELS), 1e-5, False


def _position_gate(new: _Make) -> tuple:
    return new(1, _FRAMES, _CHANNELS), new(8, _HEAD_DIM), new(8), new(_HEADS)


def _gated_attention(new: _Make) -> tuple:
    q, k, v = (new(1, _FRAMES, _HEADS, _HEAD_DIM) for _ in range(3))
    gate = new(1, _HEADS, _FRAMES, dtype=torch.float32)
    bias = new(_HEADS, 2 * _FRAMES - 1, dtype=torch.float32)
    return q, k, v, gate, bias, None, 0.0, None, _HEAD_DIM**-0.5


def _tdnn(new: _Make) -> tuple:
    return new(1, _FRAMES, _CONV), new(_CONV, 5 * _CONV), new(_CONV), 5, 1, "relu"


def _feature_encoder(new: _Make) -> tuple:
    weights, norm = [new(_CONV, 1, 10), new(_CONV, _CONV, 3)], [new(_CONV)]
    return new(1, 16000), weights, [], [5, 2], "group", norm, norm, 1e-5, "gelu"


def _encoder_layer(new: _Make) -> tuple:
    width, wide = new(_CHANNELS), new(4 * _CHANNELS)
    weights = [*(new(_CHANNELS, _CHANNELS) for _ in range(4)), new(4 * _CHANNELS, _CHANNELS)]
    weights.append(new(_CHANNELS, 4 * _CHANNELS))
    gate, norms = [new(8, _HEAD_DIM), new(8), new(_HEADS)], [width] * 4
    bias = new(_HEADS, 2 * _FRAMES - 1, dtype=torch.float32)
    x, biases = new(1, _FRAMES, _CHANNELS), [*[width] * 4, wide, width]
    return x, bias, None, weights, biases, gate, norms, [1e-5] * 2, _HEAD_DIM**-0.5, "gelu", False


def _stats_pool(new: _Make) -> tuple:
    return new(1, _FRAMES, 3 * 500), None


def _example(arguments: Callable[[_Make], tuple]) -> Callable[[torch.device, torch.dtype], tuple]:
    return lambda device, dtype: arguments(_Make(device, dtype))


# Op -> the arguments of its schema for one second of WavLM-base, given device and dtype.
EXAMPLES = {
    "feature_encoder": _example(_feature_encoder),
    "waveform_conv": _example(_waveform_conv),
    "strided_conv": _example(_strided_conv),
    "positional_conv": _example(_positional_conv),
    "linear_act": _example(_linear_act),
    "add_layer_norm": _example(_add_layer_norm),
    "position_gate": _example(_position_gate),
    "gated_attention": _example(_gated_attention),
    "encoder_layer": _example(_encoder_layer),
    "tdnn": _example(_tdnn),
    "stats_pool": _example(_stats_pool),
}


def _print(found: dict[str, Any]) -> None:
    out = console()

    def say(name: str, text: str) -> None:
        out.print(f"{name:<12} {text}", markup=False, soft_wrap=True)

    for package, version in found["versions"].items():
        say(package, version or "not installed")
    features = ", ".join(found["cpu"]["features"]) or "none that matter here"
    say("CPU", f"{found['cpu']['name']}: {features}")
    say("threads", ", ".join(f"{value} {name}" for name, value in found["threads"].items()))
    say("extension", _extension_line(found["extension"]))
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


def _extension_line(found: dict[str, Any]) -> str:
    if found["level"] is None:
        return f"none: {found['problem']}"
    build = found["build"]
    made = f"built by {build.get('compiler', 'an unknown compiler')} for torch {build.get('torch', '?')}"
    levels = f"instruction set {found['level']} of {', '.join(found['levels'])}"
    return f"{made}; {levels}" + (f"; {found['problem']}" if found["problem"] else "")


def _private_line(found: dict[str, Any]) -> str:
    told = "; ".join(found["missing"])
    return told or f"torch and transformers have all {found['names']} names that are used beside their documented API"


def _tuning_line(found: dict[str, Any]) -> str:
    told = [
        f"{count} for {name} in {found['file']}"
        if count
        else f"none for {name}: kernels run with their defaults, WAVLM_FAST_AUTOTUNE=1 searches"
        for name, count in found["choices"].items()
    ]
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
