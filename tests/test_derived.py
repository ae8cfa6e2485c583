"""Derived weights follow the weights that they were computed from, and die with them."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import wavlm_fast.derived
from wavlm_fast.backends import cpu
from wavlm_fast.derived import derived, forget, nbytes


@pytest.fixture(autouse=True, params=["C++", "Python"])
def fingerprint(request, monkeypatch):
    """Changes are seen in two ways, with the extension and without."""
    if request.param == "Python":
        monkeypatch.setattr(wavlm_fast.derived, "_fingerprint", None)
    elif cpu.EXTENSION_PROBLEM is not None:
        pytest.skip(cpu.EXTENSION_PROBLEM)


class Double:
    """Twice the parameters, side by side; counts how often they are computed."""

    def __init__(self, *sources, kind="double"):
        self.sources, self.kind, self.built = sources, kind, 0

    def __call__(self):
        return derived(self.kind, self.sources, self._build)

    def _build(self):
        self.built += 1
        return torch.cat([s.flatten() for s in self.sources]) * 2


@pytest.fixture
def weight():
    return nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)


@pytest.fixture
def double(weight):
    made = Double(weight)
    made()
    assert made.built == 1
    return made


def assert_rebuilt(double):
    wanted = torch.cat([s.flatten() for s in double.sources]) * 2
    built = double.built
    assert torch.equal(double(), wanted)
    assert double.built == built + 1
    assert double() is double()
    assert double.built == built + 1


def test_is_kept(double):
    assert double() is double()
    assert double.built == 1


def test_in_place_update(weight, double):
    with torch.no_grad():
        weight.add_(1)
    assert_rebuilt(double)


def test_write_through_data(weight, double):
    weight.data.mul_(3)
    assert_rebuilt(double)
    weight.data[1, 2] = -1  # a single value, of few
    assert_rebuilt(double)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str
)
@pytest.mark.parametrize("size", [1, 63, 64, 127, 128, 4096, 4160])
def test_write_through_data_of_half_the_elements(dtype, size):
    weight = torch.arange(2 * size).remainder(100).to(dtype)
    for part in (weight[:size], weight[size:], weight[::2], weight[1::2]):
        double = Double(weight)
        double()
        part.data.add_(1)
        assert_rebuilt(double)


def test_not_contiguous(weight):
    double = Double(weight.t())
    double()
    assert double() is double()
    with torch.no_grad():
        weight.add_(1)
    assert_rebuilt(double)


@pytest.mark.parametrize("view", [lambda x: x.view(3, 2), lambda x: x.view(-1), lambda x: x.view(torch.int32)])
def test_another_shape_or_dtype_in_the_same_memory(weight, double, view):
    before = double()
    weight.data = view(weight.data)
    assert double() is not before


def test_new_data(weight, double):
    weight.data = torch.ones(2, 3)
    assert_rebuilt(double)


def test_load_state_dict():
    layer = nn.Linear(3, 2).requires_grad_(False)
    double = Double(layer.weight)
    double()
    layer.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert_rebuilt(double)


def test_optimizer_step():
    weight = nn.Parameter(torch.ones(3))
    double = Double(weight)
    with torch.no_grad():
        double()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert_rebuilt(double)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype):
    layer = nn.Linear(3, 2).requires_grad_(False)
    Double(layer.weight)()
    layer.to(dtype)
    assert Double(layer.weight)().dtype == dtype


def test_device():
    layer = nn.Linear(3, 2).requires_grad_(False)
    Double(layer.weight)()
    layer.to("meta")
    assert Double(layer.weight)().device.type == "meta"


def test_second_source_changes(weight):
    other = nn.Parameter(torch.ones(2), requires_grad=False)
    double = Double(weight, other)
    double()
    other.add_(1)
    assert_rebuilt(double)


def test_kinds_and_partners_do_not_meet(weight):
    others = [nn.Parameter(torch.full((2,), float(i)), requires_grad=False) for i in range(2)]
    made = [Double(weight, o, kind=k) for o in others for k in "ab"]
    values = [d() for d in made]
    for d, v in zip(made, values, strict=True):
        assert d() is v
    assert len({id(v) for v in values}) == 4


def test_is_not_kept_while_a_gradient_may_be_wanted():
    weight = nn.Parameter(torch.ones(3))
    double = Double(weight)
    out = double()
    assert out.requires_grad
    assert double() is not out
    with torch.no_grad():
        kept = double()
        assert double() is kept
        assert not kept.requires_grad
    assert double().requires_grad
    with torch.inference_mode():
        assert double() is kept


def test_first_use_under_inference_mode_leaves_nothing_that_training_trips_over():
    weight = nn.Parameter(torch.ones(3))
    double = Double(weight)
    with torch.inference_mode():
        double()
    with torch.no_grad():
        kept = double()
    (kept * nn.Parameter(torch.ones(3))).sum().backward()


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        weight = torch.ones(3)
        double = Double(weight)
        assert double() is not double()


def test_subclasses_are_not_kept():
    class Mine(torch.Tensor):
        pass

    double = Double(torch.ones(3).as_subclass(Mine))
    assert double() is not double()


def test_dies_with_its_source():
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    value = weakref.ref(Double(weight)())
    assert value() is not None
    del weight
    gc.collect()
    assert value() is None


def test_memory_and_forgetting(weight, double):
    assert nbytes([weight]) == 6 * 4
    Double(weight, kind="again")()
    assert nbytes([weight]) == 2 * 6 * 4
    assert nbytes([nn.Parameter(torch.ones(1))]) == 0
    forget([weight])
    assert nbytes([weight]) == 0
    assert_rebuilt(double)


def test_copies_start_without():
    import copy

    layer = nn.Linear(3, 2).requires_grad_(False)
    Double(layer.weight)()
    assert nbytes(copy.deepcopy(layer).parameters()) == 0


def test_threads_build_once(weight):
    double, start, found = Double(weight), threading.Barrier(8), []

    def run():
        start.wait()
        with torch.no_grad():
            found.append(double())

    threads = [threading.Thread(target=run) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert double.built == 1
    assert all(f is found[0] for f in found)
