"""A document as a run of the suite leaves it, with figures that nothing measured."""

import copy
import random

PEAKS = {"fp32": 200.0, "bf16": 400.0}
PROVIDERS = {
    "transformers fp32": ("transformers", "fp32"),
    "transformers bf16": ("transformers", "bf16"),
    "OpenVINO f32": ("OpenVINO", "fp32"),
    "wavlm_fast fp32": ("wavlm_fast", "fp32"),
    "wavlm_fast bf16": ("wavlm_fast", "bf16"),
}
CASES = {
    "base 1x10": ("latency", "WavLMModel", 1, 10.0),
    "base 8x10": ("throughput", "WavLMModel", 8, 10.0),
    "base 1x120": ("long", "WavLMModel", 1, 120.0),
    "xvector 1x10": ("classes", "WavLMForXVector", 1, 10.0),
    "base ragged 8x2-15": ("padded", "WavLMModel", 8, 15.0),
    "train 4x5": ("training", "WavLMModel", 4, 5.0),
    "length 1x3": ("length", "WavLMModel", 1, 3.0),
    "batch 2x5": ("batch", "WavLMModel", 2, 5.0),
    "op gated_attention 8x10": ("op", "", 8, 10.0),
}
LARGEST = {"conv features": 11.25, "embedding": 23.5, "layer 1": 37.75, "output": 49.0}


def document():
    """A whole one; every number in it is another."""
    return copy.deepcopy(_DOCUMENT)


def row(found, case, provider):
    return next(r for r in found["rows"] if (r["case"], r["provider"]) == (case, provider))


def only(*lists):
    """A document in which the other lists are empty."""
    names = ("rows", "layers", "stages", "memory", "corpus", "scaling")
    return {**document(), **{name: [] for name in names if name not in lists}}


def _timing(draw, median):
    return {"median": median, "p10": median * draw.uniform(0.9, 0.98), "p90": median * draw.uniform(1.02, 1.1),
            "rounds": draw.randint(5, 20)}  # fmt: skip


def _rows(draw):
    for case, (group, cls, batch, length) in CASES.items():
        for provider, (family, dtype) in PROVIDERS.items():
            ours, op = family == "wavlm_fast", group == "op"
            seconds = draw.uniform(0.002, 0.09) if op else draw.uniform(0.2, 9)
            gflop = draw.uniform(20, 900)
            unit = 1e-7 if dtype == "fp32" else 1e-3
            yield {
                "case": case, "group": group, "model": "base", "cls": cls, "batch": batch, "length": length,
                "provider": provider, "family": family, "dtype": dtype, "ours": ours,
                "audio": None if op else batch * length, "gflop": gflop,
                "error": draw.uniform(1, 9) * unit, "allowed": draw.uniform(10, 90) * unit,
                "problem": None, "wrong": False, "note": "",
                "seconds": _timing(draw, seconds), "factor": None if op else draw.uniform(5, 90),
                "gflops": draw.uniform(50, 400), "peak_gflops": PEAKS[dtype], "share": draw.uniform(0.2, 0.95),
                "ours_faster": None if ours else _timing(draw, draw.uniform(1.1, 6)),
            }  # fmt: skip


def _layers(draw):
    for provider, (_, dtype) in PROVIDERS.items():
        for layer, largest in LARGEST.items():
            scale = 1e-5 if dtype == "fp32" else 1e-1
            yield {"case": "base 1x10", "provider": provider, "dtype": dtype, "layer": layer, "largest": largest,
                   "error": draw.uniform(1, 9) * scale, "allowed": draw.uniform(10, 30) * scale}  # fmt: skip


def _stages(draw):
    for stage, ops in (("attention", "12 gated_attention"), ("qkv", "12 linear_act"), ("norms", "24 add_layer_norm"),
                       ("rest", ""), ("in one piece", "")):  # fmt: skip
        gflop = draw.uniform(5, 90) if stage in ("attention", "qkv", "in one piece") else None
        yield {"case": "base 1x10", "provider": "wavlm_fast fp32", "dtype": "fp32", "stage": stage, "ops": ops,
               "seconds": draw.uniform(0.05, 0.4), "gflop": gflop, "peak_gflops": PEAKS["fp32"]}  # fmt: skip


def _memory(draw):
    for provider in ("transformers", "wavlm_fast", "wavlm_fast, originals freed"):
        for audio in (10.0, 120.0):
            peak = draw.uniform(1e9, 9e9)
            yield {"provider": provider, "dtype": "fp32", "batch": 1, "audio": audio, "peak_bytes": peak,
                   "forward_bytes": peak * draw.uniform(0.3, 0.8), "problem": None}  # fmt: skip


def _corpus(draw):
    for provider in ("transformers fp32, one at a time", "wavlm_fast fp32, extract"):
        sizes = {name: draw.uniform(1e9, 9e9) for name in ("first_bytes", "last_bytes", "peak_bytes")}
        busy = draw.uniform(0.3, 1)
        yield {"case": "base corpus 3x1-20", "provider": provider, "dtype": "fp32", "busy": busy, **sizes}


def _scaling(draw):
    for along, quantity in (("length", "seconds"), ("length", "memory"), ("batch", "seconds")):
        for provider in ("transformers fp32", "wavlm_fast fp32", "wavlm_fast bf16"):
            unit = 1e9 if quantity == "memory" else 1
            points = [[x, x * draw.uniform(0.1, 0.9) * unit] for x in (1.0, 4.0, 16.0)]
            yield {"provider": provider, "dtype": provider[-4:], "along": along, "quantity": quantity, "points": points,
                   "exponent": draw.uniform(0.9, 2), "local": draw.uniform(1, 2.2)}  # fmt: skip


def _document(draw):
    return {
        "command": "wavlm-fast bench --json found.json", "date": "2026-05-04T03:02:01+00:00", "machine": "Made Up CPU",
        "device": "cpu", "features": ["AVX2", "FMA"], "threads": 3, "environment": {"OMP_NUM_THREADS": "3"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "openvino": None},
        "audio": "a clip of speech", "model": None, "absent": {"ONNX Runtime fp32": "onnxruntime not installed"},
        "peaks": {"fp32": 2.0e11, "bf16": 4.0e11, "how": "made up"}, "rows": list(_rows(draw)),
        "layers": list(_layers(draw)), "stages": list(_stages(draw)), "memory": list(_memory(draw)),
        "corpus": list(_corpus(draw)), "scaling": list(_scaling(draw)),
    }  # fmt: skip


_DOCUMENT = _document(random.Random(5))
