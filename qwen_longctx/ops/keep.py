"""From scores of blocks to the blocks that are kept: by mass or by a threshold, up to a count."""

from __future__ import annotations

from typing import Literal

import torch

from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

By = Literal["mass", "threshold"]
_BITS = 31  # of a float32 that is not negative


def keep(
    scores: torch.Tensor,
    tiles: Tiles,
    amount: torch.Tensor,
    *,
    by: By,
    most: torch.Tensor | None = None,
    sink: int,
    window: int | torch.Tensor,
) -> torch.Tensor:
    """Which blocks every tile keeps.

    The first `sink` blocks, the last `window` blocks that a tile sees whole and all that it sees in part are kept
    always. Of the others

    - "mass" keeps the fewest whose scores, with those kept always, reach `amount` of the sum;
    - "threshold" keeps those with at least `amount` times the best score;

    or as many of the best of these as `most` allows, which counts those kept always too. Equal scores are kept or
    dropped together; a score of 0 is dropped, unless everything is wanted (a mass of 1 or a threshold of 0, and `most`
    no less than all blocks).

    Parameters
    ----------
    scores : torch.Tensor
        Shape (batch, heads, tiles, blocks), not negative; read for blocks that are seen whole.
    tiles : Tiles
    amount : torch.Tensor
        Shape (heads, tiles) or one that expands to it, floating point.
    by : {"mass", "threshold"}
    most : torch.Tensor, optional
        Likewise, int32: blocks.
    sink : int
        Blocks.
    window : int or torch.Tensor
        Blocks, for all tiles or of shape (tiles,), int32.

    Returns
    -------
    torch.Tensor
        Bool, of the shape of `scores`.
    """
    if uses_triton(scores):
        return keep_triton(scores, tiles.whole, tiles.visible, amount, by=by, most=most, sink=sink, window=window)
    block = torch.arange(tiles.blocks, device=scores.device)
    whole = block < tiles.whole[:, None]
    always = tiles.sees() & (~whole | (block < sink) | (block >= (tiles.whole - window)[:, None]))
    scores = scores.masked_fill(~whole, 0.0)
    choice = scores.masked_fill(always, 0.0)
    everything = amount >= 1 if by == "mass" else amount <= 0
    if most is not None:
        everything = everything & (most >= tiles.visible)
    chosen = (choice > 0) & (choice >= _lowest(scores, choice, always, amount, by, most))
    return always | chosen | (everything[..., None] & whole)


def _lowest(
    scores: torch.Tensor,
    choice: torch.Tensor,
    always: torch.Tensor,
    amount: torch.Tensor,
    by: By,
    most: torch.Tensor | None,
) -> torch.Tensor:
    """Lowest score that is kept, shape (batch, heads, tiles, 1); infinite if none is."""
    ordered = choice.sort(dim=-1, descending=True).values
    wanted = torch.full(choice.shape[:-1], choice.shape[-1], device=choice.device)
    if most is not None:
        wanted = torch.minimum(wanted, most - always.sum(dim=-1))
    if by == "mass":
        missing = amount * scores.sum(dim=-1) - (scores * always).sum(dim=-1)
        wanted = torch.minimum(wanted, (ordered.cumsum(dim=-1) - ordered < missing[..., None]).sum(dim=-1))
    lowest = ordered.gather(-1, (wanted - 1).clamp(min=0)[..., None])
    lowest = lowest.masked_fill(wanted[..., None] <= 0, torch.inf)
    if by == "threshold":
        lowest = torch.maximum(lowest, scores.amax(dim=-1, keepdim=True) * amount[..., None])
    return lowest


@on_its_device
def keep_triton(
    scores: torch.Tensor,
    whole: torch.Tensor,
    visible: torch.Tensor,
    amount: torch.Tensor,
    *,
    by: str,
    most: torch.Tensor | None,
    sink: int,
    window: int | torch.Tensor,
) -> torch.Tensor:
    """See `keep`; `whole` and `visible` are those of its tiles."""
    batch, heads, tiles, blocks = scores.shape
    kept = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    amount = amount.to(torch.float32).expand(heads, tiles).contiguous()
    limit = amount if most is None else most.to(torch.int32).expand(heads, tiles).contiguous()
    width = max(1024, triton.next_power_of_2(blocks))  # each width is compiled anew
    _keep[(batch * heads * tiles,)](
        scores.contiguous(),
        kept,
        whole,
        visible,
        amount,
        limit,
        whole - window,
        heads * tiles,
        tiles,
        blocks,
        sink,
        MASS=by == "mass",
        LIMITED=most is not None,
        BITS=_BITS,
        WIDTH=width,
        num_warps=min(16, width // 512),
    )
    return kept.view(torch.bool)


@triton.jit(do_not_specialize=("lists", "tiles", "blocks", "sink"))
def _keep(  # type: ignore[no-untyped-def]
    scores,
    kept,
    whole,
    visible,
    amount,
    most,
    near,
    lists,
    tiles,
    blocks,
    sink,
    MASS: tl.constexpr,
    LIMITED: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = row % tiles
    at = tl.arange(0, WIDTH)
    seen_whole = tl.load(whole + tile)
    seen = tl.load(visible + tile)
    wanted = tl.load(amount + row % lists)
    score = tl.load(scores + row * blocks + at, mask=(at < blocks) & (at < seen_whole), other=0.0).to(tl.float32)
    always = (at < seen) & ((at >= seen_whole) | (at < sink) | (at >= tl.load(near + tile)))
    choice = tl.where(always, 0.0, score)
    everything = wanted <= 0
    lowest = tl.max(score, 0) * wanted
    if MASS:
        everything = wanted >= 1
        lowest = tl.full([], 0.0, tl.float32)
    if MASS or LIMITED:
        enough = tl.full([], 0, tl.int1)
        if MASS:
            missing = wanted * tl.sum(score, 0) - tl.sum(tl.where(always, score, 0.0), 0)
            enough = missing <= 0
        if LIMITED:
            limit = tl.load(most + row % lists)
            everything = everything & (limit >= seen)
            room = limit - tl.sum(always.to(tl.int32), 0)
            enough = enough | (room <= 0)
        # The largest value that still gathers what is missing or fills the room, one bit of the float at a time
        bits = choice.to(tl.int32, bitcast=True)
        low = tl.full([], 0, tl.int32)
        for step in range(BITS):
            guess = low | (1 << (BITS - 1 - step))
            reached = tl.full([], 0, tl.int1)
            if MASS:
                reached = tl.sum(tl.where(bits >= guess, choice, 0.0), 0) >= missing
            if LIMITED:
                reached = reached | (tl.sum((bits >= guess).to(tl.int32), 0) >= room)
            low = tl.where(reached, guess, low)
        lowest = tl.maximum(lowest, tl.where(enough, float("inf"), low.to(tl.float32, bitcast=True)))
    chosen = (choice > 0) & (choice >= lowest)
    result = always | chosen | (at < tl.where(everything, seen_whole, 0))
    tl.store(kept + row * blocks + at, result.to(tl.uint8), mask=at < blocks)
