"""Plots of results; matplotlib comes with the extra ``notebooks``."""

from __future__ import annotations

from collections.abc import Mapping
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
