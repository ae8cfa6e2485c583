"""What ops are cut into for many threads: enough for 64 of them, and the same numbers whatever their number."""

from __future__ import annotations

import pytest
import torch

from wavlm_fast.backends.cpu import extension
from wavlm_fast.benchmarks.ops import cases as ops
from wavlm_fast.benchmarks.ops.tasks import Cut, Loop, calls, cut, main
from wavlm_fast.benchmarks.run import cases

pytestmark = pytest.mark.skipif(extension.problem() is not None, reason=str(extension.problem()))

_SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 2,
}
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
# Ops of these whose sums are not torch's, and the loops of a call at most: threads wait for each other after each.
_OURS = {"gated_attention": 4, "positional_conv": 6, "feature_encoder": 32, "waveform_conv": 24}


def _ran(call):
    found = call()
    found = found if isinstance(found, tuple) else (found,)
    return [x.clone() for x in found if isinstance(x, torch.Tensor)]


def _of(monkeypatch, options, batch, seconds):
    monkeypatch.setitem(cases.MODELS, "base", cases.Spec(options=options))
    return calls("base", batch, seconds, wanted=lambda case: case.op in _OURS and not _is_torchs(case, options))


def _is_torchs(case, options):
    """A gradient through a layer norm of frames is torch's, whose sums depend on threads."""
    return case.op == "waveform_conv" and case.training and options.get("feat_extract_norm") == "layer"


@pytest.mark.parametrize(("options", "batch", "seconds"), [({}, 1, 15.0), (_LAYER_NORM, 3, 1.5)], ids=["long", "short"])
def test_numbers_do_not_depend_on_threads(monkeypatch, options, batch, seconds):
    """Of an utterance in several blocks a part, and of some in a few blocks each."""
    before = torch.get_num_threads()
    try:
        for case, call in _of(monkeypatch, {**_SMALL, **options}, batch, seconds):
            torch.set_num_threads(1)
            wanted = _ran(call)
            for threads in (2, 3, 64):
                torch.set_num_threads(threads)
                for found, one in zip(_ran(call), wanted, strict=True):
                    assert torch.equal(found, one), f"{case.name} on {threads} threads"
    finally:
        torch.set_num_threads(before)


def test_64_threads_have_work_for_ten_seconds(monkeypatch):
    """At the sizes of the base model. In the loops that do the work, each thread has a task or more."""
    for case, call in _of(monkeypatch, {}, 1, 10.0):
        loops = cut(call, 64).loops
        assert max(len(loop.tasks) for loop in loops) >= 64, case.name
        assert len(loops) <= _OURS[case.op], case.name


def test_of_two_threads_each_has_many_tasks_or_one(monkeypatch):
    for case, call in _of(monkeypatch, _SMALL, 1, 1.5):
        for loop in cut(call, 2).loops:
            assert len(loop.tasks) <= 2 or loop.taken, case.name


def test_a_log_tells_every_task_and_leaves_the_result_alone(monkeypatch):
    for case, call in _of(monkeypatch, _SMALL, 1, 1.5):
        wanted, got = _ran(call), []
        found = cut(lambda call=call, got=got: got.extend(_ran(call)), 64)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), case.name
        assert found.work > 0
        assert cut(call, 1).loops == ()


def test_the_last_thread_is_done():
    assert Loop(0.0, True, (3.0, 1.0, 1.0, 1.0, 4.0)).span(2) == 7.0
    assert Loop(0.0, True, (4.0, 1.0, 1.0, 1.0, 3.0)).span(2) == 6.0
    assert Loop(0.0, False, (2.0, 5.0, 3.0)).span(3) == 5.0
    found = Cut(2, (Loop(0.5, True, (1.0, 1.0)), Loop(0.25, False, (2.0, 1.0))), 0.125)
    assert (found.alone, found.work, found.span(0.5)) == (0.875, 5.0, 4.0)


def test_the_command_prints_a_line_for_each_op(monkeypatch, capsys):
    monkeypatch.setitem(cases.MODELS, "base", cases.Spec(options=_SMALL))
    before = torch.get_num_threads()
    try:
        arguments = "--model base --batch 1 --seconds 0.5 --threads 4 --filter attention"
        assert main(arguments.split()) == 0
    finally:
        torch.set_num_threads(before)
    lines = capsys.readouterr().out.splitlines()
    names = [case.name for case in ops.op_cases("base", 1, 0.5) if "attention" in case.name]
    assert [line.split("  ")[0] for line in lines[2:]] == names


def test_a_log_that_nobody_began():
    with pytest.raises(RuntimeError, match="expected begin_task_log before it on this thread, got no log"):
        torch.ops.wavlm_fast_cpu.end_task_log()
    with pytest.raises(RuntimeError, match="threads"):
        torch.ops.wavlm_fast_cpu.begin_task_log(0)
