"""Speaker verification: pairs of recordings to x-vectors, cosines, an equal error rate and a plot of errors.

    python examples/speaker_verification.py trials.txt --root corpus/ --plot errors.png --scores scores.txt

A line of trials.txt is a label and two recordings, as VoxCeleb has them: `1 a.wav b.wav` is one speaker, `0` are two.
Every recording is embedded once, in exact batches: its x-vector is that of the recording alone. Accepted is a cosine
at or above the threshold. Needs a checkpoint of WavLMForXVector, and matplotlib for the plot.
"""

import argparse
from pathlib import Path

import numpy as np

from wavlm_fast import Extractor


def read_trials(path: str) -> list[list[str]]:
    """Label, first and second recording of every pair."""
    trials = [line.split() for line in Path(path).read_text().splitlines() if line.strip()]
    for words in trials:
        if len(words) != 3 or words[0] not in ("0", "1"):
            raise SystemExit(f"{path}: lines of '0' or '1' and two recordings are wanted, got {' '.join(words)!r}")
    if len({words[0] for words in trials}) != 2:
        raise SystemExit(f"{path}: pairs of one speaker and pairs of two are wanted, got only one kind")
    return trials


def errors(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds, and at each the share of pairs of two that are accepted and of pairs of one that are refused."""
    thresholds = np.append(np.unique(scores), np.nextafter(scores.max(), np.inf))
    accepted = len(scores[~same]) - np.searchsorted(np.sort(scores[~same]), thresholds)
    refused = np.searchsorted(np.sort(scores[same]), thresholds)
    return thresholds, accepted / (~same).sum(), refused / same.sum()


def plot(path: str, thresholds: np.ndarray, accepted: np.ndarray, refused: np.ndarray, best: int) -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.step(thresholds, 100 * accepted, label="two speakers accepted")
    axes.step(thresholds, 100 * refused, label="one speaker refused")
    axes.axvline(thresholds[best], color="grey", linestyle=":", label=f"equal at {thresholds[best]:.3f}")
    axes.set(xlabel="threshold on the cosine", ylabel="errors in %")
    axes.legend()
    axes.figure.savefig(path)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", help="lines of a label and two recordings")
    parser.add_argument("--root", default=".", help="the folder that recordings are relative to")
    parser.add_argument("--model", default="microsoft/wavlm-base-plus-sv")
    parser.add_argument("--plot", help="where to write the plot (png, svg, pdf)")
    parser.add_argument("--scores", help="where to write a line of score, label and recordings for each pair")
    args = parser.parse_args(words)

    trials = read_trials(args.trials)
    names = sorted({name for _, *pair in trials for name in pair})
    embed = Extractor(args.model, "xvector")
    vectors = {}
    for start in range(0, len(names), 64):  # so many recordings are in memory at a time
        some = names[start : start + 64]
        found = embed({"path": [Path(args.root, name) for name in some]})["xvector"]  # [recordings, C]
        vectors.update(zip(some, found / np.linalg.norm(found, axis=1, keepdims=True), strict=True))
    scores = np.array([vectors[first] @ vectors[second] for _, first, second in trials])
    thresholds, accepted, refused = errors(scores, np.array([label == "1" for label, _, _ in trials]))
    best = int(np.abs(accepted - refused).argmin())
    rate = 50 * (accepted[best] + refused[best])
    print(f"{len(trials)} pairs of {len(names)} recordings: equal error rate {rate:.2f} % at {thresholds[best]:.4f}")
    if args.scores:
        lines = [f"{score:.6f} {' '.join(trial)}\n" for score, trial in zip(scores, trials, strict=True)]
        Path(args.scores).write_text("".join(lines))
    if args.plot:
        plot(args.plot, thresholds, accepted, refused, best)


if __name__ == "__main__":
    main()
