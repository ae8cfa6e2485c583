"""What a run on a borrowed GPU starts, and what it leaves; the record; and what becomes of processes that die."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from wavlm_fast.benchmarks.gpu.card import session as sessions
from wavlm_fast.benchmarks.gpu.card import supervise, worker
from wavlm_fast.benchmarks.gpu.card.record import FILE, Record, read
from wavlm_fast.benchmarks.gpu.card.session import Session
from wavlm_fast.benchmarks.gpu.card.steps import MODELS, PARITY, STAGES, Step
from wavlm_fast.errors import UserError

HEAD = {"device": "a device", "torch": "2.13.0"}


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """Looking for some in a process of tests takes seconds."""
    monkeypatch.setattr(sessions.gc, "collect", lambda: 0)


class Clock:
    """Time passes in steps alone."""

    now = 100.0

    def __call__(self):
        return self.now

    def step(self, phase, name, thought, takes=None, rows=None):
        def run():
            self.now += thought if takes is None else takes
            return [{"figure": name}] if rows is None else rows

        return Step(phase, name, thought, run)


def ran(messages):
    return [m["step"] for m in messages if "step" in m]


def test_no_step_begins_that_would_not_be_through():
    clock = Clock()
    steps = [clock.step(MODELS, name, seconds) for name, seconds in (("a", 20), ("long", 60), ("b", 20), ("c", 20))]
    found = list(Session([], [], clock, 165.0).run(steps))
    assert found[0] == {"plan": ["a", "long", "b", "c"]}
    assert ran(found) == ["a", "b", "c"]
    assert clock.now <= 165


def test_what_took_longer_is_thought_to_take_longer():
    clock = Clock()
    steps = [clock.step(MODELS, str(i), 10, takes=30) for i in range(4)]
    found = list(Session([], [], clock, 195.0).run(steps))
    assert ran(found) == ["0", "1", "2"]
    assert [m["seconds"] for m in found if "start" in m] == [10, 30, 30]


def test_a_phase_leaves_later_ones_their_part_and_goes_on_after_them():
    clock = Clock()
    early = [clock.step(PARITY, f"early {i}", 10) for i in range(12)]
    late = [clock.step(MODELS, f"late {i}", 10) for i in range(3)]
    names = ran(Session([], [], clock, 200.0).run([*early, *late]))
    first = names.index("late 0")
    assert names[:first] == [f"early {i}" for i in range(3)]
    assert names[first : first + 3] == ["late 0", "late 1", "late 2"]
    assert names[first + 3 :] == ["early 3", "early 4", "early 5"]
    assert clock.now <= 200


def test_a_fault_is_a_row_and_the_run_goes_on(monkeypatch):
    def fails(error):
        def run():
            raise error

        return run

    steps = [
        Step(STAGES, "op: wavlm_fast triton", 1, fails(RuntimeError("no such thing\nsecond line"))),
        Step(STAGES, "op: torch", 1, fails(torch.OutOfMemoryError("tried to allocate"))),
        Step(STAGES, "op: last", 1, lambda: [{"figure": 1}]),
    ]
    rows = []
    found = list(Session([], rows, time.time, time.time() + 60).run(steps))
    assert ran(found) == [step.name for step in steps]
    first, second, third = rows
    assert (first["problem"], first["ours"]) == ("RuntimeError: no such thing", True)
    assert (second["problem"], second["ours"]) == ("out of memory: tried to allocate", False)
    assert third == {"step": "op: last", "phase": STAGES, "figure": 1}


def test_a_device_that_answers_no_more_ends_the_process(monkeypatch):
    monkeypatch.setattr(sessions, "_alive", lambda: False)
    clock = Clock()

    def fails():
        raise RuntimeError("an illegal memory access")

    session = Session([], [], clock, 500.0)
    found = list(session.run([Step(PARITY, "a", 1, fails), clock.step(PARITY, "b", 1)]))
    assert session.broken
    assert ran(found) == ["a"]


def test_what_is_done_is_not_done_again():
    clock = Clock()
    session = Session(["a"], [], clock, 500.0)
    steps = [clock.step(PARITY, name, 1) for name in "ab"]
    assert ran(session.run(steps)) == ["b"]
    assert ran(session.run(steps)) == []


def line(name, **row):
    return {"step": name, "phase": PARITY, "took": 1.0, "rows": [row]}


def test_a_record_is_read_back_without_its_torn_end(tmp_path):
    record = Record(tmp_path, HEAD)
    record.add(line("a", error=float("nan")))
    record.add(line("b"))
    record.close()
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": "c", "phase": "par')
    assert read(path).done == {"a", "b"}
    again = Record(tmp_path, HEAD)
    assert again.found.done == {"a", "b"}
    again.add(line("d"))
    again.end({"left out": ["e"]})
    again.close()
    assert path.read_bytes().startswith(whole)
    assert read(path).done == {"a", "b", "d"}
    assert read(path).left_out == ["e"]
    assert read(path).rows(PARITY)[0] == {"step": "a", "phase": PARITY, "error": None}


def test_a_process_killed_before_its_first_line_is_no_obstacle(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"head": {"dev')
    record = Record(tmp_path, HEAD)
    record.add(line("a"))
    record.close()
    assert read(tmp_path / FILE).head == HEAD
    assert read(tmp_path / FILE).done == {"a"}


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"device": "another", "torch": "2.13.0"}, "is of another device, another, and this is a device: name another"),
        ({"device": "a device", "torch": "2.10.0"}, "is of another torch, 2.10.0, and this is 2.13.0: name another"),
        ({"device": "a device"}, "is of another torch, none, and this is 2.13.0: name another"),
    ],
)
def test_another_device_or_version_is_refused(tmp_path, there, says):
    Record(tmp_path, there).close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=says):
        Record(tmp_path, HEAD)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("text", ["{}\n", "[]\n", "hello\n", '{"head": {}}\n{"rows": []}\n', '{"head": {}}\n1\n'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="is not what `wavlm-fast gpu` writes"):
        Record(tmp_path, HEAD)
    assert (tmp_path / FILE).read_text() == text


WORKER = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
def send(**message):
    print(json.dumps(message), flush=True)
done = [json.loads(line).get("step") for line in open({record!r})] if os.path.exists({record!r}) else []
if "breaks for good" in done:
    sys.exit("the device fell off the bus")
send(head={head!r})
deadline = json.loads(sys.stdin.readline())["deadline"]
names = {names!r}
send(plan=[name for name in names if name not in done])
for name in names:
    if name in done:
        continue
    send(start=name, phase="parity", seconds=0.01)
    if name.startswith("dies"):
        os.kill(os.getpid(), 11)
    if name.startswith("exits"):
        sys.exit(3)
    if name.startswith("hangs"):
        time.sleep(30)
    send(step=name, phase="parity", took=0.1, rows=[dict(figure=name)])
    if name.startswith("breaks"):
        sys.exit(0)
send(end=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Workers that do as the names of their steps say, in a hurry: fake(*names) -> what puts it in the real one's
    place."""

    def make(*names):
        text = WORKER.format(folder=str(tmp_path), record=str(tmp_path / FILE), head=HEAD, names=names)
        monkeypatch.setattr(supervise, "_command", lambda *given: [sys.executable, "-S", "-c", text])
        monkeypatch.setattr(supervise, "_AT_LEAST", 1.0)

    return make


