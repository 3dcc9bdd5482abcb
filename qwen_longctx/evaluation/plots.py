"""Plots of results; matplotlib comes with the extra ``notebooks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any


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
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name, found in shares.items():
        lengths = sorted(found)
        axes.plot(lengths, [found[n] for n in lengths], marker="o", label=name)
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
    """
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    lengths = sorted({row["tokens"] for row in rows})
    figure, axes = pyplot.subplots(
        2, len(lengths), figsize=(4.5 * len(lengths), 6), sharex="col", squeeze=False, layout="constrained"
    )
    points = _points(rows)
    names = sorted({name for name, _ in points})
    styles = {
        name: {"color": f"C{number}", "label": name, **({"marker": "o"} if ":" in name else _DEFAULT)}
        for number, name in enumerate(names)
    }
    for column, tokens in enumerate(lengths):
        for name in names:
            found = sorted(points.get((name, tokens), []))
            if found:
                density, above, agreement = (list(values) for values in zip(*found, strict=True))
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
    handles = {text: line for a in axes[0] for line, text in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def time_by_length(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Seconds to the first token against prompt length, a line each for stock, dense and sparse.

    Parameters
    ----------
    rows : sequence of mapping
        As `bench.speed` gives them.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    rows = sorted(rows, key=lambda row: row["tokens"])
    for name in ("stock", "dense", "sparse"):
        points = [(row["tokens"], row[f"{name}_seconds"]) for row in rows if f"{name}_seconds" in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("seconds to the first token")
    axes.legend()
    return figure


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[tuple[float, float, float]]]:
    """Density in %, NLL above dense and agreement in % of every variant, means over the texts.

    By tokens and by rule and setting, without the setting's number.
    """
    dense = {_text(row): row["nll"] for row in rows if row["variant"] == "dense"}
    texts: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for row in rows:
        if row["variant"] != "dense":
            values = 100 * row["density"], row["nll"] - dense[_text(row)], 100 * row["agreement"]
            texts.setdefault((row["variant"], row["tokens"]), []).append(values)
    points: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for (variant, tokens), found in texts.items():
        density, above, agreement = (fmean(one) for one in zip(*found, strict=True))
        points.setdefault((variant.split("=")[0], tokens), []).append((density, above, agreement))
    return points


def _text(row: Mapping[str, Any]) -> tuple[int, str]:
    return row["tokens"], row.get("package", "")
