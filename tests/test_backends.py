"""Who computes an op: the chooser, its reasons, and the wish for a backend."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
import torch

from wavlm_fast import backends, ops, use_backend
from wavlm_fast.backends import BackendUnavailable, Implementation, choose, current, load

X = torch.ones(2, 3, 4)
ARGS = (X, None)  # of stats_pool
needs_no_triton = pytest.mark.skipif(load("triton").why_not() is None, reason="Triton runs here")


@pytest.fixture(autouse=True)
def _no_wish_from_outside(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def cpu_table(monkeypatch):
    """The table of the cpu backend without entries, which a test may fill."""
    table = {}
    monkeypatch.setattr(load("cpu"), "TABLE", table)
    return table


def in_thread(function):
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def refusing(sentence):
    return Implementation(lambda *args: pytest.fail("a refusing kernel ran"), lambda *args: sentence)


def test_names():
    assert backends.names() == ("reference", "cpu", "triton")
    assert [load(name).NAME for name in backends.names()] == list(backends.names())


@pytest.mark.parametrize("name", backends.names())
def test_tables_hold_known_ops(name):
    assert set(load(name).TABLE) <= set(load("reference").TABLE)
    assert all(isinstance(entry, Implementation) for entry in load(name).TABLE.values())


def test_the_fastest_comes_first(cpu_table):
    cpu_table["stats_pool"] = Implementation(lambda x, lengths: "cpu")
    choice = choose("stats_pool", ARGS)
    assert (choice.backend, choice.refused) == ("cpu", ())
    assert choice.fn(*ARGS) == "cpu"


def test_no_kernel(cpu_table):
    choice = choose("stats_pool", ARGS)
    assert choice.backend == "reference"
    assert choice.refused == (("cpu", "no cpu kernel for stats_pool"),)


def test_a_kernel_refuses(cpu_table):
    cpu_table["stats_pool"] = refusing("head_dim 80 is not supported")
    choice = choose("stats_pool", ARGS)
    assert choice.backend == "reference"
    assert choice.refused == (("cpu", "head_dim 80 is not supported"),)
    ops.stats_pool(X)


def test_a_backend_refuses_before_its_kernel_is_asked(cpu_table, monkeypatch):
    monkeypatch.setattr(load("cpu"), "why_not", lambda device=None: "too old a CPU")
    cpu_table["stats_pool"] = Implementation(lambda *args: None, lambda *args: pytest.fail("asked"))
    assert choose("stats_pool", ARGS).refused == (("cpu", "too old a CPU"),)


def test_refusals_see_the_arguments(cpu_table):
    def why_not(x, lengths):
        return None if lengths is None else "lengths are not supported"

    cpu_table["stats_pool"] = Implementation(lambda *args: None, why_not)
    assert choose("stats_pool", ARGS).backend == "cpu"
    assert choose("stats_pool", (X, torch.tensor([1, 2]))).backend == "reference"


def test_order_follows_the_device():
    assert choose("stats_pool", (X.to("meta"), None)).backend == "reference"


def test_cpu_wants_cpu_tensors():
    assert load("cpu").why_not(torch.device("cpu")) is None
    assert load("cpu").why_not(torch.device("cuda")) == "the cpu backend needs tensors on the CPU, these are on cuda"


def test_the_reference_never_refuses():
    assert load("reference").why_not() is None
    assert load("reference").why_not(torch.device("meta")) is None


def test_triton_says_why_not(monkeypatch):
    triton = load("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert triton.why_not().startswith("Triton cannot be imported (")


@needs_no_triton
def test_a_backend_asked_for_by_name_must_be_usable():
    with pytest.raises(BackendUnavailable, match=r"^the triton backend cannot be used here: \w"), use_backend("triton"):
        pytest.fail("entered")


def test_by_name(cpu_table):
    cpu_table["stats_pool"] = Implementation(lambda x, lengths: "cpu")
    with use_backend("cpu"):
        assert choose("stats_pool", ARGS).backend == "cpu"
        without = choose("tdnn", (X,))
    assert without.backend == "reference"
    assert without.refused == (("cpu", "the cpu backend has no kernel for tdnn"),)
    with use_backend("reference"):
        assert choose("stats_pool", ARGS).backend == "reference"


def test_a_refusal_of_a_named_backend_is_an_error(cpu_table):
    cpu_table["stats_pool"] = refusing("head_dim 80 is not supported")
    sentence = "^stats_pool cannot run on the cpu backend: head_dim 80 is not supported$"
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=sentence):
        ops.stats_pool(X)
    assert issubclass(BackendUnavailable, RuntimeError)


def test_unknown_name():
    sentence = "^the backend must be one of 'auto', 'reference', 'cpu', 'triton', got 'gpu'$"
    with pytest.raises(ValueError, match=sentence), use_backend("gpu"):
        pytest.fail("entered")


def test_nesting():
    assert current() == "auto"
    with use_backend("reference"):
        with use_backend("cpu"):
            assert current() == "cpu"
            with use_backend("auto"):
                assert current() == "auto"
            assert current() == "cpu"
        assert current() == "reference"
    assert current() == "auto"


def test_an_error_inside_ends_the_wish():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert current() == "auto"


def test_threads_have_their_own_wish():
    with use_backend("reference"):
        assert in_thread(current) == "auto"


def test_environment(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert current() == "reference"
    assert in_thread(current) == "reference"
    with use_backend("cpu"):
        assert current() == "cpu"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "")
    assert current() == "auto"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"^the environment variable WAVLM_FAST_BACKEND must be .*, got 'fast'$"):
        ops.stats_pool(X)


def test_reasons_are_logged_once(cpu_table, caplog):
    cpu_table["stats_pool"] = refusing("of a reason that no other test has")
    with caplog.at_level(logging.INFO, logger="wavlm_fast"):
        for _ in range(3):
            ops.stats_pool(X)
    lines = [r.getMessage() for r in caplog.records if "no other test has" in r.getMessage()]
    assert lines == ["stats_pool does not run on the cpu backend: of a reason that no other test has"]


@pytest.fixture
def seen(cpu_table):
    """Which backward kernels run; the cpu backend's are the reference's, recorded."""
    found = []
    for op in ("stats_pool", "stats_pool_backward"):
        right = load("reference").TABLE[op].fn
        cpu_table[op] = Implementation(lambda *args, op=op, right=right: found.append(op) or right(*args))
    return found


def backward(out):
    out.sum().backward()


@pytest.mark.parametrize("run", [lambda f: f(), in_thread], ids=["this thread", "another thread"])
def test_the_gradient_follows_the_forward_pass(seen, run):
    x = torch.randn(2, 3, 4, requires_grad=True)
    with use_backend("cpu"):
        out = ops.stats_pool(x)
    with use_backend("reference"):
        run(lambda: backward(out))
    assert seen == ["stats_pool", "stats_pool_backward"]
    seen.clear()
    with use_backend("reference"):
        out = ops.stats_pool(x)
    run(lambda: backward(out))
    assert seen == []
    assert x.grad is not None


def test_the_gradient_leaves_no_wish_behind(seen):
    x = torch.randn(2, 3, 4, requires_grad=True)
    with use_backend("cpu"):
        out = ops.stats_pool(x)
    backward(out)
    assert current() == "auto"


@pytest.fixture
def torch_trains(monkeypatch):
    """The cpu backend knows torch to train linear_act faster, of up to three frames."""
    why = lambda op, x, weight: "it snows" if op == "linear_act" and x.shape[0] <= 3 else None  # noqa: E731
    monkeypatch.setattr(load("cpu"), "why_torch_trains", why)


def linear_in(frames, learns, weight=None):
    """The name of what recorded the gradient, and what was chosen."""
    weight = torch.ones(2, 4, requires_grad=learns) if weight is None else weight
    with backends.noting() as noted:
        out = ops.linear_act(torch.ones(frames, 4), weight)
    return out.grad_fn.name() if out.grad_fn else None, [(op, choice.backend, choice.refused) for op, choice in noted]


def test_the_environment_is_read_at_each_call(monkeypatch):
    assert current() == "auto"
    for name, wanted in (("reference", "reference"), ("", "auto"), ("cpu", "cpu")):
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
        assert current() == wanted
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE)
    assert current() == "auto"
    monkeypatch.setattr("os.environ", {backends.ENVIRONMENT_VARIABLE: "reference"})  # nothing of Python's own
    assert current() == "reference"
    monkeypatch.setattr("os.environ", {})
    assert current() == "auto"


def test_what_torch_trains_faster_is_plain_torch(torch_trains):
    recorded, chosen = linear_in(3, True)
    assert "wavlm_fast" not in recorded
    assert chosen == [("linear_act", "reference", (("cpu", "it snows"),))]
    assert "wavlm_fast" in linear_in(4, True)[0]  # too many frames


def test_a_slower_backend_asked_for_by_name_computes(torch_trains):
    for name in ("cpu", "reference"):
        with use_backend(name):
            recorded, chosen = linear_in(3, True)
        assert "wavlm_fast" in recorded
        assert [(op, backend) for op, backend, _ in chosen] == [("linear_act", name)]


def test_without_a_gradient_of_the_weight_nothing_is_left_to_torch(torch_trains):
    for learns, grad in ((False, True), (True, False)):
        with torch.set_grad_enabled(grad):
            _, chosen = linear_in(3, learns)
        assert [(op, "it snows" in str(refused)) for op, _, refused in chosen] == [("linear_act", False)]


def test_wrong_arguments_of_what_torch_trains_are_refused(torch_trains):
    with pytest.raises(ValueError, match="linear_act wants x of shape"):
        linear_in(3, True, torch.ones(2, 5, requires_grad=True))


def test_a_compiled_graph_keeps_what_torch_trains(torch_trains):
    ops_seen = []

    def look(graph, _):
        ops_seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    weight = torch.ones(2, 4, requires_grad=True)
    torch.compile(lambda x: ops.linear_act(x, weight), backend=look)(torch.ones(3, 4))
    assert any("wavlm_fast" in op for op in ops_seen)


def test_wrong_arguments_are_refused_before_any_backend_is_asked(cpu_table):
    cpu_table["stats_pool"] = Implementation(lambda *args: None, lambda *args: pytest.fail("asked"))
    with pytest.raises(ValueError, match="stats_pool wants x of shape"):
        ops.stats_pool(X[0])


OP = """
from wavlm_fast.backends import Implementation
TABLE = {"stats_pool": Implementation(lambda x, *rest: x.new_full((2, 8), 4.0))}
"""
BACKEND = """
NAME, DEVICES, RANK = "fourth", %s, %s
def why_not(device=None):
    return None
