"""What is extracted of each utterance, and whether a checkpoint has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import UserError

What = Literal["hidden", "xvector", "logits", "frames", "text"]
Average = Literal["layers", "frames"]
ConventionName = Literal["hf", "s3prl", "fairseq", "knn-vc"]
AVERAGES: tuple[Average, ...] = get_args(Average)

# What -> transformers' class whose output it is, and the sentence's word for it.
CLASSES: dict[What, str] = {
    "hidden": "WavLMModel",
    "xvector": "WavLMForXVector",
    "logits": "WavLMForSequenceClassification",
    "frames": "WavLMForAudioFrameClassification",
    "text": "WavLMForCTC",
}
# Classes of which these outputs are logits too.
_LOGITS = ("WavLMForSequenceClassification", "WavLMForCTC")
CHUNK = 1_600_000  # samples at which fairseq's dumps cut an utterance


@dataclass(frozen=True)
class Convention:
    """What readers of features expect beside the layer.

    `normalise`: each utterance to zero mean and unit variance; None for what the checkpoint says. `eps`: of that
    variance. `final_norm`: whether the last state of an encoder with a norm behind its layers has gone through it.
    `pad_to`: zeros are added behind the samples up to a multiple of it, a whole one where there are as many already.
    `chunk`: samples at which an utterance is cut into pieces that know nothing of each other.
    """

    normalise: bool | None = None
    eps: float = 1e-7
    final_norm: bool = True
    pad_to: int = 0
    chunk: int = 0


CONVENTIONS: dict[ConventionName, Convention] = {
    "hf": Convention(),
    "s3prl": Convention(eps=1e-5),
    "fairseq": Convention(eps=1e-5, final_norm=False, chunk=CHUNK),
    "knn-vc": Convention(normalise=False, final_norm=False, pad_to=320),
}


@dataclass(frozen=True)
class Wanted:
    """What to extract.

    Args:
        what: "hidden" (states), "xvector" (embeddings), "logits", "frames" (logits of every frame) or "text".
        layers: of "hidden": numbers of states, 0 being the embedding before the first layer and N the output of layer
            N; negative ones count from the end; "all" for every one.
        average: of "hidden": means over "layers" and over "frames".
        convention: what readers of the features expect, of CONVENTIONS.
    """

    what: What = "hidden"
    layers: tuple[int, ...] | Literal["all"] = "all"
    average: tuple[Average, ...] = ()
    convention: ConventionName = "hf"

    def __post_init__(self) -> None:
        _one_of("what", self.what, tuple(CLASSES))
        _one_of("convention", self.convention, tuple(CONVENTIONS))
        for name in self.average:
            _one_of("average", name, AVERAGES)
        if self.what != "hidden" and (self.layers != "all" or self.average):
            raise UserError(f"layers and averages are of hidden states, {self.what} has none to choose from")
        if self.layers != "all" and not (
            isinstance(self.layers, tuple) and self.layers and all(type(n) is int for n in self.layers)
        ):
            raise UserError(f"layers must be 'all' or a tuple of whole numbers, got {self.layers!r}")

    def states(self, layers: int) -> tuple[int, ...]:
        """The numbers of the hidden states of a model of so many layers, in the order asked for.

        Raises:
            UserError: it has no such state.
        """
        if isinstance(self.layers, str):
            return tuple(range(layers + 1))
        for n in self.layers:
            if not -layers - 1 <= n <= layers:
                raise UserError(
                    f"--layer must lie in 0..{layers} for this model (or -{layers + 1}..-1, or 'all'), got {n}"
                )
        return tuple(n % (layers + 1) for n in self.layers)

    @property
    def single(self) -> bool:
        """Whether one state is wanted, which then has no dimension of layers."""
        return not isinstance(self.layers, str) and len(self.layers) == 1

    def class_for(self, saved: Sequence[str], name: str) -> str:
        """The class of transformers' that computes it from a checkpoint, whose config says of which classes it is.

        Raises:
            UserError: the checkpoint holds another head, or none.
        """
        if self.what == "hidden":
            return CLASSES["hidden"]
        fitting = _LOGITS if self.what == "logits" else (CLASSES[self.what],)
        for architecture in saved:
            if architecture in fitting:
                return architecture
        came = f"a {saved[0]}" if saved else "one that does not say of which class it is"
        raise UserError(f"{self.what} needs a checkpoint of {' or '.join(fitting)}, but {name} is {came}")


def _one_of(name: str, value: Any, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UserError(f"{name} must be one of {', '.join(names)}, got {value!r}")
