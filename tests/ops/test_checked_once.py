"""A call like one that was checked is not checked again: what differs in anything that a check sees is."""

from __future__ import annotations

import pytest
import torch

from wavlm_fast import ops
from wavlm_fast.ops import _define


def arguments(**changed):
    given = {"x": torch.ones(1, 3, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5), "activation": "gelu"}
    return tuple((given | changed).values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": torch.ones(5, 3)},
        {"weight": torch.ones(5, 4, 1)},
        {"weight": torch.ones(5, 4, dtype=torch.float64)},
        {"weight": torch.ones(5, 4, device="meta")},
        {"bias": torch.ones(4)},
        {"bias": torch.ones(5, dtype=torch.int64)},
        {"activation": "swish"},
    ],
    ids=range(7),
)
def test_a_wrong_call_is_refused_after_right_ones_and_each_time(wrong):
    for _ in range(2):
        ops.linear_act(*arguments())
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)):
            ops.linear_act(*arguments(**wrong))


def test_equal_calls_are_checked_once_and_others_again(monkeypatch):
    monkeypatch.setattr(_define, "_MOST_MET", 2)
    checked = []
    check = _define._Checked(lambda *args: checked.append(args))
    x = torch.ones(2, 3)
    same = [(x, [x], 1), (torch.zeros(2, 3), (x,), 1)]
    others = [(x, [x], True), (x, [x], 1.0), (x, [x, x], 1), (x, [None], 1), (x.mT.contiguous().mT, [x], 1)]
    for args in (*same, *others):
        check(*args)
    assert len(checked) == 1 + len(others)


def test_a_refused_call_is_not_taken_for_checked():
    def refuse(*args):
        raise ValueError("no")

    check = _define._Checked(refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            check(torch.ones(1))
