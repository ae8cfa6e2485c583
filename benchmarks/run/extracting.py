"""Ways from a folder of audio to a folder of features, each in a process of its own that tells its time and memory.

`python -m wavlm_fast.benchmarks.run.extracting REQUEST` is that process. The clock starts when everything is imported
and stops when the last file is written: loading of the model, decoding, the model and writing are in the time, and so
is whatever else a way does for it, such as records of what is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMModel

import wavlm_fast.extract  # noqa: F401 - the command imports it when it is asked for
from wavlm_fast import cli, memory

BATCH = 8  # utterances of a padded batch
_EVERY = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Job:
    """What to extract: `audio` and `model` are folders, `out` one that does not exist yet."""

    audio: str
    model: str
    out: str
    layer: int
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Ran:
    """Seconds and bytes of one run."""

    seconds: float
    busy: float  # seconds in the model
    peak: int  # resident memory at its highest
    tenths: tuple[int, ...]  # and after each tenth of the time


def one_at_a_time(job: Job) -> float:
    """The script as people write it: every layer, an utterance a batch, then the state that is wanted."""
    busy = 0.0
    os.makedirs(job.out)
    prepare = Wav2Vec2FeatureExtractor.from_pretrained(job.model)
    model = WavLMModel.from_pretrained(job.model).eval().to(job.device)
    for path in sorted(Path(job.audio).glob("*.flac")):
        waveform, rate = soundfile.read(path, dtype="float32")
        inputs = prepare(waveform, sampling_rate=rate, return_tensors="pt").to(job.device)
        started = time.perf_counter()
        with torch.no_grad():
            states = model(inputs.input_values, output_hidden_states=True).hidden_states
        busy += time.perf_counter() - started
        np.save(Path(job.out, path.stem), states[job.layer][0].cpu().numpy())
    return busy


def sorted_batches(job: Job) -> float:
    """The best plain script: no layer too many, utterances sorted by length in padded batches, with their mask."""
    busy = 0.0
    os.makedirs(job.out)
    prepare = Wav2Vec2FeatureExtractor.from_pretrained(job.model)
    model = WavLMModel.from_pretrained(job.model, num_hidden_layers=job.layer).eval().to(job.device)
    found = [(path, *soundfile.read(path, dtype="float32")) for path in sorted(Path(job.audio).glob("*.flac"))]
    found.sort(key=lambda each: len(each[1]))
    for first in range(0, len(found), BATCH):
        paths, waveforms, rates = zip(*found[first : first + BATCH], strict=True)
        inputs = prepare(
            list(waveforms), sampling_rate=rates[0], padding=True, return_attention_mask=True, return_tensors="pt"
        ).to(job.device)
        started = time.perf_counter()
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        busy += time.perf_counter() - started
        frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1)).tolist()
        for path, state, count in zip(paths, states, frames, strict=True):
            np.save(Path(job.out, path.stem), state[:count].cpu().numpy())
    return busy


def command(job: Job) -> float:
    """`wavlm-fast extract`, which tells the model's share in its --log."""
    log = Path(job.out).with_suffix(".log")
    log.unlink(missing_ok=True)
    arguments = ["--model", job.model, "--layer", f"{job.layer}", "--format", "npy", "--out", job.out]
    arguments += ["--threads", f"{job.threads}", "--device", job.device, "--log", str(log)]
    status = cli.main(["extract", job.audio, *arguments])
    if status != 0:
        raise RuntimeError(f"wavlm-fast extract ended with status {status}")
    return sum(json.loads(line)["busy"] for line in log.read_text().splitlines())


WAYS: dict[str, Callable[[Job], float]] = {
    "one at a time": one_at_a_time,
    "sorted batches": sorted_batches,
    "extract": command,
}


def run(way: str, job: Job) -> Ran:
    """Extract in a new process.

    Raises:
        UserError: it failed.
    """
    found = json.loads(memory.in_new_process(__name__, json.dumps([way, asdict(job)])))
    return Ran(**{**found, "tenths": tuple(found["tenths"])})


def here(way: str, job: Job) -> Ran:
    """Extract in this process."""
    torch.set_num_threads(job.threads)
    with _looking() as looked:
        started = time.perf_counter()
        busy = WAYS[way](job)
        seconds = time.perf_counter() - started
    return Ran(seconds, busy, memory.peak(), _tenths(looked, started, seconds))


def _tenths(looked: list[tuple[float, int]], started: float, seconds: float) -> tuple[int, ...]:
    def at(when: float) -> int:
        return min(looked, key=lambda look: abs(look[0] - when))[1]

    return tuple(at(started + seconds * part / 10) for part in range(1, 11))


@contextlib.contextmanager
def _looking() -> Iterator[list[tuple[float, int]]]:
    """Times and resident memory, from a thread that looks now and then."""
    looked: list[tuple[float, int]] = []
    over = threading.Event()

    def look() -> None:
        while True:
            looked.append((time.perf_counter(), memory.resident()))
            if over.wait(_EVERY):
                break
        looked.append((time.perf_counter(), memory.resident()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield looked
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Serve a request."""
    way, job = json.loads(sys.argv[1])
    print(json.dumps(asdict(here(way, Job(**job)))))


if __name__ == "__main__":
    main()
