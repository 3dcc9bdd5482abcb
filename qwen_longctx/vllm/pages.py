"""Dual chunk attention over a batch of paged sequences: which rows look at which pages.

A step of a serving engine holds the queries of many requests one after another, parts of long prompts and single tokens
of decoding alike. The keys of a request lie in pages, which its row of the block table lists. Here every request's
queries are cut at multiples of the stride, so that each piece lies in one chunk and looks at three segments of keys at
most (see `geometry.positions`). Page sizes divide the stride, so a segment is a range of columns of the block table.

Lengths are read on the device only, because an engine that schedules ahead does not know them on the host yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx.geometry.positions import Kind

KINDS: tuple[Kind, ...] = ("intra", "successive", "inter")


class Pieces(NamedTuple):
    """Queries of a step, cut at multiples of the stride, in the order of their rows. Some pieces may be empty.

    Attributes
    ----------
    owner : torch.Tensor
        Shape (pieces,), int64: the request of each piece.
    chunk : torch.Tensor
        Shape (pieces,), int64: the chunk of positions that it lies in.
    rows : torch.Tensor
        Shape (pieces + 1,), int32: the first row of each piece, and the row after the last.
    keys : dict of str to torch.Tensor
        Shape (pieces,), int32: how many keys of each kind of segment a piece looks at.
    whole : bool
        Whether every request is one piece.
    """

    owner: torch.Tensor
    chunk: torch.Tensor
    rows: torch.Tensor
    keys: dict[Kind, torch.Tensor]
    whole: bool


def cut(starts: torch.Tensor, starts_host: torch.Tensor, lengths: torch.Tensor, stride: int) -> Pieces:
    """Cut the queries of every request at multiples of the stride.

    Parameters
    ----------
    starts : torch.Tensor
        Shape (requests + 1,), integer: the first row of each request's queries, and the row after the last.
    starts_host : torch.Tensor
        The same on the host, where a request may have more queries than on the device, but not fewer.
    lengths : torch.Tensor
        Shape (requests,), integer: tokens of each request, its queries included. The queries are its last tokens.
    stride : int
        Length of a chunk, in tokens.
    """
    most = (starts_host[1:] - starts_host[:-1]).clamp(min=1).long()
    counts = 1 + (most + stride - 2) // stride  # borders that so many tokens can cross, wherever they lie
    whole = bool((counts == 1).all())
    if whole:
        owner = torch.arange(len(counts), device=lengths.device)
        part = torch.zeros_like(owner)
    else:
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        parts = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        owner, part = torch.stack((owners, parts)).to(lengths.device)
    first_row, end = starts[:-1].long()[owner], lengths.long()[owner]
    begin = end - (starts[1:].long()[owner] - first_row)  # position of the request's first query
    chunk = begin // stride + part
    start = torch.minimum(torch.maximum(begin, chunk * stride), end)
    stop = torch.minimum((chunk + 1) * stride, end)
    some = stop > start
    keys: dict[Kind, torch.Tensor] = {
        "intra": (stop - chunk * stride) * some,
        "successive": stride * (some & (chunk >= 1)),
        "inter": (chunk - 1).clamp(min=0) * stride * some,
    }
    rows = torch.cat((first_row + start - begin, starts[-1:].long()))
    return Pieces(owner, chunk, rows.int(), {kind: count.int() for kind, count in keys.items()}, whole)


def positions(starts: torch.Tensor, lengths: torch.Tensor, rows: int) -> torch.Tensor:
    """Position of the query in each row, shape (rows,), int64; of rows that no request owns any number from 0 on.

    Parameters as in `cut`; there may be more `rows` than the requests own.
    """
    row = torch.arange(rows, device=starts.device)
    ends = starts[1:].long()
    owner = torch.bucketize(row, ends, right=True).clamp(max=len(ends) - 1)
    return (lengths.long()[owner] - ends[owner] + row).clamp(min=0)


def segment_table(
    table: torch.Tensor, pieces: Pieces, kind: Kind, *, stride: int, page_size: int, longest: int
) -> torch.Tensor:
    """Block table of one kind of segment: for every piece, the pages of the keys that it looks at, in order.

    Parameters
    ----------
    table : torch.Tensor
        Shape (requests, pages), int32.
    pieces : Pieces
    kind : {"intra", "successive", "inter"}
    stride, page_size : int
        Tokens of a chunk and of a page, which divides it.
    longest : int
        The most keys that a piece looks at in such a segment, in tokens.

    Returns
    -------
    torch.Tensor
        Shape (pieces, pages), int32. Entries beyond the keys of a piece have no meaning.
    """
    columns = -(-longest // page_size)
    if kind == "inter":  # begins with the first page
        return table[:, :columns] if pieces.whole else table[:, :columns][pieces.owner]
    chunk = pieces.chunk if kind == "intra" else (pieces.chunk - 1).clamp(min=0)
    column = chunk[:, None] * (stride // page_size) + torch.arange(columns, device=table.device)
    return table[pieces.owner[:, None], column.clamp(max=table.shape[1] - 1)]
