"""A corpus from files to files: `wavlm-fast extract` beside the scripts that people write.

The files are FLAC at 16 kHz, cut from the package's clip, of log-normal lengths; the checkpoint is a folder as
transformers saves it. Who runs is a way of extracting.py, in turn with the others, each run in a process of its own.
What the first round wrote is held against float64 before any time counts.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from wavlm_fast import audio, measure
from wavlm_fast.errors import UserError

from . import extracting, verify
from .cases import MODELS, Case, Output
from .flops import forward, frames
from .peaks import Peaks
from .progress import Meter
from .providers import BASELINE, OURS, SHORT, SINGLE, Provider
from .rounds import Row

_SORTED = f"{BASELINE}, sorted batches"
_WAYS = {
    f"{BASELINE} fp32, one at a time": (BASELINE, "one at a time"),
    f"{BASELINE} fp32, sorted batches": (_SORTED, "sorted batches"),
    f"{OURS} fp32, extract": (OURS, "extract"),
}
_PREPROCESSOR = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": audio.RATE, "feature_size": 1,
                 "padding_value": 0.0, "do_normalize": False, "return_attention_mask": True}  # fmt: skip


def providers() -> dict[str, Provider]:
    """Who extracts, by name."""
    return {name: Provider(family, SINGLE, _no_call) for name, (family, _) in _WAYS.items()}


def _no_call(subject: Any) -> Any:
    raise NotImplementedError("it runs on files, in a process of its own")


class Corpus:
    """A case's files and checkpoint in a folder."""

    def __init__(self, case: Case, module: Output, folder: Path) -> None:
        self.case, self.model, self.folder = case, module.model, folder
        self.audio, self.checkpoint = folder / "audio", folder / "model"
        self.audio.mkdir(parents=True)
        clip = audio.load(audio.clip())[0].numpy()
        draw = np.random.default_rng(len(case.lengths))
        for index, seconds in enumerate(case.lengths):
            waveform = np.resize(np.roll(clip, -int(draw.integers(len(clip)))), int(seconds * audio.RATE))
            soundfile.write(self.audio / f"{index:05d}.flac", waveform, audio.RATE)
        self.model.save_pretrained(self.checkpoint)
        self.checkpoint.joinpath("preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR))

    def frames(self, index: int) -> int:
        """Of the features of an utterance."""
        return frames(self.model.config, int(self.case.lengths[index] * audio.RATE))[-1]

    def run(self, way: str, threads: int, device: str) -> tuple[extracting.Ran, Path]:
        """Extract all of it; what the run tells, and its folder of features.

        Raises:
            UserError: the run failed, or not all that is wanted was written.
        """
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        ran = extracting.run(
            way, extracting.Job(str(self.audio), str(self.checkpoint), str(out), self.case.layer, threads, device)
        )
        width = self.model.config.hidden_size
        for index in range(len(self.case.lengths)):
            wanted, found = (self.frames(index), width), self.features(out, index)
            if found.shape != wanted or found.dtype != np.float32:
                raise UserError(f"of utterance {index} it wrote {found.dtype} {found.shape}, wanted float32 {wanted}")
        return ran, out

    def features(self, out: Path, index: int) -> np.ndarray:
        """Of an utterance, as a run wrote them.

        Raises:
            UserError: there are none.
        """
        try:
            return np.load(out / f"{index:05d}.npy")
        except (OSError, ValueError) as error:
            raise UserError(f"of utterance {index} there are no features: {error}") from error


class Truth:
    """The right features of a few utterances, the shortest and those in the middle, batches as the sorted script has
    them: `alone`, and `padded`, which in transformers is something else.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        order = sorted(range(len(corpus.case.lengths)), key=lambda i: corpus.case.lengths[i])
        batches = [order[i : i + extracting.BATCH] for i in range(0, len(order), extracting.BATCH)]
        self.batches = [batches[0], batches[len(batches) // 2]]
        dtypes = (torch.float64, SINGLE)  # the truth, and what is usual
        self.alone, self.padded = ([self._computed(dtype, padded) for dtype in dtypes] for padded in (False, True))

    def verdict(self, out: Path, padded: bool) -> verify.Verdict:
        """Judge what a run wrote; of a padded one the remark says how far it is from each utterance alone."""
        found = torch.cat([torch.from_numpy(self.corpus.features(out, i)) for batch in self.batches for i in batch])
        alone = verify.verdict_on(self.alone[1], found, self.alone[0])
        if not padded:
            return alone
        verdict = verify.verdict_on(self.padded[1], found, self.padded[0])
        remark = f"held against padded batches in float64; {alone.error:.1e} off from each utterance alone"
        return verify.Verdict(verdict.error, verdict.allowed, verdict.problem, remark)

    def _computed(self, dtype: torch.dtype, padded: bool) -> Tensor:
        """`[frames, width]` of all of them, one after the other."""
        model = Output(self.corpus.model, "").copy(dtype).model
        batches = self.batches if padded else [[i] for batch in self.batches for i in batch]
        return torch.cat([state for batch in batches for state in self._states(model, batch, dtype)])

    @torch.no_grad()
    def _states(self, model: nn.Module, batch: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        waveforms = [audio.load(self.corpus.audio / f"{i:05d}.flac")[0].to(dtype) for i in batch]
        given = {}
        if len(batch) > 1:
            ends = torch.tensor([len(w) for w in waveforms])
            given = {"attention_mask": (torch.arange(int(ends.max())) < ends[:, None]).long()}
        states = model(pad_sequence(waveforms, batch_first=True), output_hidden_states=True, **given).hidden_states
        for row, index in zip(states[self.corpus.case.layer], batch, strict=True):
            yield row[: self.corpus.frames(index)]


def run(
    corpus: Corpus,
    chosen: Sequence[str],
    peaks: Callable[[], Peaks],
    rounds: int,
    threads: int,
    device: str,
    meter: Meter,
) -> Iterator[tuple[list[Row], list[dict[str, Any]]]]:
    """Time ways to extract a corpus, in turn.

    Yields:
        Rows, and what else is told of each; first without times, then after every round.
    """
    case, offered = corpus.case, providers()
    rows = {name: _row(case, name, offered[name]) for name in chosen}
    ran: defaultdict[str, list[extracting.Ran]] = defaultdict(list)
    yield list(rows.values()), []
    meter.doing(f"{case.name}: float64")
    truth = Truth(corpus)
    peak = peaks().of(SINGLE)
    for index in range(rounds):
        for name in measure.order(rows, index):
            row = rows[name]
            if row.problem is not None:
                continue
            meter.doing(f"{case.name}: {name}")
            try:
                found, out = corpus.run(_WAYS[name][1], threads, device)
                if index == 0:
                    _judge(row, truth.verdict(out, padded=row.family == _SORTED))
            except UserError as error:
                row.failed(str(error), wrong=True)
            meter.done(case.audio)
            if row.problem is None:
                ran[name].append(found)
        timed = {name: [one.seconds for one in found] for name, found in ran.items() if rows[name].problem is None}
        _compare(rows, timed, peak)
        yield list(rows.values()), [_told(case, name, ran[name]) for name in timed]


def _row(case: Case, name: str, provider: Provider) -> Row:
    """To be filled; its operations are those of the layers that it runs, without padding."""
    cls, longest, config = MODELS[case.model].cls, max(case.lengths), copy.deepcopy(MODELS[case.model].config)
    if provider.family != BASELINE:
        config.num_hidden_layers = case.layer
    samples = Counter(int(seconds * audio.RATE) for seconds in case.lengths)
    operations = sum(sum(forward(config, count, n, cls).values()) for n, count in samples.items())
    return Row(
        case.name, case.group, case.model, cls, len(case.lengths), longest, name, provider.family,
        SHORT[provider.dtype], provider.ours, case.audio, operations / 1e9,
    )  # fmt: skip


def _judge(row: Row, verdict: verify.Verdict) -> None:
    row.error, row.allowed, row.problem, row.note = verdict.error, verdict.allowed, verdict.problem, verdict.remark
    if row.ours and verdict.remark:  # as of every forward of ours
        row.problem = f"wrong: {verdict.remark}"
    row.wrong = row.problem is not None


def _compare(rows: dict[str, Row], timed: dict[str, list[float]], peak: float | None) -> None:
    ours = next((times for name, times in timed.items() if rows[name].ours), None)
    for name, times in timed.items():
        rows[name].timed(times, peak)
        if ours is not None and not rows[name].ours:
            with suppress(ValueError):  # one of them was lost in a later round
                rows[name].ours_faster = measure.ratio(times, ours)


def _told(case: Case, name: str, ran: Sequence[extracting.Ran]) -> dict[str, Any]:
    """The model's share of the time, and memory, of the last run."""
    first, *_, last = ran[-1].tenths
    return {
        "case": case.name,
        "provider": name,
        "dtype": SHORT[SINGLE],
        "busy": statistics.median(one.busy / one.seconds for one in ran),
        "peak_bytes": max(one.peak for one in ran),
        "first_bytes": first,
        "last_bytes": last,
    }
