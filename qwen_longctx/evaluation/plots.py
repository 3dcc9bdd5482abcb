"""Plots of results; matplotlib comes with the extra ``notebooks``. Figures are the caller's: pyplot knows none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation import summary


def accuracy_by_length(shares: Mapping[str, Mapping[int, float]], trained_length: int) -> Any:
    """Share of passkeys found against prompt length, a line for each name.

    Parameters
    ----------
    shares : mapping
        Name to a mapping of tokens to a share between 0 and 1, as `passkey.accuracy` gives it.
    trained_length : int
        Drawn as a vertical line, in tokens.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name, by_length in shares.items():
        lengths = sorted(by_length)
        axes.plot(lengths, [by_length[n] for n in lengths], marker="o", label=name)
    axes.axvline(trained_length, color="grey", linestyle=":", label="trained length")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("passkeys found")
    axes.legend()
    return figure


_DEFAULT = {"marker": "*", "markersize": 14, "zorder": 3}  # a rule as it is, over its variants


def quality_by_density(rows: Sequence[Mapping[str, Any]]) -> Any:
    """NLL above dense and agreement with it against density, a column for each length; a star for a rule by default.

    Parameters
    ----------
    rows : sequence of mapping
        As `quality.evaluate` gives them, of one length or several; with "package" where there are several texts.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidValue
        A row lacks a figure, or there is no row of dense prefill of its text.
    """
    from matplotlib.ticker import LogLocator

    _check(rows, ("tokens", "nll", "agreement", "density"))
    lengths = sorted({row["tokens"] for row in rows})
    figure, axes = _two_rows(len(lengths))
    points = _points(rows)
    names = sorted({name for name, _ in points})
    styles = {
        name: {"color": f"C{number}", "label": name, **({"marker": "o"} if ":" in name else _DEFAULT)}
        for number, name in enumerate(names)
    }
    for column, tokens in enumerate(lengths):
        for name in names:
            line = sorted(points.get((name, tokens), []))
            if line:
                density, above, agreement = (list(values) for values in zip(*line, strict=True))
                axes[0, column].plot(density, above, **styles[name])
                axes[1, column].plot(density, agreement, **styles[name])
        axes[0, column].axhline(0, color="grey", linewidth=0.8)
        axes[0, column].set_title(f"{tokens:,} tokens")
        axes[1, column].set_xlabel("blocks kept, %")
        axes[1, column].set_xscale("log")
        axes[1, column].xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for formatter in (axes[1, column].xaxis.set_major_formatter, axes[1, column].xaxis.set_minor_formatter):
            formatter("{x:g}")
    axes[0, 0].set_ylabel("NLL above dense, nats a token")
    axes[1, 0].set_ylabel("top-1 agreement with dense, %")
    return _with_legend(figure, axes)


