"""Keys and values of one sequence out of the pages of a serving engine, copied to where tokens follow one another."""

from __future__ import annotations

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

_TILE = 1 << 13  # bytes of keys that a program copies, and as many of values: 64 of each a thread


def gathered(pages: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request, copied from its pages to where one token follows the other.

    Parameters
    ----------
    pages : torch.Tensor
        Shape (pages, kv_heads, page_size, 2 * head_dim), of any strides and any float dtype: keys, and values after
        them.
    table : torch.Tensor
        Shape (pages,), int32 or int64: the pages of the request, in order. Entries beyond its tokens are not read.
    length : int
        Its tokens.

    Returns
    -------
    keys, values : torch.Tensor
        Shape (1, length, kv_heads, head_dim) each, contiguous, of the dtype of `pages`.
    """
    if uses_triton(pages):
        return gathered_triton(pages, table, length)
    page_size, width = pages.shape[2:]
    own = table[: -(-length // page_size)]
    halves = pages.transpose(1, 2).split(width // 2, dim=-1)
    keys, values = (half.index_select(0, own).flatten(0, 1)[None, :length] for half in halves)
    return keys, values


@on_its_device
def gathered_triton(pages: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gathered`: one launch, which reads and writes every number once."""
    _, kv_heads, page_size, width = pages.shape
    head_dim = width // 2
    keys, values = (pages.new_empty(1, length, kv_heads, head_dim) for _ in range(2))
    if keys.numel() == 0:
        return keys, values
    dim = triton.next_power_of_2(head_dim)
    rows = max(1, _TILE // (dim * pages.element_size()))
    _gathered[(triton.cdiv(length * kv_heads, rows),)](
        pages,
        table.contiguous(),
        keys,
        values,
        *pages.stride(),
        length,
        kv_heads,
        PAGE=page_size,
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=rows,
        num_warps=4,
    )
    return keys, values


@triton.jit(do_not_specialize=("table", "length", "kv_heads"))  # a row of a table lies at any address
def _gathered(  # type: ignore[no-untyped-def]
    pages, table, keys, values, page_stride, head_stride, token_stride, dim_stride, length, kv_heads,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A row is a head of a token, in the order of the results. Offsets are 64 bits wide, for any stride may be large.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // kv_heads, (row % kv_heads).to(tl.int64)
    dim = tl.arange(0, DIM).to(tl.int64)[None, :]
    within = token < length
    inside = within[:, None] & (dim < HEAD_DIM)
    page = tl.load(table + token // PAGE, mask=within, other=0).to(tl.int64)
    spot = page * page_stride + head * head_stride + (token % PAGE).to(tl.int64) * token_stride
    source = pages + spot[:, None]
    target = row.to(tl.int64)[:, None] * HEAD_DIM + dim
    key = tl.load(source + dim * dim_stride, mask=inside, other=0)
    value = tl.load(source + (HEAD_DIM + dim) * dim_stride, mask=inside, other=0)  # on its way before a key is written
    tl.store(keys + target, key, mask=inside)
    tl.store(values + target, value, mask=inside)
