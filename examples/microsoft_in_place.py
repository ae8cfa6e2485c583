"""Microsoft's own WavLM class, made fast in place: a .pt checkpoint, the same features before and after.

    python examples/microsoft_in_place.py WavLM-Base+.pt --code unilm/wavlm/WavLM.py --audio speech.wav --layer 6

--code is your copy of Microsoft's WavLM.py, with the files it imports beside it. Without, it is the package's class of
the same constructor, parameter names and `extract_features`. Whatever holds such a model (an upstream of s3prl, a voice
converter) becomes fast by the same line. Ends with status 1 where features are not the same to rounding.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import wavlm_fast
from wavlm_fast import audio


def imported(code: Path | None) -> ModuleType:
    """The module with `WavLM` and `WavLMConfig`."""
    if code is None:
        return importlib.import_module("wavlm_fast.original")
    sys.path.insert(0, str(code.resolve().parent))  # it imports its neighbours by their bare names
    return importlib.import_module(code.stem)


@torch.inference_mode()
def features_of(model: nn.Module, waveform: Tensor, layer: int | None) -> tuple[Tensor, float]:
    """Features `[T, C]`, and the seconds that a second call takes."""
    model.extract_features(waveform, output_layer=layer)
    start = time.perf_counter()
    features = model.extract_features(waveform, output_layer=layer)[0][0]
    return features, time.perf_counter() - start


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a .pt file as Microsoft publishes it, with 'cfg' and 'model'")
    parser.add_argument("--code", type=Path, help="your copy of WavLM.py")
    parser.add_argument("--audio", default=audio.clip(), help="a recording (the package's clip)")
    parser.add_argument("--layer", type=int, help="the layer whose output is wanted (the last)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative to the largest feature")
    args = parser.parse_args(words)

    code = imported(args.code)
    checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)  # runs no code of the file's
    model = code.WavLM(code.WavLMConfig(checkpoint["cfg"])).eval()
    model.load_state_dict(checkpoint["model"])
    wavlm_fast.restore(model)  # the package's class is fast from the start; your copy stays as it is
    waveform, info = audio.load(args.audio)
    if model.cfg.normalize:
        waveform = nn.functional.layer_norm(waveform, waveform.shape)

    before, slow = features_of(model, waveform[None], args.layer)
    wavlm_fast.accelerate(model)
    after, fast = features_of(model, waveform[None], args.layer)
    error = float((after - before).abs().max() / before.abs().max())
    print(f"{info}\nfeatures of {list(after.shape)}: {slow:.3f} s before, {fast:.3f} s after")
    print(f"largest difference: {error:.1e} of the largest feature")
    print(wavlm_fast.report(model))
    if not error <= args.tolerance:
        print(f"the same features to {args.tolerance:g} are wanted, got a difference of {error:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
