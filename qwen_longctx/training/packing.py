"""Sequences of several documents: what a model is fed in one step, and what it is to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100  # the label that a cross-entropy leaves out


@dataclass(frozen=True)
class Packed:
    """One sequence of documents that do not attend to each other.

    Attributes
    ----------
    ids : torch.Tensor
        Shape (tokens,), int64.
    labels : torch.Tensor
        Shape (tokens,), int64, shifted already: ``labels[i]`` is the token that position i is to predict, so
        ``ids[i + 1]`` within a document, and `IGNORED` at the last token of each document, in padding, and where the
        loss does not count.
    starts : torch.Tensor
        Shape (documents + 1,), int32: where each document begins, then the number of tokens. Padding is a document of
        its own, the last one.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """Shape (tokens,), int64: the position of each token within its document."""
        begins, lengths = self.starts[:-1].long(), self.starts.diff().long()
        return torch.arange(len(self.ids)) - begins.repeat_interleave(lengths)


@dataclass(frozen=True)
class Document:
    """Tokens that attend to each other.

    Attributes
    ----------
    ids : numpy.ndarray
        Shape (tokens,), any integer type.
    counts : numpy.ndarray
        Shape (tokens,), bool: whether the loss counts where this token is to be predicted. The first never is.
    """

    ids: np.ndarray
    counts: np.ndarray


def pack(documents: Sequence[Document], tokens: int, padding: int) -> Packed:
    """Lay documents one after the other and fill up with `padding`.

    Parameters
    ----------
    documents : sequence of Document
        None empty, together at most `tokens` long.
    tokens : int
        Length of the sequence.
    padding : int
        Token id of what fills it up.
    """
    lengths = [len(document.ids) for document in documents]
    used = sum(lengths)
    if used > tokens or 0 in lengths:
        raise ValueError(f"documents of {lengths} tokens do not make a sequence of {tokens}")
    ids = np.full(tokens, padding, dtype=np.int64)
    labels = np.full(tokens, IGNORED, dtype=np.int64)
    at = 0
    for document, length in zip(documents, lengths, strict=True):
        ids[at : at + length] = document.ids
        labels[at : at + length - 1] = np.where(document.counts[1:], document.ids[1:], IGNORED)
        at += length
    if used < tokens:
        lengths.append(tokens - used)
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    return Packed(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(starts))
