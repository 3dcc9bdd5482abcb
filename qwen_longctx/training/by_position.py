"""Loss by position: what a model makes of a long text it has not seen, near its beginning and far from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qwen_longctx.training.attention import Documents
from qwen_longctx.training.model import Trained
from qwen_longctx.training.packing import IGNORED, Packed

BINS = 16


def by_position(trained: Trained, texts: Sequence[Packed]) -> list[dict[str, Any]]:
    """Mean loss of the tokens at each range of positions within their documents.

    Parameters
    ----------
    trained : Trained
    texts : sequence of Packed
        All of one length.

    Returns
    -------
    list of dict
        ``first`` and ``last`` position of a range, mean ``loss`` in nats, and ``tokens``, which are not 0.
    """
    length = max(len(text.ids) for text in texts)
    width = -(-length // BINS)
    sums, counts = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for text in texts:
        losses = trained(text, each=True).double().cpu()
        counted = text.labels != IGNORED
        bins = (Documents(text.starts).positions // width)[counted]
        sums.index_add_(0, bins, losses[counted])
        counts.index_add_(0, bins, torch.ones_like(losses[counted]))
    return [
        {
            "first": number * width,
            "last": min((number + 1) * width, length) - 1,
            "loss": round(float(sums[number] / counts[number]), 6),
            "tokens": int(counts[number]),
        }
        for number in range(BINS)
        if counts[number]
    ]


def figure(lines: dict[str, list[dict[str, Any]]]) -> Any:
    """A matplotlib figure of the loss by position, a line for each name."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = drawing.subplots()
    for name, rows in lines.items():
        middles = [(row["first"] + row["last"]) / 2 for row in rows]
        axes.plot(middles, [row["loss"] for row in rows], marker="o", markersize=3, label=name)
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawing
