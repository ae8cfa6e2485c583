"""Which configuration a kernel is launched with: the default, or what was found fastest here and is kept in a file."""

import json
import logging
import multiprocessing
import os
import sys

import pytest
import torch

pytest.importorskip("triton")

from wavlm_fast.kernels import _tuned, _tuning

DEVICE = torch.device("cuda", 0)
TIMES = {4: 3.0, 8: 1.0, 2: 2.0}  # ms, by warps


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVLM_FAST_AUTOTUNE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_tuned, "SHIPPED", tmp_path / "shipped.json")
    _tuned._known.cache_clear()
    _tuned._log_once.cache_clear()
    yield tmp_path / "cache"
    _tuned._known.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A device "cuda" as far as choosing asks, with a clock that reads TIMES; the number of searches so far."""
    searches = []

    def measure(launches):
        found = [launch() for launch in launches]
        searches.append(found)
        return [TIMES[warps] for warps in found]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "target", lambda device: "hopper")
    monkeypatch.setattr(_tuning, "measure", measure)
    return searches


def kernel(*warps):
    def configs(channels, target):
        return tuple({"num_warps": w} for w in warps)

    return _tuning.Tunable(configs)


def launch(tunable, frames=100, device=DEVICE, also=()):
    return tunable.launch(lambda config: config["num_warps"], device, (512,), (frames,), also)


def test_the_default_without_the_variable(gpu, folder, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_device_name")  # nobody asks for it
    assert launch(kernel(4, 8)) == 4
    assert not gpu
    assert not folder.exists()


def test_the_fastest_with_it_and_from_then_on(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    tunable = kernel(4, 8, 2)
    assert [launch(tunable) for _ in range(3)] == [8, 8, 8]
    assert gpu == [[4, 8, 2]]
    monkeypatch.delenv("WAVLM_FAST_AUTOTUNE")
    another_process = kernel(4, 8, 2)
    _tuned._known.cache_clear()
    assert launch(another_process) == 8
    assert len(gpu) == 1


def test_the_default_unless_another_is_faster_by_more_than_noise(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    monkeypatch.setitem(TIMES, 8, 2.95)
    assert launch(kernel(4, 8)) == 4


def test_a_configuration_that_cannot_be_launched_is_none():
    def refused():
        raise RuntimeError("out of resource: shared memory")

    assert _tuning.measure([refused]) == [float("inf")]


def test_sizes_share_a_choice_up_to_the_next_power_of_two(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    tunable = kernel(4, 8)
    for frames in (65, 100, 128):
        launch(tunable, frames)
    assert len(gpu) == 1
    launch(tunable, 129)
    assert len(gpu) == 2
    launch(tunable, 129, also=("backward",))
    assert len(gpu) == 3


def test_one_look_up_when_the_choice_is_made(gpu, monkeypatch):
    tunable = kernel(4, 8)
    launch(tunable)
    monkeypatch.setattr(tunable, "_choose", None)
    monkeypatch.setattr(tunable, "_function", None)
    assert launch(tunable) == 4


def test_deterministic_algorithms_mean_defaults(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    tunable = kernel(4, 8)
    assert launch(tunable) == 8
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert launch(tunable) == 4
    finally:
        torch.use_deterministic_algorithms(before)
    assert launch(tunable) == 8
    assert len(gpu) == 1


def test_a_capture_neither_searches_nor_settles_the_choice(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    tunable = kernel(4, 8)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert launch(tunable) == 4
        assert not gpu
    assert launch(tunable) == 8
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert launch(tunable) == 8


@pytest.mark.parametrize("where", ["interpreter", "cpu", "meta"])
def test_only_a_device_is_searched_on(gpu, monkeypatch, where):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    if where == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch(kernel(4, 8), device=DEVICE if where == "interpreter" else torch.device(where)) == 4
    assert not gpu


def test_forced_goes_before_everything(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    tunable = kernel(4, 8)
    with _tuning.forced(1):
        assert launch(tunable) == 8
    with _tuning.forced(3):  # the list is shorter
        assert launch(tunable) == 4
    assert not gpu


def test_equal_configurations_are_there_once():
    assert kernel(4, 8, 4)(512, "cuda") == ({"num_warps": 4}, {"num_warps": 8})


def test_a_list_that_grew_is_searched_again(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    launch(kernel(4, 8))
    _tuned._known.cache_clear()
    launch(kernel(4, 8, 2))
    assert gpu == [[4, 8], [4, 8, 2]]


def ship(monkeypatch, config, tunable, frames=100):
    """Let a choice for the device `gpu` come with the package."""
    configs = tunable(512, "hopper")
    buckets = ((frames - 1).bit_length(),)
    place = _tuned.place("NVIDIA H100", tunable.name, configs, ((512, "hopper"), buckets, ()))
    _tuned.SHIPPED.write_text(json.dumps({place: config}))
    _tuned._known.cache_clear()


def test_what_ships_runs_where_the_user_has_found_nothing(gpu, folder, monkeypatch):
    tunable = kernel(4, 8, 2)
    ship(monkeypatch, {"num_warps": 2}, tunable)
    assert launch(tunable) == 2
    assert launch(tunable, 1000) == 4  # of other sizes there is nothing
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 NVL")
    assert launch(kernel(4, 8, 2)) == 4
    assert not gpu
    assert not folder.exists()


def test_a_user_s_own_choice_goes_before_what_ships_and_a_search_does_not_ask_it(gpu, monkeypatch):
    ship(monkeypatch, {"num_warps": 2}, kernel(4, 8, 2))
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    assert launch(kernel(4, 8, 2)) == 8
    assert gpu == [[4, 8, 2]]
    monkeypatch.delenv("WAVLM_FAST_AUTOTUNE")
    _tuned._known.cache_clear()
    assert launch(kernel(4, 8, 2)) == 8
    assert len(gpu) == 1


@pytest.mark.parametrize("damage", ["another list", "no configuration of it", "another source"])
def test_what_ships_for_other_kernels_is_not_used(gpu, monkeypatch, damage):
    shipped = kernel(4, 2) if damage == "another list" else kernel(4, 8, 2)
    ship(monkeypatch, {"num_warps": 16 if damage == "no configuration of it" else 2}, shipped)
    if damage == "another source":
        monkeypatch.setattr(_tuned, "_source", lambda kernel: "0123456789ab")
    assert launch(kernel(4, 8, 2)) == 4


def test_a_source_is_the_kernel_s_file_and_what_it_imports(monkeypatch, tmp_path):
    def digest(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        _tuned._source.cache_clear()
        return _tuned._source("a_kernel.its_configs")

    monkeypatch.setattr(_tuned, "_SOURCES", tmp_path)
    try:
        one = digest(a_kernel="from ._rows import row\nrow(1)\n", _rows="from . import a_kernel\nx = 1\n", other="x")
        assert digest(a_kernel='"""What it does."""\nfrom ._rows import row  # which\n\n    # why\nrow(1)\n') == one
        assert digest(other="y") == one
        imported = digest(_rows="from . import a_kernel\nx = 2\n")
        assert digest(a_kernel="from ._rows import row\nrow(2)\n") not in (one, imported)
        assert imported != one
    finally:
        _tuned._source.cache_clear()


def test_every_shipped_choice_is_of_the_kernels_as_they_are(monkeypatch):
    monkeypatch.undo()
    shipped = json.loads(_tuned.SHIPPED.read_text())
    assert [key for key in shipped if not _tuned.current(key)] == []
    assert _tuned.SHIPPED.parent.samefile(os.path.dirname(_tuned.__file__))


def test_what_a_search_keeps_is_of_the_kernels_as_they_are(gpu, folder, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    launch(kernel(4, 8))
    (key,) = json.loads((folder / "tuned.json").read_text())
    assert _tuned.current(key)
    monkeypatch.setattr(_tuned, "_source", lambda kernel: "0123456789ab")
    assert not _tuned.current(key)
    assert not _tuned.current("no key")


@pytest.mark.parametrize("change", ["device", "version"])
def test_choices_of_another_device_or_version_are_not_used(gpu, monkeypatch, change):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    launch(kernel(4, 8))
    monkeypatch.delenv("WAVLM_FAST_AUTOTUNE")
    _tuned._known.cache_clear()
    if change == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    else:
        monkeypatch.setattr(sys.modules["triton"], "__version__", "0.0")
    assert launch(kernel(4, 8)) == 4


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", '{"key": 3}'])
def test_a_damaged_file_means_defaults_and_is_replaced(gpu, folder, monkeypatch, caplog, text):
    folder.mkdir()
    file = folder / "tuned.json"
    file.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING, "wavlm_fast"):
        assert launch(kernel(4, 8)) == 4
        assert launch(kernel(4, 8), 1000) == 4
    told = [r.message for r in caplog.records]
    assert len(told) == (0 if "key" in text else 1), told
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    assert launch(kernel(4, 8)) == 8
    assert {"num_warps": 8} in json.loads(file.read_text()).values()


def test_a_choice_that_was_tampered_with_is_not_used(gpu, folder, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    launch(kernel(4, 8))
    monkeypatch.delenv("WAVLM_FAST_AUTOTUNE")
    file = folder / "tuned.json"
    file.write_text(json.dumps({key: {"num_warps": 64} for key in json.loads(file.read_text())}))
    _tuned._known.cache_clear()
    assert launch(kernel(4, 8)) == 4


def test_a_folder_that_cannot_be_written_is_told_once(gpu, folder, monkeypatch, caplog):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    folder.write_text("a file where the folder should be")
    tunable = kernel(4, 8)
    with caplog.at_level(logging.WARNING, "wavlm_fast"):
        assert launch(tunable) == 8
        assert launch(tunable, 1000) == 8
    assert ["cannot be written" in r.message for r in caplog.records].count(True) == 1


def test_a_write_that_fails_leaves_the_file_as_it_was(folder, monkeypatch):
    _tuned.write("first", {"num_warps": 4})
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    _tuned.write("second", {"num_warps": 8})
    assert json.loads((folder / "tuned.json").read_text()) == {"first": {"num_warps": 4}}
    assert sorted(p.name for p in folder.iterdir()) == ["tuned.json", "tuned.lock"]


def _writer(name):
    for index in range(20):
        _tuned.write(f"{name} {index}", {"num_warps": index})


def test_processes_that_write_at_once_lose_nothing(folder):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads((folder / "tuned.json").read_text())) == 60


@pytest.mark.parametrize("place", ["WAVLM_FAST_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_where_the_file_lies(monkeypatch, tmp_path, place):
    for name in ("WAVLM_FAST_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(place, str(tmp_path))
    middle = {"WAVLM_FAST_CACHE_DIR": "", "XDG_CACHE_HOME": "wavlm_fast", "HOME": ".cache/wavlm_fast"}[place]
    assert _tuned.path() == tmp_path / middle / "tuned.json"


def test_count(gpu, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_AUTOTUNE", "1")
    assert _tuned.count("NVIDIA H100") == 0
    launch(kernel(4, 8))
    launch(kernel(4, 8), 1000)
    assert _tuned.count("NVIDIA H100") == 2
    assert _tuned.count("NVIDIA H100 NVL") == 0


def test_the_clock_takes_the_median_of_each_round_by_round(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    order = []

    def takes(name, *times):
        def launch():
            order.append(name)
            now[0] += times[len(order) % len(times)]

        return launch

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = _tuning.measure([takes("a", 2.0), takes("b", 1.0, 1.0, 100.0, 1.0, 1.0)])
    assert found == [2.0, 1.0]
    assert order[-4:] == ["a", "b", "a", "b"]
