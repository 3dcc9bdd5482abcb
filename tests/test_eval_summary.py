"""Means, intervals and paired differences of an evaluation, against tables, definitions and simulation."""

from __future__ import annotations

import random
import statistics

import pytest

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation import plots, summary


def row(task, mode, index, score=None, nll=None, length=1024):
    return {"task": task, "length": length, "mode": mode, "index": index, "score": score, "nll": nll}


def rows(task, mode, scores, length=1024):
    return [row(task, mode, index, score, length=length) for index, score in enumerate(scores)]


def line(lines, task, mode, length=1024):
    (found,) = (one for one in lines if (one.task, one.mode, one.length) == (task, mode, length))
    return found


# two-sided 95 % and 99 % points of printed tables of Student's distribution
@pytest.mark.parametrize(
    ("freedom", "at_95", "at_99"),
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (5, 2.571, 4.032),
        (9, 2.262, 3.250),
        (10, 2.228, 3.169),
        (29, 2.045, 2.756),
        (30, 2.042, 2.750),
        (120, 1.980, 2.617),
    ],
)
def test_student(freedom, at_95, at_99):
    assert summary.student(freedom) == pytest.approx(at_95, abs=5.1e-4)
    assert summary.student(freedom, 0.99) == pytest.approx(at_99, abs=5.1e-4)


def test_student_of_many_is_normal():
    assert summary.student(100_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-4)


def test_a_mean_by_hand():
    """Mean 3, variance 2.5, so that the interval is 2.776 * sqrt(2.5 / 5)."""
    found = summary.estimate([[1, 2, 3, 4, 5]])
    assert found.mean == 3 and found.samples == 5 and found.half == pytest.approx(2.776 * 0.5**0.5, abs=1e-3)
    assert str(found) == "3.000 ± 1.963"
    assert summary.estimate([[0.25]]) == (0.25, None, 1) and str(summary.estimate([[-1e-9]])) == "0.000"
    assert summary.estimate([[1, 1, 1]]) == (1, 0, 3)
    assert summary.estimate([]) is summary.estimate([[]]) is summary.estimate([[1, 2], []]) is None


