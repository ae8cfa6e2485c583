"""A service that gathers requests into exact batches: each answer is what the model gives for that recording alone.

    python examples/service.py --model microsoft/wavlm-base-plus-sv --what xvector --port 8000
    curl --data-binary @speech.wav http://127.0.0.1:8000/

503 and Retry-After: all places are taken; 413: too large or too long; 422: not usable. Ctrl-C answers those inside,
then ends. Needs fastapi, uvicorn, and a proxy in front that ends slow uploads. service_load.py measures the limits.
"""

import argparse
import asyncio
import tempfile
from itertools import accumulate
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from torch import Tensor

from wavlm_fast import Extractor, audio


def decoded(body: bytes, at_least: int, max_seconds: float) -> Tensor:
    """The waveform `[S]` of a file, whose header is asked for its length first."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "recording")).write_bytes(body)
        try:
            if (seconds := audio.duration_of(path)) is None or seconds > max_seconds:
                raise HTTPException(413, f"at most {max_seconds:g} s of audio are wanted, the file says {seconds}")
            return audio.load(path, at_least=at_least)[0]
        except audio.AudioError as error:
            raise HTTPException(422, str(error).replace(str(path), "the recording")) from None


def build(extractor: Extractor, args: argparse.Namespace) -> FastAPI:
    app, free, running = FastAPI(), asyncio.Semaphore(args.places), asyncio.Lock()
    waiting: dict[asyncio.Future, Tensor] = {}  # by their answers, in the order in which they came
    most, most_bytes = extractor.batch_seconds * audio.RATE, 400_000 * args.max_seconds  # 48 kHz, stereo, 32 bits

    @app.post("/")
    async def post(request: Request) -> dict[str, object]:
        if int(request.headers.get("content-length", 1 << 62)) > most_bytes:
            raise HTTPException(413, f"a Content-Length of at most {most_bytes:.0f} is wanted")
        body = await request.body()
        if free.locked():
            raise HTTPException(503, f"all {args.places} places are taken", {"Retry-After": "1"})
        async with free:
            waveform = await asyncio.to_thread(decoded, body, extractor.samples_needed, args.max_seconds)
            waiting[own := asyncio.Future()] = waveform
            async with running:  # in turn: who has no answer yet has waited longest, and runs those behind, too
                if not own.done():
                    await asyncio.sleep(args.max_wait)
                    count = sum(samples <= most for samples in accumulate(map(len, waiting.values())))
                    batch = {answer: waiting.pop(answer) for answer in list(waiting)[: max(1, count)]}
                    outputs = await asyncio.to_thread(extractor.outputs, list(batch.values()))
                    for answer, output in zip(batch, outputs, strict=True):
                        answer.set_result((output, len(batch)))
        output, together = own.result()
        if isinstance(output, Exception):  # of this recording: it took no other along
            raise HTTPException(500, str(output))
        return {"output": output if isinstance(output, str) else output.tolist(), "batch": together}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/wavlm-base-plus-sv")
    parser.add_argument("--what", default="xvector", help="of the model: xvector, text, logits, frames")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--places", type=int, default=64, help="requests inside at a time")
    parser.add_argument("--max-wait", type=float, default=0.01, help="seconds that a batch waits for others")
    parser.add_argument("--batch-seconds", type=float, default=60, help="audio in a batch")
    parser.add_argument("--max-seconds", type=float, default=60, help="audio in a recording")
    args = parser.parse_args()
    extractor = Extractor(args.model, args.what, batch_seconds=args.batch_seconds)
    extractor.outputs([])  # loads the model before the port is open
    uvicorn.run(build(extractor, args), host=args.host, port=args.port, timeout_graceful_shutdown=30)
