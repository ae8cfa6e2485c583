"""The service: exact answers in batches, refusals under overload, and nobody harmed by another's recording."""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from doc_blocks import ROOT
from transformers import WavLMForXVector

from wavlm_fast import Extractor, audio

uvicorn = pytest.importorskip("uvicorn", reason="the service runs in it")
pytest.importorskip("fastapi", reason="the service is made of it")
LIMITS = {"places": 64, "max_wait": 0.05, "max_seconds": 10}


@pytest.fixture
def serve(example):
    """serve(extractor, **limits) -> the URL of a service in this process."""
    running = []

    def start(extractor, **limits):
        app = example("service").build(extractor, SimpleNamespace(**{**LIMITS, **limits}))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def model(hub):
    return hub("microsoft/wavlm-base-plus-sv")


def wav(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, audio.RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def ask(url, body):
    """Status, what came, and headers."""
    try:
        with urllib.request.urlopen(url, body, timeout=30) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text)["detail"] if text.startswith("{") else text, error.headers


def at_once(url, bodies):
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: ask(url, body), bodies))


def close(found, wanted):
    """To rounding: relative to the largest value, what float32 loses in some layers."""
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


class Fake:
    """In the place of an extractor: the length of each waveform."""

    samples_needed, batch_seconds = 400, 3.0

    def __init__(self, fails=lambda waveforms: None):
        self.fails, self.batches, self.held = fails, [], threading.Event()
        self.held.set()

    def outputs(self, waveforms):
        self.batches.append([len(w) for w in waveforms])
        assert self.held.wait(20)
        self.fails(waveforms)
        return [ValueError("this one") if len(w) == 666 else torch.tensor([len(w)]) for w in waveforms]


def test_clients_at_once_get_what_the_model_gives_alone(serve, model, speech):
    extractor = Extractor(model, "xvector", batch_seconds=10.0)
    url = serve(extractor)
    waveforms = [speech[4000 * i : 4000 * i + n] for i, n in enumerate((16000, 9001, 32000, 6400, 16000, 24000, 8000))]
    plain = WavLMForXVector.from_pretrained(model).eval()
    answers = at_once(url, [wav(w) for w in waveforms])
    for (status, answer, _), waveform in zip(answers, waveforms):
        assert status == 200
        (alone,) = extractor.outputs([torch.tensor(waveform)])
        close(answer["output"], alone)
        with torch.inference_mode():
            close(answer["output"], plain(torch.tensor(waveform)[None]).embeddings[0])
    assert max(answer["batch"] for _, answer, _ in answers) > 1


def test_batches_hold_so_much_audio_in_the_order_of_arrival(serve):
    fake = Fake()
    url = serve(fake, max_wait=0)
    fake.held.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = []
        for samples in (8000, 16000, 17000, 15000, 1000, 60000, 900):
            answers.append(pool.submit(ask, url, wav(np.zeros(samples))))
            time.sleep(0.1)  # the first runs, and the others come in turn
        fake.held.set()
        answers = [answer.result()[1] for answer in answers]
    assert [answer["output"] for answer in answers] == [[8000], [16000], [17000], [15000], [1000], [60000], [900]]
    assert fake.batches == [[8000], [16000, 17000, 15000], [1000], [60000], [900]]
    assert [answer["batch"] for answer in answers] == [1, 3, 3, 3, 1, 1, 1]


def test_overload(serve):
    fake = Fake()
    url = serve(fake, places=3)
    fake.held.clear()
    body = wav(np.zeros(1000))
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(ask, url, body) for _ in range(20)]
        until = time.monotonic() + 20
        while sum(answer.done() for answer in asked) < 17 and time.monotonic() < until:
            time.sleep(0.01)
        refused = [answer.result() for answer in asked if answer.done()]
        fake.held.set()
        answered = [answer.result() for answer in asked]
    assert [(status, said) for status, said, _ in refused] == [(503, "all 3 places are taken")] * 17
    assert {headers["Retry-After"] for _, _, headers in refused} == {"1"}
    assert sorted(status for status, _, _ in answered) == [200] * 3 + [503] * 17
    assert ask(url, body)[0] == 200


def test_recordings_that_are_none(serve, model, speech):
    extractor = Extractor(model, "xvector")
    url = serve(extractor, max_seconds=2)
    good = wav(speech[:16000])
    broken = {
        b"no audio at all": (422, "the recording cannot be read as audio"),
        b"": (422, "the recording is empty"),
        good[: len(good) // 2]: (422, "the recording is cut or damaged"),
        wav(np.full(16000, np.nan)): (422, "the recording holds NaN"),
        wav(np.zeros(4800)): (422, "the recording is too short: at least 5200 samples"),
        wav(np.zeros(40000)): (413, "at most 2 s of audio are wanted, the file says 2.5"),
        good + b"0" * 800_000: (413, "a Content-Length of at most 800000 is wanted"),
    }
    answers = at_once(url, [good, *broken, good])
    for (status, said, _), (wanted, sentence) in zip(answers[1:-1], broken.values()):
        assert (status, sentence in said) == (wanted, True), said
    (alone,) = extractor.outputs([torch.tensor(speech[:16000])])
    for _, answer, _ in (answers[0], answers[-1]):
        close(answer["output"], alone)
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    connection.request("POST", "/", iter([good]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 413
    connection.close()


def test_what_the_model_cannot_run_takes_no_other_along(serve):
    url = serve(Fake(), max_wait=0.3)
    answers = at_once(url, [wav(np.zeros(n)) for n in (1000, 666, 2000)])
    assert [status for status, _, _ in answers] == [200, 500, 200]
    assert answers[1][1] == "this one"
    assert answers[0][1]["batch"] == 3


def test_a_model_that_breaks_leaves_nobody_waiting(serve):
    def fails(waveforms):
        if len(waveforms) > 1:
            raise MemoryError("no more")

    url = serve(Fake(fails), max_wait=0.3)
    bodies = [wav(np.zeros(n)) for n in (1000, 1001, 1002)]
    assert [status for status, _, _ in at_once(url, bodies)] == [500] * 3
    assert ask(url, bodies[0])[0] == 200


def test_the_command_and_its_load_test(example, model, capsys):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    words = ["--model", model, "--port", port, "--max-wait", "0.02", "--places", "4"]
    service = subprocess.Popen([sys.executable, str(ROOT / "examples" / "service.py"), *words])
    try:
        url = f"http://127.0.0.1:{port}/"
        until = time.monotonic() + 60
        while time.monotonic() < until and service.poll() is None:
            try:
                ask(url, b"")
                break
            except OSError:
                time.sleep(0.1)
        example("service_load").main(["--url", url, "--clients", "8", "--seconds", "1.5"])
        said = capsys.readouterr().out
        assert re.search(r"8 clients, [\d.]+ s: \d+ requests, [1-9]\d* refused for want of a place\n", said)
        assert re.search(r"\n[\d.]+ answers per second, [\d.]+ s of audio per second\n", said)
        assert re.search(r"\nlatency: p50 \d+ ms, p90 \d+ ms, p95 \d+ ms, p99 \d+ ms\n", said)
        assert re.search(r"\ntogether: [\d.]+ on average, \d to [2-4]\n", said)
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, url, wav(np.zeros(100000)))
            time.sleep(0.01)  # on its way
            service.send_signal(signal.SIGINT)
            assert last.result()[0] == 200
        service.wait(20)
    finally:
        service.kill()
        service.wait()
    with pytest.raises(SystemExit, match="answers and refusals are wanted, got .*refused"):
        example("service_load").main(["--url", url, "--clients", "1", "--seconds", "0.1"])
