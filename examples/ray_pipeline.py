"""A Ray Data pipeline: recordings in, a Parquet table with a column of features out, on one machine or a cluster.

    python examples/ray_pipeline.py corpus/ vectors.parquet --model microsoft/wavlm-base-plus --layer 9 --actors 2

Ray Data makes an `Extractor` in each actor, which loads the model there, and hands it one batch after the other.
Recordings that cannot be read are left out, and named in the log. All nodes must see the corpus under its path.
Needs ray[data] and pyarrow: pip install 'wavlm-fast[extract]'.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import ray

from wavlm_fast import Extractor, audio


def read(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row with its waveform, `[S]` float32 at 16 kHz; none where the file cannot be used."""
    try:
        waveform, info = audio.load(row["path"])
    except audio.AudioError as error:
        print(error, file=sys.stderr)
        return []
    return [{**row, "audio": waveform.numpy(), "seconds": info.seconds}]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder of .wav and .flac files, at any depth")
    parser.add_argument("out", help="the folder for Parquet files")
    parser.add_argument("--model", default="microsoft/wavlm-base-plus")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--actors", type=int, default=1, help="how many hold the model")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of an actor: how many threads it has")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor")
    parser.add_argument("--batch-size", type=int, default=16, help="recordings in a batch")
    parser.add_argument("--address", help="of a running cluster")
    args = parser.parse_args(words)

    paths = sorted(str(p.resolve()) for p in args.corpus.rglob("*") if p.suffix.lower() in (".wav", ".flac"))
    ray.init(address=args.address, ignore_reinit_error=True)
    rows = ray.data.from_items([{"path": path} for path in paths]).flat_map(read)
    rows = rows.map_batches(
        Extractor,
        fn_constructor_args=[args.model],
        fn_constructor_kwargs={
            "layers": args.layer,
            "average": "frames",  # one vector [C] of each recording
            "device": "cuda" if args.gpus else "cpu",
        },
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        batch_size=args.batch_size,
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    rows.drop_columns(["audio"]).write_parquet(args.out)
    print(f"{args.out}: features of {len(paths)} recordings, less those named above")


if __name__ == "__main__":
    main()