"""
GATHERS = """
from wavlm_fast.backends import gather
TABLE = gather(__name__, __path__)
"""


@pytest.fixture(params=["file", "folder"])
def fourth(request, tmp_path, monkeypatch):
    """Puts another backend beside ours, which nobody is told of."""

    def forget():
        for known in (load, backends.names, backends._found, backends._serving):
            known.cache_clear()
        for name in [name for name in sys.modules if name.startswith("wavlm_fast.backends.fourth")]:
            del sys.modules[name]

    def put(devices, rank):
        says = BACKEND % (devices, rank)
        if request.param == "file":
            tmp_path.joinpath("fourth.py").write_text(says + OP)
        else:
            tmp_path.joinpath("fourth").mkdir()
            tmp_path.joinpath("fourth", "__init__.py").write_text(says + GATHERS)
            tmp_path.joinpath("fourth", "stats_pool.py").write_text(OP)
            tmp_path.joinpath("fourth", "engine.py").write_text("")
        forget()

    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    monkeypatch.setattr(backends, "fourth", None, raising=False)  # the import sets it
    yield put
    forget()


def test_a_fourth_backend_is_found(fourth):
    fourth(("cpu",), 1.5)
    assert backends.names() == ("reference", "cpu", "fourth", "triton")
    assert choose("stats_pool", ARGS).backend == "fourth"
    assert torch.equal(ops.stats_pool(X), torch.full((2, 8), 4.0))
    others = choose("stats_pool_backward", (X.new_ones(2, 8), X, None, X.new_ones(2, 8), None))
    assert ("fourth", "no fourth kernel for stats_pool_backward") in others.refused
    with use_backend("fourth"):
        assert choose("stats_pool", ARGS).backend == "fourth"
    with use_backend("reference"):
        assert not torch.equal(ops.stats_pool(X), torch.full((2, 8), 4.0))


def test_a_fourth_backend_has_its_place(fourth, cpu_table):
    cpu_table["stats_pool"] = Implementation(lambda *args: None)
    fourth(("cpu", "meta"), 0.5)
    assert choose("stats_pool", ARGS).backend == "cpu"
    assert choose("stats_pool", (X.to("meta"), None)).backend == "fourth"
    del cpu_table["stats_pool"]
    assert choose("stats_pool", ARGS).backend == "fourth"


def test_a_fourth_backend_of_other_devices_is_not_asked(fourth):
    fourth(("xpu",), 9)
    assert "fourth" in backends.names()
    assert choose("stats_pool", ARGS).backend in ("cpu", "reference")
    assert not any(name == "fourth" for name, _ in choose("stats_pool", (X.double(), None)).refused)


def test_importing_opens_no_backend_and_finding_them_needs_nothing():
    code = """
import sys
sys.modules["triton"] = None
import wavlm_fast
print([name for name in sys.modules if name.startswith("wavlm_fast.backends.")])
from wavlm_fast import backends
print(*backends.names())
print(backends.load("cpu").extension.problem.cache_info().currsize)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "reference cpu triton", "0"]