def time_by_length(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Seconds to the first token against prompt length, a line each for stock, dense and sparse.

    Parameters
    ----------
    rows : sequence of mapping
        As `bench.speed.measure` gives them.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidValue
        A row lacks a figure.
    """
    from matplotlib.figure import Figure

    _check(rows, ("tokens", "dense_seconds", "sparse_seconds"))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: row["tokens"])
    for name in ("stock", "dense", "sparse"):
        points = [(row["tokens"], row[f"{name}_seconds"]) for row in rows if f"{name}_seconds" in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("seconds to the first token")
    axes.legend()
    return figure


_LINES = ("-", "--", "-.", ":")  # modes that agree lie on each other


def decoding_by_length(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Milliseconds of a decoded token against the tokens in the cache, for each way and kind of cache.

    The grey line of a kind is the time in which its weights, keys and values could be read.

    Parameters
    ----------
    rows : sequence of mapping
        As `bench.decode.measure` gives them.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidValue
        A row lacks a figure.
    """
    from matplotlib.figure import Figure

    _check(rows, ("tokens", "weight_bytes", "kv_bytes", "read_gb_per_second", "patched_ms"))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    ways = {
        "stock": "stock",
        "without_graphs": "without CUDA graphs",
        "patched": "patched",
        "sparse": "a share of the keys",
    }
    for number, kind in enumerate(dict.fromkeys(row.get("kv_cache", "device") for row in rows)):
        of_kind = [row for row in rows if row.get("kv_cache", "device") == kind]
        of_kind.sort(key=lambda row: row["tokens"])
        for way, name in ways.items():
            points = [(row["tokens"], row[f"{way}_ms"]) for row in of_kind if f"{way}_ms" in row]
            if points:
                label = name if way == "stock" else f"{name}, {kind}"
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        tokens = [row["tokens"] for row in of_kind]
        read = [(row["weight_bytes"] + row["kv_bytes"]) / row["read_gb_per_second"] / 1e6 for row in of_kind]
        axes.plot(tokens, read, color="grey", linestyle=_LINES[1:][number % 3], label=f"reading, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("milliseconds a token")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


_WAYS = {  # values of the setting `pipeline`, and how they are drawn
    "auto": ("chunks of equal time", "C0", "o"),
    "equal": ("chunks of equal length", "C1", "s"),
    "off": ("one chunk at a time", "C2", "^"),
}


def speed_by_cards(rows: Sequence[Mapping[str, Any]]) -> Any:
    """How many times as fast as one card several are: a column for each kind of prefill, a row for each shape.

    Parameters
    ----------
    rows : sequence of mapping
        As `bench.simulation.measure` gives them, of one length.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidValue
        A row lacks a figure.
    """
    from matplotlib.figure import Figure

    _check(rows, ("tokens", "cards", "density", "simulated_seconds", "times_as_fast"))
    kinds = list(dict.fromkeys((row["kind"], row["density"], row["times_from"]) for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(4.6 * len(kinds), 3.4 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), len(kinds), sharex=True, sharey=True, squeeze=False)
    for line, shape in enumerate(shapes):
        for column, kind in enumerate(kinds):
            here = [
                row for row in rows if (row["shape"], (row["kind"], row["density"], row["times_from"])) == (shape, kind)
            ]
            _speeds(axes[line, column], here)
            what = "dense" if kind[0] == "dense" else f"sparse, {kind[1]:.0%} of the blocks"
            axes[line, column].set_title(f"{shape}, {what}\ntimes from {kind[2]}", fontsize="x-small")
    for axis in axes[-1]:
        axis.set_xlabel("cards")
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as one card")
    return _with_legend(figure, axes)


def _speeds(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One panel of `speed_by_cards`, with the seconds of one card and of most cards."""
    cards = sorted({row["cards"] for row in rows})
    alone = next(row for row in rows if row["cards"] == 1)
    axes.plot(cards, cards, color="grey", linestyle=":", label="as many times as cards")
    for way, (name, colour, marker) in _WAYS.items():
        points = sorted((row["cards"], row["times_as_fast"]) for row in rows if row["pipeline"] == way or row is alone)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    best = min(row["simulated_seconds"] for row in rows if row["pipeline"] == "auto" and row["cards"] == cards[-1])
    axes.text(0.04, 0.94, f"{alone['simulated_seconds']:.0f} s", transform=axes.transAxes, va="top", fontsize="small")
    axes.text(0.04, 0.86, f"{cards[-1]} cards: {best:.0f} s", transform=axes.transAxes, va="top", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


def busy_cards(rows: Sequence[Mapping[str, Any]]) -> Any:
    """When each card computes, a panel for each way and kind of prefill.

    Parameters
    ----------
    rows : sequence of mapping
        As `bench.pipeline.measure` gives them, with a timeline.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidValue
        A row lacks a figure.
    """
    from matplotlib.figure import Figure

    _check(rows, ("tokens", "cards", "seconds"))
    figure = Figure(figsize=(9, 0.6 + 1.3 * len(rows)), layout="constrained")
    every = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, row in zip(every, rows, strict=True):
        for card, spans in row["busy"].items():
            bars = [(start, stop - start) for start, stop in spans]
            axes.broken_barh(bars, (int(card) - 0.4, 0.8), color=f"C{int(card) % 10}")
        axes.set_yticks([int(card) for card in row["busy"]])
        axes.set_ylabel("card")
        axes.set_title(
            f"{row['tokens']:,} tokens, {row['kind']}, {row['way']}: {row['seconds']:.1f} s", fontsize="small"
        )
    every[-1].set_xlabel("seconds under the profiler")
    return figure


def figures_by_length(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Score and negative log-likelihood against prompt length, a line for each mode with its 95 % intervals.

    There is a column for each group of tasks and for each task that belongs to no group.

    Parameters
    ----------
    rows : sequence of mapping
        As `runner.evaluate` gives them.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidValue
        See `summary.summarize`.
    """
    lines = summary.summarize(rows)
    columns = summary.top_level(lines)
    figure, axes = _two_rows(len(columns))
    modes = list(dict.fromkeys(line.mode for line in lines))
    for column, name in enumerate(columns):
        for number, mode in enumerate(modes):
            here = [line for line in lines if (line.task, line.mode) == (name, mode)]
            for axis, figure_of in zip(axes[:, column], summary.FIGURES, strict=True):
                points = [(x.length, e.mean, e.half or 0) for x in here if (e := getattr(x, figure_of)) is not None]
                if points:
                    x, y, half = zip(*points, strict=True)
                    style = {"color": f"C{number}", "linestyle": _LINES[number % len(_LINES)], "marker": "o"}
                    axis.errorbar(x, y, yerr=half, capsize=3, label=mode, **style)
        for axis, title in zip(axes[:, column], ("score", "NLL, nats a token"), strict=True):
            axis.set_ylabel(title)
            axis.set_visible(axis.has_data())
        top = next((axis for axis in axes[:, column] if axis.has_data()), axes[0, column])
        top.set_title(name)
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xlabel("prompt length, tokens")
    return _with_legend(figure, axes)


def _two_rows(columns: int) -> tuple[Any, Any]:
    """A figure with two rows of axes, of which those of a column share their horizontal axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 6), layout="constrained")
    return figure, figure.subplots(2, columns, sharex="col", squeeze=False)


def _with_legend(figure: Any, axes: Any) -> Any:
    """A figure with one legend below it, of what all of its axes show."""
    handles = {text: line for a in axes.flat for line, text in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _check(rows: Sequence[Mapping[str, Any]], needed: Sequence[str]) -> None:
    """Refuse rows that lack one of these numbers, or in which a value that is drawn is of the wrong kind."""
    for row in rows:
        numbers = {name: row.get(name) for name in needed}
        if "stock_seconds" in row:
            numbers["stock_seconds"] = row["stock_seconds"]
        for name, value in numbers.items():
            summary.check_number(name, value, row)
        for name in ("variant", "package"):
            if not isinstance(row.get(name, ""), str):
                raise InvalidValue(f"{name} of a row must be a text, got {row[name]!r}: {summary.REMEDY}")


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[tuple[float, float, float]]]:
    """Density in %, NLL above dense and agreement in % of every variant, means over the texts.

    By tokens and by rule and setting, without the setting's number.
    """
    dense = {_text(row): row["nll"] for row in rows if row["variant"] == "dense"}
    texts: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for row in rows:
        if row["variant"] != "dense":
            if _text(row) not in dense:
                raise InvalidValue(
                    f"the row of {row['variant']} at {row['tokens']} tokens has no row of dense beside it: "
                    f"{summary.REMEDY}"
                )
            point = 100 * row["density"], row["nll"] - dense[_text(row)], 100 * row["agreement"]
            texts.setdefault((row["variant"], row["tokens"]), []).append(point)
    points: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for (variant, tokens), values in texts.items():
        density, above, agreement = (fmean(one) for one in zip(*values, strict=True))
        points.setdefault((variant.split("=")[0], tokens), []).append((density, above, agreement))
    return points


def _text(row: Mapping[str, Any]) -> tuple[int, str]:
    return row["tokens"], row.get("package", "")
