"""A load test of service.py: clients that ask as fast as they are answered, with recordings of 1 to 7 seconds.

    python examples/service_load.py --url http://127.0.0.1:8000/ --clients 16 --seconds 10

Prints refusals, answers and seconds of audio per second, percentiles of latency, and how many requests ran together.
Who is refused waits as long as Retry-After says. Ends with status 1 where anything but answers and refusals came.
"""

import argparse
import io
import json
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile

from wavlm_fast import audio


def recordings(path: str) -> list[tuple[bytes, float]]:
    """Beginnings of a recording as wav files, and their seconds."""
    waveform = audio.load(path)[0].numpy()
    files = [(io.BytesIO(), waveform[: seconds * audio.RATE]) for seconds in range(1, 8)]
    for file, samples in files:
        soundfile.write(file, samples, audio.RATE, format="WAV")
    return [(file.getvalue(), len(samples) / audio.RATE) for file, samples in files]


def client(url: str, files: list[tuple[bytes, float]], until: float, seed: int) -> list[tuple[int | str, ...]]:
    """Of every request: status or error, seconds that it took, seconds of audio, and how many ran together."""
    draw, found = random.Random(seed), []
    while time.monotonic() < until:
        body, seconds = draw.choice(files)
        start, wait, together = time.monotonic(), 0.0, 0
        try:
            with urllib.request.urlopen(url, body, timeout=60) as response:
                status, together = response.status, json.load(response)["batch"]
        except urllib.error.HTTPError as error:
            status, wait = error.code, float(error.headers.get("Retry-After", 0))
        except OSError as error:
            status, wait = f"{type(error).__name__}: {error}", 0.1
        found.append((status, time.monotonic() - start, seconds, together))
        time.sleep(max(0.0, min(wait, until - time.monotonic())))
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--audio", default=str(audio.clip()), help="a recording (the package's clip)")
    args = parser.parse_args(words)

    files, start = recordings(args.audio), time.monotonic()
    with ThreadPoolExecutor(args.clients) as pool:
        runs = [pool.submit(client, args.url, files, start + args.seconds, seed) for seed in range(args.clients)]
        asked = [request for run in runs for request in run.result()]
    spent, counts = time.monotonic() - start, Counter(status for status, *_ in asked)
    answered = [request for request in asked if request[0] == 200]
    print(f"{args.clients} clients, {spent:.1f} s: {len(asked)} requests, {counts[503]} refused for want of a place")
    if answered:
        _, took, seconds, together = map(np.array, zip(*answered, strict=True))
        print(f"{len(answered) / spent:.1f} answers per second, {seconds.sum() / spent:.1f} s of audio per second")
        print("latency: " + ", ".join(f"p{p} {1000 * np.percentile(took, p):.0f} ms" for p in (50, 90, 95, 99)))
        print(f"together: {together.mean():.1f} on average, {together.min()} to {together.max()}")
    if not answered or not counts.keys() <= {200, 503}:
        raise SystemExit(f"answers and refusals are wanted, got {dict(counts)}")


if __name__ == "__main__":
    main()
