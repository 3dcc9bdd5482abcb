"""Sparse attention without a model: spans of given queries and keys, and what the definition says of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from definition import _pair_logits
from qwen_longctx import LongContextConfig, sparsity
from qwen_longctx.attention.dense import attend
from qwen_longctx.checkpoint import Heads
from qwen_longctx.geometry.layout import Call, RotarySource, make_layout
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import Tensors
from qwen_longctx.sparsity.record import SpanRecord, SparseState

DIM = 16
CHUNK, LOCAL = 256, 64
STRIDE = CHUNK - LOCAL
INV_FREQ = 1.0 / 100 ** (torch.arange(0, DIM, 2).double() / DIM)
SCALE = DIM**-0.5


def settings(**values: Any) -> LongContextConfig:
    """Chunks of 192 tokens, blocks of 32, sparse for any length."""
    base = {
        "chunk_size": CHUNK,
        "local_size": LOCAL,
        "original_max_position_embeddings": 1 << 20,
        "sparse_attention_threshold": 1,
        "block_size": 32,
        "last_q": 16,
        "sparse": "block_scores",
    }
    return LongContextConfig(**{**base, **values})


def draw(tokens: int, heads: int = 4, kv_heads: int = 2, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in float64, not rotated; logits spread enough to make a choice."""
    q = torch.randn(batch, tokens, heads, DIM, dtype=torch.float64) * 2
    k, v = torch.randn(2, batch, tokens, kv_heads, DIM, dtype=torch.float64)
    return q, k, v


class Spy(sparsity.Observer):
    """An observer that notes every sparse span."""

    def __init__(self) -> None:
        self.seen: list[tuple[sparsity.SpanView, sparsity.Selection]] = []

    def span(self, view: sparsity.SpanView, selection: sparsity.Selection, record: SpanRecord) -> None:
        assert (view.layer, view.span.start, view.span.stop) == (record.layer, record.start, record.stop)
        self.seen.append((view, selection))


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LongContextConfig,
    cuts: list[int],
    layers: int = 2,
    state: SparseState | None = None,
) -> tuple[torch.Tensor, SparseState, Spy]:
    """Attend in chunks that end at `cuts`; returns outputs, state and what was selected."""
    model = PretrainedConfig(num_hidden_layers=layers, num_attention_heads=q.shape[2])
    state = state or SparseState()
    spy, heads = Spy(), Heads(q.shape[2], k.shape[2])
    request = sparsity.make_request(config.sparse, config, model, heads, state, q.shape[1], spy)
    rotated = torch.empty_like(k)
    outs = []
    for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
        layout = make_layout(
            Call.whole(q.shape[0], q.shape[1]),
            start,
            stop,
            settings=config,
            rotary=RotarySource(INV_FREQ, 1.0),
            dtype=q.dtype,
            device=q.device,
            sparse=request,
        )
        rotated[:, start:stop] = rotate(k[:, start:stop], layout.tables.keys)
        outs.append(attend(q[:, start:stop], Tensors(rotated[:, :stop], v[:, :stop]), layout, SCALE))
    return torch.cat(outs, dim=1), state, spy


def query_rotation(i: int, j: int, selecting: bool) -> int:
    """Rotary position of query i towards key j, clamped unless it only selects."""
    apart = i // STRIDE - j // STRIDE
    if apart == 0:
        return i % STRIDE
    if apart == 1:
        return i % STRIDE + STRIDE if selecting else min(i % STRIDE + STRIDE, CHUNK)
    return CHUNK + i % STRIDE if selecting else CHUNK


def all_logits(q: torch.Tensor, k: torch.Tensor, selecting: bool = False) -> torch.Tensor:
    """Logits of every pair, shape (heads, tokens, tokens), -inf above the diagonal; q and k of one row."""
    tokens = q.shape[0]
    at = torch.tensor([[(query_rotation(i, j, selecting), j % STRIDE) for j in range(tokens)] for i in range(tokens)])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = _pair_logits(q, k, at, INV_FREQ) * SCALE
    return logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)


def kept_pairs(spy: Spy, row: int, tokens: int, heads: int) -> torch.Tensor:
    """Which keys each query keeps, bool of shape (heads, tokens, tokens); dense where no span was sparse."""
    kept = torch.ones(heads, tokens, tokens, dtype=torch.bool)
    for view, selection in spy.seen:
        size = view.tiles.size
        for tile, start in enumerate(view.tiles.starts.tolist()):
            rows = slice(start, min(start + size, view.span.stop))
            kept[:, rows] = False
            for head in range(heads):
                for block in selection.mask[row, head, tile].nonzero()[:, 0].tolist():
                    kept[head, rows, block * size : (block + 1) * size] = True
                if selection.columns is not None:
                    columns = selection.columns[row, head]
                    kept[head, rows, columns[columns >= 0]] = True
    return kept & torch.ones(tokens, tokens, dtype=torch.bool).tril()


def masked(logits: torch.Tensor, kept: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one row over the kept pairs: (tokens, heads, dim), and the share of the whole it holds."""
    v = v.repeat_interleave(logits.shape[0] // v.shape[1], 1)
    some = logits.masked_fill(~kept, -torch.inf)
    out = torch.einsum("hts,shd->thd", some.softmax(-1), v)
    return out, torch.exp(some.logsumexp(-1) - logits.logsumexp(-1))
