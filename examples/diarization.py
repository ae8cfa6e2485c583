"""Diarization: who speaks when, from the frames of WavLMForAudioFrameClassification to RTTM.

    python examples/diarization.py meeting.wav call.wav --threshold 0.5 --min-duration 0.2 > hypothesis.rttm

Each label of the checkpoint is a speaker of the recording, and several may speak at once. A recording is run as a
whole, since which label is who holds within one call only: cut hours of audio, and match speakers by their x-vectors.
Needs a checkpoint of WavLMForAudioFrameClassification that was trained for diarization.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wavlm_fast import Extractor, audio


def segments(active: np.ndarray, frame: float, min_duration: float, min_gap: float) -> Iterator[tuple[float, float]]:
    """Begin and end, in seconds, of the runs of active frames.

    Args:
        active: `[T]` bool, one speaker's.
        frame: seconds from one frame to the next.
        min_duration: shorter segments are left out, once gaps are closed.
        min_gap: shorter silences are closed.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(int)))
    runs = [list(run) for run in edges.reshape(-1, 2)]  # frames
    for i in range(len(runs) - 1, 0, -1):
        if (runs[i][0] - runs[i - 1][1]) * frame < min_gap:
            runs[i - 1][1] = runs.pop(i)[1]
    return ((begin * frame, end * frame) for begin, end in runs if (end - begin) * frame >= min_duration)


def rttm(name: str, probabilities: np.ndarray, frame: float, args: argparse.Namespace) -> list[str]:
    """The lines of a recording, in the order in which segments begin."""
    found = []
    for speaker, active in enumerate((probabilities >= args.threshold).T):
        found += [(*segment, speaker) for segment in segments(active, frame, args.min_duration, args.min_gap)]
    line = "SPEAKER {} 1 {:.3f} {:.3f} <NA> <NA> speaker{} <NA> <NA>"
    return [line.format(name, begin, end - begin, speaker) for begin, end, speaker in sorted(found)]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="+", help="audio files")
    parser.add_argument("--model", default="microsoft/wavlm-base-plus-sd")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which on a speaker speaks")
    parser.add_argument("--min-duration", type=float, default=0.1, help="seconds of the shortest segment")
    parser.add_argument("--min-gap", type=float, default=0.1, help="seconds of the shortest silence within a speaker")
    args = parser.parse_args(words)

    extractor = Extractor(args.model, "frames")
    frame = math.prod(extractor.config.conv_stride) / audio.RATE  # seconds: 320 samples at 16 kHz, 20 ms
    failed = 0
    for path in args.recordings:
        try:
            logits = extractor({"path": [path]})["frames"][0]  # [T, speakers]
        except audio.AudioError as error:
            failed += 1
            print(error, file=sys.stderr)
            continue
        name = "_".join(Path(path).stem.split())  # fields of RTTM hold no spaces
        print("\n".join(rttm(name, 1 / (1 + np.exp(-logits)), frame, args)))
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