def run(folder, minutes=1.0, told=None):
    tell = told.append if told is not None else lambda line: None
    return supervise.Run(folder, "cuda", "full", minutes, tell, time.time())()


def test_a_step_that_takes_its_process_with_it_is_a_row(tmp_path, fake):
    fake("a", "dies", "b", "exits", "breaks the device", "c")
    told = []
    found = run(tmp_path, told=told)
    assert [line["step"] for line in found.lines] == ["a", "dies", "b", "exits", "breaks the device", "c"]
    assert found.lines[1]["rows"][0]["problem"] == "the process ended by SIGSEGV"
    assert found.lines[3]["rows"][0]["problem"] == "the process ended with status 3"
    assert found.left_out == []
    assert told == found.lines
    assert read(tmp_path / FILE) == found


def test_a_step_without_end_is_a_row_and_the_run_goes_on(tmp_path, fake):
    fake("a", "hangs", "b")
    found = run(tmp_path)
    assert [line["step"] for line in found.lines] == ["a", "hangs", "b"]
    assert found.lines[1]["rows"][0]["problem"] == "it did not end within 1 s"


def test_time_is_up(tmp_path, fake, monkeypatch):
    """What was running is no row, and is named with all that was not begun; the next run goes on with it."""
    fake("a", "hangs", "b")
    monkeypatch.setattr(supervise, "_AT_LEAST", 600.0)
    begin = time.time()
    found = run(tmp_path, minutes=4 / 60)
    assert time.time() - begin <= 4
    assert found.done == {"a"}
    assert found.left_out == ["hangs", "b"]
    fake("a", "b")
    found = run(tmp_path)
    assert [line["step"] for line in found.lines] == ["a", "b"]
    assert found.left_out == []
    assert len(found.runs) == 2


def test_a_worker_that_cannot_begin_is_a_sentence(tmp_path, monkeypatch):
    text = "import sys; sys.exit('no such device')"
    monkeypatch.setattr(supervise, "_command", lambda *given: [sys.executable, "-S", "-c", text])
    with pytest.raises(UserError, match=r"the device cannot be used: no such device \(all of it is in .*log.txt\)"):
        run(tmp_path)


def test_a_device_that_is_lost_ends_the_run_with_what_was_found(tmp_path, fake):
    fake("a", "breaks for good", "b")
    found = run(tmp_path)
    assert [line["step"] for line in found.lines] == ["a", "breaks for good"]
    assert found.left_out == ["b"]
    assert found.runs[-1]["stopped"].startswith("the device cannot be used: the device fell off the bus (")


def test_a_record_of_another_device_ends_the_run(tmp_path, fake):
    fake("a")
    Record(tmp_path, {**HEAD, "device": "another"}).close()
    with pytest.raises(UserError, match="is of another device"):
        run(tmp_path)


KILLED = """
    import sys, time
    from pathlib import Path
    from wavlm_fast.benchmarks.gpu.card import supervise, worker
    text = sys.argv[2]
    supervise._command = lambda *given: [sys.executable, "-S", "-c", text]
    supervise.Run(Path(sys.argv[1]), "cuda", "full", 1.0, lambda line: print(line["step"], flush=True), time.time())()
"""


def test_a_killed_run_loses_the_step_in_progress_alone(tmp_path):
    names = ("a", "b", "hangs", "c")
    text = WORKER.format(folder=str(tmp_path), record=str(tmp_path / FILE), head=HEAD, names=names)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}, text=True)
    try:
        assert [process.stdout.readline().strip() for _ in range(2)] == ["a", "b"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    found = read(tmp_path / FILE)
    assert [line["step"] for line in found.lines] == ["a", "b"]
    assert json.loads((tmp_path / FILE).read_text().splitlines()[0]) == {"head": HEAD}


def test_a_worker_does_not_outlive_who_started_it():
    reader, writer = os.pipe()
    left = []
    with os.fdopen(reader) as stream:
        waiting = threading.Thread(target=worker.left_alone, args=(stream, left.append))
        waiting.start()
        os.write(writer, b"not yet\n")
        assert not left
        os.close(writer)  # as the system does for whoever ends
        waiting.join(30)
    assert left == [1]
