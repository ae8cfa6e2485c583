"""Derived weights follow the weights that they were computed from, and die with them."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from doubles import Double, fingerprint  # noqa: F401 (a fixture of every test here)
from torch import nn

import wavlm_fast.derived
from wavlm_fast.derived import derived, forget, nbytes, values


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
    weight.data.add_(1)
    assert_rebuilt(double)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128], ids=str)
def test_write_through_data_of_one_that_is_not_contiguous(dtype):
    weight = torch.arange(60 * 70).remainder(100).to(dtype).view(60, 70).t()
    double = Double(weight)
    double()
    for part in (weight[:35], weight[35:], weight[:, ::2], weight[1::2]):
        part.data.add_(1)
        assert_rebuilt(double)


def test_other_strides_over_the_same_memory():
    weight = nn.Parameter(torch.arange(9.0).view(3, 3), requires_grad=False)
    double = Double(weight)
    double()
    weight.data = weight.data.t()
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


class TestInferenceTensors:
    """They count no versions: all of their values are looked at, or nothing is kept."""

    @pytest.fixture
    def weight(self):
        with torch.inference_mode():
            return torch.randn(70, 3000)

    @pytest.fixture
    def double(self, weight):
        made = Double(weight)
        made()
        return made

    def check(self, double):
        wanted = torch.cat([s.flatten() for s in double.sources]) * 2
        assert torch.equal(double(), wanted)

    def test_are_kept_where_all_values_can_be_looked_at(self, double):
        kept = wavlm_fast.derived._fingerprint is not None
        assert (double() is double()) == kept
        with torch.inference_mode():
            assert (double() is double()) == kept
        assert not double().is_inference() or not kept

    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_number_of_threads_is_no_change(self, double, threads):
        before, built = torch.get_num_threads(), double.built
        try:
            torch.set_num_threads(threads)
            double()
        finally:
            torch.set_num_threads(before)
        assert double.built == built or wavlm_fast.derived._fingerprint is None

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.mul_(2),
            lambda w: w.neg_(),
            lambda w: w[33].neg_(),
            lambda w: w[:, 1234].add_(1),
            lambda w: w[69, 2999].add_(1),
            lambda w: w[0, 0].neg_(),
            lambda w: w[5:7, 10:12].copy_(w[5:7, 10:12].flip(0)),
            lambda w: w.copy_(w.roll(1, 0)),
            lambda w: w.data.copy_(w.roll(1, 1)),
        ],
        ids=["whole", "signs", "row", "column", "last", "first", "swap", "rows moved", "columns moved"],
    )
    def test_every_write_is_seen(self, weight, double, write):
        with torch.inference_mode():
            write(weight)
            self.check(double)
        self.check(double)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
    def test_signs_and_odd_sizes(self, dtype):
        with torch.inference_mode():
            weight = torch.randn(4099).mul(50).to(dtype)
            double = Double(weight)
            double()
            for index in (0, 63, 64, 4095, 4096, 4098):
                weight[index] = weight[index] + 1
                self.check(double)
            weight.copy_(weight * (255 if dtype == torch.uint8 else -1))
            self.check(double)

    def test_not_contiguous(self, weight):
        double = Double(weight.t())
        double()
        with torch.inference_mode():
            weight[3, 5] += 1
        self.check(double)

    def test_none_at_all(self):
        with torch.inference_mode():
            assert Double(torch.empty(0, 3))().shape == (0,)


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


@pytest.mark.parametrize("kept", range(3))
def test_dies_with_the_first_of_its_sources(kept):
    sources = [nn.Parameter(torch.ones(5), requires_grad=False) for _ in range(3)]
    stays = sources[kept]
    for _ in range(20):
        value = weakref.ref(Double(*sources)())
        assert len(values([stays])) == 1
        assert nbytes([stays]) == nbytes(sources) == 15 * 4
        sources = [s if s is stays else nn.Parameter(torch.ones(5), requires_grad=False) for s in sources]
        assert value() is None
        assert not values([stays])


def test_what_was_derived_from_a_derived_value_dies_too():
    a, b = (nn.Parameter(torch.ones(5), requires_grad=False) for _ in range(2))
    outer = weakref.ref(Double(Double(a, b)())())
    assert len(values([a])) == len(values([b])) == 2
    del b
    assert outer() is None
    assert not values([a])


def test_a_change_leaves_nothing_of_the_old_value(weight, double):
    old = weakref.ref(double())
    weight.add_(1)
    double()
    assert old() is None
    assert len(values([weight])) == 1


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


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors on a device whose values are not at hand, but for that the values are there."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))


def test_nothing_is_kept_where_values_cannot_be_looked_at(weight, elsewhere):
    double = Double(weight)
    for _ in range(2):
        weight.data[0, 0] += 1
        assert_fresh(double)
    assert nbytes([weight]) == 0


def assert_fresh(double):
    built = double.built
    assert torch.equal(double(), torch.cat([s.flatten() for s in double.sources]) * 2)
    assert double.built == built + 1


def test_nothing_is_kept_of_tensors_without_values():
    double = Double(torch.empty(2, 3, device="meta"))
    assert double() is not double()
    mixed = Double(nn.Parameter(torch.ones(3), requires_grad=False), torch.empty(3, device="meta"))
    with pytest.raises(RuntimeError, match="device"):
        mixed()
    assert double.built == 2
    assert nbytes([*double.sources, *mixed.sources]) == 0


def test_what_does_not_pay_at_once_is_built_when_it_is_met_again(weight):
    double = Double(weight)
    again = lambda: derived("again", (weight,), double._build, if_met_before=True)  # noqa: E731
    assert again() is None
    assert nbytes([weight]) == 0
    assert again() is again()
    assert double.built == 1
    weight.add_(1)
    assert again() is None
    assert torch.equal(derived("again", (weight,), double._build), weight.flatten() * 2)
    assert again() is again()
    assert double.built == 2
    weight.requires_grad_(True)
    assert again() is None


def test_what_frees_its_sources_is_built_at_once(weight):
    double, wanted = Double(weight), weight.flatten() * 2
    with wavlm_fast.derived.releasing():
        value = derived("freed", (weight,), double._build, replaces=True, if_met_before=True)
    assert torch.equal(value, wanted)
    assert derived("freed", (weight,), double._build, replaces=True, if_met_before=True) is value