def test_a_mean_of_tasks_by_hand():
    """Welch and Satterthwaite: parts 0.5 and 0.125 of the variance with 1 and 3 degrees of freedom give 1.53, so 1."""
    found = summary.estimate([[0, 2], [5, 6, 7, 8]])
    parts = [2 / 2 / 4, (5 / 3) / 4 / 4]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 3)
    assert 1 < freedom < 2 and found.mean == (1 + 6.5) / 2 and found.samples == 6
    assert found.half == pytest.approx(12.706 * sum(parts) ** 0.5, rel=1e-4)
    same = summary.estimate([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])  # 8 degrees of freedom
    assert same.half == pytest.approx(2.306 * (2.5 / 5 / 2) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("tasks", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(tasks):
    source, held = random.Random(4), 0
    for _ in range(2000):
        drawn = [[source.gauss(task, 1 + task) for _ in range(6)] for task in range(tasks)]
        found = summary.estimate(drawn)
        held += abs(found.mean - (tasks - 1) / 2) <= found.half
    assert 0.93 < held / 2000 < 0.975


def test_differences_are_paired():
    """Scores that vary much and differ by a constant have a difference without width."""
    dense = [0.1, 0.9, 0.4, 0.6]
    lines = summary.summarize(rows("a", "dense", dense) + rows("a", "sparse", [x - 0.1 for x in dense]))
    sparse = line(lines, "a", "sparse")
    assert sparse.score.half > 0.5 and sparse.score_over_base.mean == pytest.approx(-0.1)
    assert sparse.score_over_base.half == pytest.approx(0, abs=1e-9) and sparse.nll is sparse.nll_over_base is None
    assert line(lines, "a", "dense").score_over_base is None


def test_differences_are_of_the_samples_that_both_have():
    lines = summary.summarize(rows("a", "dense", [0, 1, 0]) + rows("a", "sparse", [1, 1]))
    assert line(lines, "a", "sparse").score_over_base[::2] == (0.5, 2)
    assert line(lines, "a", "sparse").score.samples == 2
    without = summary.summarize(rows("a", "sparse", [1, 1]))
    assert without[0].score_over_base is None
    other = summary.summarize(rows("a", "dense", [0, 1]) + rows("a", "sparse", [1, 1]), base="sparse")
    assert line(other, "a", "dense").score_over_base.mean == -0.5
    assert line(other, "a", "sparse").score_over_base is None


def test_groups_are_means_of_tasks():
    """The mean of the tasks' means, not of all samples; only where every task of the group has the mode."""
    data = rows("ruler_a", "dense", [1, 1, 1, 1]) + rows("ruler_b", "dense", [0, 0]) + rows("own", "dense", [1])
    data += rows("ruler_a", "sparse", [1, 1, 0, 0]) + rows("ruler_a", "dense", [0, 0], length=99)
    lines = summary.summarize(data)
    group = line(lines, "ruler_*", "dense")
    assert group.score.mean == 0.5 and group.score.samples == 6
    assert [(x.task, x.mode, x.length) for x in lines if x.task == "ruler_*"] == [
        ("ruler_*", "dense", 99),
        ("ruler_*", "dense", 1024),
    ]
    assert summary.top_level(lines) == ["own", "ruler_*"]
    both = summary.summarize(data + rows("ruler_b", "sparse", [0.5, 0.5]))
    assert line(both, "ruler_*", "sparse").score_over_base.mean == pytest.approx((-0.5 + 0.5) / 2)


def test_tasks_without_a_score_have_a_likelihood():
    data = [row("a", mode, index, None, index + add) for mode, add in (("dense", 0.0), ("x", 0.5)) for index in (1, 2)]
    found = line(summary.summarize(data), "a", "x")
    assert found.score is None and found.nll.mean == 2.0 and found.nll_over_base.mean == 0.5


def test_the_table_in_markdown():
    data = [row("a", "dense", n, 1.0, 0.5) for n in (0, 1)] + [row("a", "x", n, 0.5, 0.5 + n) for n in (0, 1)]
    lines = summary.table(summary.summarize(data)).splitlines()
    assert lines[0] == "| task | tokens | mode | samples | score | score over dense | NLL | NLL over dense |"
    assert {text.count("|") for text in lines} == {9}
    assert lines[2] == "| a | 1,024 | dense | 2 | 1.000 ± 0.000 |  | 0.500 ± 0.000 |  |"
    assert lines[3].startswith("| a | 1,024 | x | 2 | 0.500 ± 0.000 | -0.500 ± 0.000 | 1.000 ± 6.353 |")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"task": 3}, "task and mode of a row must be texts"),
        ({"mode": None}, "task and mode of a row must be texts"),
        ({"length": "9"}, "length and index of a row must be whole numbers"),
        ({"score": "good"}, "score of a row must be a number, got 'good'"),
        ({"nll": float("nan")}, "nll of a row must be a number, got nan"),
        ({"score": True}, "score of a row must be a number, got True"),
        ({}, "two rows are of sample 0 of a at 1024 tokens in mode dense"),
    ],
)
def test_rows_that_are_no_results(bad, message):
    good = row("a", "dense", 0, 1.0, 1.0)
    with pytest.raises(InvalidValue, match=message):
        summary.summarize([good, {**good, **bad}])


def test_the_plot_has_a_line_for_each_mode_with_intervals():
    pytest.importorskip("matplotlib")
    data = [
        row(task, mode, index, score=(index + n) % 2, nll=index / 2 + n, length=length)
        for task in ("ruler_a", "ruler_b", "own")
        for n, mode in enumerate(("stock", "dense"))
        for length in (256, 512)
        for index in range(3)
    ]
    figure = plots.figures_by_length(data)
    score_own, score_ruler, nll_own, nll_ruler = figure.axes
    assert [axis.get_title() for axis in (score_own, score_ruler)] == ["own", "ruler_*"]
    for axis, figure_of in ((score_ruler, "score"), (nll_ruler, "nll"), (score_own, "score"), (nll_own, "nll")):
        drawn = {bars.get_label(): bars for bars in axis.containers}
        assert set(drawn) == {"stock", "dense"}
        for mode, bars in drawn.items():
            name = "ruler_*" if axis in (score_ruler, nll_ruler) else "own"
            wanted = [getattr(line(summary.summarize(data), name, mode, n), figure_of) for n in (256, 512)]
            assert list(bars.lines[0].get_ydata()) == pytest.approx([one.mean for one in wanted])
            (segments,) = bars.lines[2]
            tops = [segment[1][1] for segment in segments.get_segments()]
            assert tops == pytest.approx([one.mean + one.half for one in wanted])


def test_the_plot_shows_no_axes_without_figures():
    pytest.importorskip("matplotlib")
    data = [row("text_a", "dense", index, nll=index / 2, length=256) for index in range(2)]
    score, nll = plots.figures_by_length(data).axes
    assert not score.get_visible() and nll.get_visible() and nll.get_title() == "text_a"
