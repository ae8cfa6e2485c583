"""Voice conversion: layer-6 features of a folder of recordings as kNN-VC makes them, a file for each recording.

    python examples/voice_conversion_features.py corpus/ feats/ --model microsoft/wavlm-large --layer 6

feats/ becomes a tree as corpus/ is, of .pt files with a tensor `[T, C]` each, a frame every 20 ms. Waveforms are not
normalised, and zeros behind them fill the last frame. Layers behind the sixth are neither loaded nor run. What is there
already is not made again. Broken recordings are named on standard error, and the rest goes on.
`wavlm-fast extract corpus/ --layer 6 --convention knn-vc --format pt --out feats/` does this for large corpora.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from wavlm_fast import Extractor, audio

ENDINGS = {".wav", ".flac", ".ogg", ".mp3", ".opus"}


def save(features: torch.Tensor, path: Path) -> None:
    """Write a file that has its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save(features, part)
    os.replace(part, path)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder of audio files, at any depth")
    parser.add_argument("out", type=Path, help="the folder for features")
    parser.add_argument("--model", default="microsoft/wavlm-large")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--half", action="store_true", help="write float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--files", type=int, default=16, help="how many are in memory at a time")
    args = parser.parse_args(words)

    paths = sorted(path for path in args.corpus.rglob("*") if path.suffix.lower() in ENDINGS)
    wanted = {path: args.out / path.relative_to(args.corpus).with_suffix(".pt") for path in paths}
    if len(set(wanted.values())) < len(wanted):
        raise SystemExit(f"{args.corpus}: names that differ in more than their ending are wanted, got some that do not")
    missing = [path for path in paths if not wanted[path].exists()]
    extractor = Extractor(
        args.model,
        layers=args.layer,
        convention="knn-vc",
        dtype_out=torch.float16 if args.half else None,
        device=args.device,
    )
    failed = 0
    for start in range(0, len(missing), args.files):
        waveforms = {}
        for path in missing[start : start + args.files]:
            try:
                waveforms[path] = audio.load(path, at_least=extractor.samples_needed)[0]
            except audio.AudioError as error:
                failed += 1
                print(error, file=sys.stderr)
        for path, features in zip(waveforms, extractor.outputs(list(waveforms.values())), strict=True):
            if isinstance(features, Exception):
                failed += 1
                print(f"{path}: {features}", file=sys.stderr)
            else:
                save(features.clone(), wanted[path])
    print(f"{len(missing) - failed} made, {len(paths) - len(missing)} there already, {failed} broken, in {args.out}")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
