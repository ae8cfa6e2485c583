"""A call that looks like an earlier one goes past the dispatcher, and never past anybody who has a part in it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wavlm_fast import ops
from wavlm_fast.ops._direct import look_if_handed_on, look_of

OP = "wavlm_fast::linear_act"


@pytest.fixture
def arguments():
    """Of a call that has been met."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    call(x, weight, bias)
    return x, weight, bias


def call(x, weight, bias):
    return ops.linear_act(x, weight, bias, "gelu")


def is_dispatched(*arguments):
    """Whether a call comes to the op's kernel by the dispatcher."""
    met = set()
    sys.setprofile(lambda frame, event, arg: met.add(frame.f_code.co_name))
    try:
        call(*arguments)
    finally:
        sys.setprofile(None)
    assert "compute" in met
    return "dispatched" in met


def test_a_call_that_was_met_is_not_dispatched_and_gives_the_same(arguments):
    assert not is_dispatched(*arguments)
    x, weight, bias = arguments
    fresh = torch.randn(7, 4)
    assert is_dispatched(fresh, weight, bias)
    assert not is_dispatched(fresh, weight, bias)
    wanted = torch.ops.wavlm_fast.linear_act(x, weight, bias, "gelu", False)[0]
    assert torch.equal(call(*arguments), wanted)


def test_weights_that_learn_are_no_matter_where_no_gradient_is_recorded(arguments):
    x, weight, bias = arguments
    learning = torch.nn.Parameter(weight)
    with torch.no_grad():
        assert not is_dispatched(x, learning, bias)
    assert is_dispatched(x, learning, bias)
    assert call(x, learning, bias).requires_grad
    listed = [torch.randn(3, requires_grad=True)]
    assert look_if_handed_on((x, [bias])) is not None
    assert look_if_handed_on((x, listed)) is None


def test_modes_hear_of_it(arguments):
    heard = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func.name())
            return func(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            heard.append(getattr(func, "name", str)())
            return func(*args, **(kwargs or {}))

    for mode in (Dispatched, Called):
        heard.clear()
        with mode():
            call(*arguments)
        assert OP in heard, mode


def test_profiles_name_it(arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*arguments)
    assert OP in {event.key for event in profile.key_averages()}


def test_subclasses_hear_of_it(arguments):
    heard = []

    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            heard.append(getattr(func, "name", str)())
            return super().__torch_function__(func, types, args, kwargs)

    x, weight, bias = arguments
    call(x, weight.as_subclass(Told), bias)
    assert OP in heard


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_parameters_in_another_layout_are_refused_each_time(layout):
    x, weight = torch.randn(3, 4), torch.ones(4, 4)
    ops.linear_act(x, weight)
    other = torch.nn.Parameter(getattr(weight, layout)(), requires_grad=False)
    op = torch.ops.wavlm_fast.linear_act
    for _ in range(2):
        with pytest.raises(ValueError, match="wants weight strided"):
            op(x, other, None, "none", False)
    try:  # some have strides, which tell nothing
        look = look_of((other,))
    except RuntimeError:
        return
    dense = torch.empty_strided(other.shape, other.stride(), dtype=other.dtype)
    assert look != look_of((dense,))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_that_are_more_than_memory_are_dispatched(mode):
    made = torch.randn(3, 4)
    with mode():
        plain = torch.randn(3, 4)
        assert look_if_handed_on((plain, made)) is not None
        conjugate = torch.randn(3, 4, dtype=torch.complex64).conj()
        for other in (conjugate, conjugate.imag, made.to_sparse(), made.to_mkldnn()):
            assert look_if_handed_on((plain, other)) is None


def test_autocast_lowers_it(arguments):
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*arguments).dtype == torch.bfloat16


def test_traces_and_transforms_see_it(arguments):
    x, weight, bias = arguments
    traced = make_fx(call)(*arguments)
    assert "wavlm_fast.linear_act" in traced.code
    assert OP in str(torch.jit.trace(lambda *args: call(*args), arguments).inlined_graph)
    call(x[:1], weight, bias)
    dispatched = []  # to Triton, which would read the memory of all rows at once, as to others

    def of_row(row):
        dispatched.append(is_dispatched(row, weight, bias))
        return row

    torch.func.vmap(of_row)(x[:, None])
    assert dispatched == [True]


def test_while_a_model_is_leaving_eager_torch_nothing_goes_past_the_dispatcher(arguments):
    """Of forward-mode derivatives no key of a tensor tells."""
    looks = []

    def look(x):
        looks.append(look_if_handed_on((x,)))
        return x + 1

    with torch.autograd.forward_ad.dual_level():
        look(arguments[0])
    torch.jit.trace(look, arguments[:1], check_trace=False)
    assert looks == [None, None]


def test_gradients_of_many_at_once_see_it():
    """By torch's older vmap, of which nothing but the tensors themselves tell."""
    x, weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    out = call(x, weight, bias)
    wanted = [torch.autograd.grad(out, (x, weight), grad, retain_graph=True) for grad in torch.eye(15).view(15, 3, 5)]
    got = torch.autograd.grad(out, (x, weight), torch.eye(15).view(15, 3, 5), is_grads_batched=True)
    for batched, each in zip(got, zip(*wanted)):
        assert torch.allclose(batched, torch.stack(each), atol=1e-5)


def test_graphs_hold_it(arguments):
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    got = torch.compile(call, backend=look, fullgraph=True)(*arguments)
    assert any("linear_act" in str(node.target) for node in graphs[0].graph.nodes)
    assert torch.equal(got, call(*arguments))
