"""Means of an evaluation with 95 % intervals, and paired differences between modes.

Samples of one task and length are taken as independent draws, and intervals are Student's. A group of tasks, all that
share the word before the first ``_``, has the mean of its tasks' means; the variance of that mean is the sum of the
tasks' own, and its degrees of freedom follow Welch and Satterthwaite. Modes ran the same samples, so a difference
between two is a mean over samples of differences, and its interval is of those.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import fmean, variance
from typing import Any, NamedTuple

from qwen_longctx.errors import InvalidValue

BASE = "dense"
LEVEL = 0.95
FIGURES = ("score", "nll")
REMEDY = "give results files as the command wrote them"


class Estimate(NamedTuple):
    """A mean, half the width of its interval (None of less than two samples a task), and how many samples it is of."""

    mean: float
    half: float | None
    samples: int

    def __str__(self) -> str:
        mean = f"{round(self.mean, 3) + 0.0:.3f}"  # no -0.000
        return mean if self.half is None else f"{mean} ± {self.half:.3f}"


class Line(NamedTuple):
    """One line of the table.

    Attributes
    ----------
    task : str
        A task, or a group as ``ruler_*``.
    length : int
    mode : str
    score, nll : Estimate, optional
        None where no sample has one.
    score_over_base, nll_over_base : Estimate, optional
        Paired differences to the base mode; None for the base itself and where there is none.
    """

    task: str
    length: int
    mode: str
    score: Estimate | None
    nll: Estimate | None
    score_over_base: Estimate | None
    nll_over_base: Estimate | None


@lru_cache
def student(freedom: int, level: float = LEVEL) -> float:
    """The number that a Student variable of so many degrees of freedom stays below in size with probability `level`.

    From the finite series of its distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4), by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """Probability that a Student variable is at most sqrt(freedom) * tan(angle) in size."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for number in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * number / (number + 1)
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share


def estimate(tasks: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean over tasks of the means over their samples, with its interval; None without samples."""
    if not tasks or not all(tasks):
        return None
    mean, samples = fmean(fmean(values) for values in tasks), sum(map(len, tasks))
    if min(map(len, tasks)) < 2:
        return Estimate(mean, None, samples)
    parts = [variance(values) / len(values) / len(tasks) ** 2 for values in tasks]
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, tasks, strict=True))
    if below == 0:
        return Estimate(mean, 0.0, samples)
    freedom = math.floor(sum(parts) ** 2 / below + 1e-9)
    return Estimate(mean, student(max(1, freedom)) * math.sqrt(sum(parts)), samples)


Values = dict[tuple[str, int, str], dict[int, dict[str, float]]]  # task, length, mode -> index -> figures


def summarize(rows: Sequence[Mapping[str, Any]], base: str = BASE) -> list[Line]:
    """Means and differences of every task, length and mode, and of every group of tasks.

    A group has a line for a length and mode only if all of its tasks at that length have rows of that mode.

    Parameters
    ----------
    rows : sequence of mapping
        As `runner.evaluate` gives them.
    base : str
        Mode that the others are compared with; without rows of it there are no differences.

    Raises
    ------
    InvalidValue
        A row lacks a figure, or two rows are of one sample and mode.
    """
    values = _values(rows)
    lines: list[Line] = []
    for name, tasks in _groups(list(dict.fromkeys(task for task, _, _ in values))).items():
        for length in sorted({length for task, length, _ in values if task in tasks}):
            here = [task for task in tasks if any(key[:2] == (task, length) for key in values)]
            modes = dict.fromkeys(mode for task, at, mode in values if task in here and at == length)
            for mode in modes:
                if all((task, length, mode) in values for task in here):
                    lines.append(_line(values, name, here, length, mode, base))
    return lines


def _groups(tasks: list[str]) -> dict[str, list[str]]:
    """Tasks, each alone, and then groups of several with the same first word."""
    families: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        families[task.partition("_")[0]].append(task)
    found = {task: [task] for task in tasks}
    found.update({f"{word}_*": members for word, members in families.items() if len(members) > 1})
    return found


def top_level(lines: Sequence[Line]) -> list[str]:
    """Groups, and tasks that belong to none, in the order of the lines."""
    names = dict.fromkeys(line.task for line in lines)
    return [name for name in names if name.endswith("_*") or f"{name.partition('_')[0]}_*" not in names]


def _line(values: Values, name: str, tasks: list[str], length: int, mode: str, base: str) -> Line:
    means, over = {}, {}
    for figure in FIGURES:
        ours = [_of(values.get((task, length, mode), {}), figure) for task in tasks]
        theirs = [_of(values.get((task, length, base), {}), figure) for task in tasks]
        pairs = [[a[n] - b[n] for n in a if n in b] for a, b in zip(ours, theirs, strict=True)]
        means[figure] = estimate([list(one.values()) for one in ours if one])
        over[figure] = None if mode == base else estimate([p for p, a in zip(pairs, ours, strict=True) if a])
    return Line(name, length, mode, means["score"], means["nll"], over["score"], over["nll"])


def _of(samples: dict[int, dict[str, float]], figure: str) -> dict[int, float]:
    return {index: figures[figure] for index, figures in samples.items() if figure in figures}


def _values(rows: Sequence[Mapping[str, Any]]) -> Values:
    """The figures of all rows, checked."""
    values: Values = {}
    for row in rows:
        task, length, mode, index = (row.get(name) for name in ("task", "length", "mode", "index"))
        if not isinstance(task, str) or not isinstance(mode, str):
            raise InvalidValue(f"task and mode of a row must be texts, got {row!r:.120}: {REMEDY}")
        if not isinstance(length, int) or not isinstance(index, int):
            raise InvalidValue(f"length and index of a row must be whole numbers, got {row!r:.120}: {REMEDY}")
        figures = {name: row[name] for name in FIGURES if row.get(name) is not None}
        for name, value in figures.items():
            check_number(name, value, row)
        samples = values.setdefault((task, length, mode), {})
        if index in samples:
            raise InvalidValue(
                f"two rows are of sample {index} of {task} at {length} tokens in mode {mode}: give files that do not "
                "overlap"
            )
        samples[index] = figures
    return values


def check_number(name: str, value: Any, row: Mapping[str, Any]) -> None:
    """Refuse a value of a row that is no finite number.

    Raises
    ------
    InvalidValue
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidValue(f"{name} of a row must be a number, got {value!r} in {row!r:.120}: {REMEDY}")


def table(lines: Sequence[Line], base: str = BASE) -> str:
    """The lines as a table in Markdown."""
    heads = ["task", "tokens", "mode", "samples", "score", f"score over {base}", "NLL", f"NLL over {base}"]
    text = ["| " + " | ".join(heads) + " |", "|---|--:|---|--:|--:|--:|--:|--:|"]
    for line in lines:
        figures = (line.score, line.score_over_base, line.nll, line.nll_over_base)
        samples = max((one.samples for one in figures if one is not None), default=0)
        cells = [line.task, f"{line.length:,}", line.mode, str(samples)]
        cells += ["" if one is None else str(one) for one in figures]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)
