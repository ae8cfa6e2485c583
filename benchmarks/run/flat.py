"""`python -m benchmarks.flat`: the memory of `wavlm-fast extract` from the first of many utterances to the last."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cases import Output, Spec, corpus
from .corpus import Corpus

# A model of so few weights that it gets through thousands of utterances in a minute.
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
          "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flat", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="utterances (default: 10000)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default: 1)")
    args = parser.parse_args(arguments)
    case = corpus("small", args.count, 0.3, 1.0, layer=1)
    with tempfile.TemporaryDirectory() as folder:
        made = Corpus(case, Output(Spec(options=_SMALL).build(), ""), Path(folder, "corpus"))
        ran, _ = made.run("extract", args.threads, "cpu")
    print(f"{args.count} utterances, {case.audio / 3600:.2f} hours, in {ran.seconds:.1f} s")
    for tenth, size in enumerate(ran.tenths, 1):
        print(f"{10 * tenth:3} % of the time: {size / 1e6:.1f} MB")
    print(f"the most: {ran.peak / 1e6:.1f} MB")
    return 0
