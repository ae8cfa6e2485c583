"""Who is slower than plain torch, given timings."""

import itertools

import pytest

from wavlm_fast.benchmarks.ops import losers


def of(ours, torch):
    return losers.Compared.of("linear_act 1x2", "fp32", ours, torch)


@pytest.mark.parametrize(("ours", "loses"), [(0.5, False), (1.0, False), (1.02, False), (1.04, True), (3.0, True)])
def test_three_percent_are_allowed(ours, loses):
    assert of([ours] * 5, [1.0] * 5).loses == loses


def test_rounds_are_compared_with_themselves():
    """A machine that slows down meets both: what counts is each round's ratio, not who has the fastest run."""
    found = of([1.0, 2.0, 4.0, 8.0, 0.1], [1.1, 2.2, 4.4, 8.8, 0.05])
    assert found.ratio == pytest.approx(1.1)
    assert not found.loses
    assert (found.ours, found.torch) == (2.0, 2.2)


def test_losers_are_told_the_worst_first():
    bad, worse, good = of([2.0], [1.0]), of([3.0], [1.0]), of([1.0], [2.0])
    heading, head, *lines = losers.told([bad, good, worse])
    assert heading == "2 of 3 ops are slower than plain torch"
    assert head == losers.HEAD
    assert [line.split()[-1] for line in lines] == ["0.33", "0.50"]
    assert losers.told([good]) == ["0 of 1 ops are slower than plain torch"]


@pytest.mark.parametrize(
    ("looks", "asked", "loses"), [([1.0], 1, False), ([2.0, 1.0], 2, False), ([2.0, 1.5], 2, True)]
)
def test_a_loser_is_measured_anew(monkeypatch, looks, asked, loses):
    """With more rounds, and the second look's word counts."""
    seen = []

    def interleave(calls, rounds, budget):
        seen.append((rounds, budget))
        return {"ours": [looks[len(seen) - 1]] * 3, "torch": [1.0] * 3}

    monkeypatch.setattr(losers.measure, "interleave", interleave)
    assert losers.compare("op", "fp32", lambda: None, lambda: None).loses == loses
    assert len(seen) == asked
    assert all(later[0] > earlier[0] and later[1] > earlier[1] for earlier, later in itertools.pairwise(seen))
