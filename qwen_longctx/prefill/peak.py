"""Peak of the activations of a prefill: what is alive at once, counted as the code that runs allocates it.

A tensor of a chunk is counted by its numbers: `hidden` for hidden states, `queries` for what has the shape of the
queries. At its peak a layer holds, beside the embeddings of the chunk, its own input and its normed input,

- in attention the queries, and for every segment of a span those rotated towards it and its result, then their merge;
  dense attention lets go of the rotated ones of a segment before it takes up the next;
- in the MLP the sum with the attention's output, its norm and the MLP's output, and one slice of the MLP's inside.

A cache in 8 bits also hands out keys and values: all of a span to sparse attention, a segment's to dense. Sparse
prefill adds the means of all keys, and for every pair of a tile and a block its score while blocks are chosen, its
place in the mask and in the lists of a segment while they are attended to.

Decoding comes when a prefill has given its activations back: it counts where it takes more than they did, as a captured
graph does after a short prompt. Sparse decode adds means of keys too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qwen_longctx.attention.choice import blocks_kept
from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.positions import Span, spans
from qwen_longctx.kv.eight_bit import room_for
from qwen_longctx.ops import eight_bit
from qwen_longctx.ops.choose import MEAN
from qwen_longctx.ops.merge import MOST_FUSED, TOKENS_AT_A_TIME
from qwen_longctx.sparsity.request import pays
from qwen_longctx.sparsity.rules.block_scores import MEANS_A_BLOCK, POOLED_ROWS

_EMBEDDINGS_INPUT_NORMED = 3  # hidden states alive while a layer attends
_IN_MLP = 5  # the embeddings, the layer's input, its sum with the attention's output, the norm of that, the output
_INSIDE_MLP = 3  # gate, up and their product
_EXPERT_COPIES = 4  # of every token for each of its experts: chosen, projected, weighted, and put back in order
_SCORED = 8  # bytes a pair: scores in float32, and once more as segments are joined
_MASKED, _LISTED = 1, 4  # bytes a pair
_WORKSPACE = 32 << 20  # that cuBLAS takes on Hopper
GRAPH = 64 << 20  # that a captured token holds: a workspace of its own, activations, what the device needs to launch it
_CHUNKS_LOOKED_AT = 16  # the last ones see the most keys; of so many, one is cut where it costs the most


class Peak(NamedTuple):
    """Bytes alive at the peak: the activations, and what choosing keys takes beside them."""

    activations: int
    selection: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.selection


@dataclass(frozen=True)
class Prefill:
    """One prefill on one device.

    Parameters
    ----------
    shape : Shape
        `layers` are those of the device.
    tokens, held : int
        Tokens of a row in all, and those of them that the cache holds already.
    batch : int
        Rows.
    dtype : torch.dtype
    settings : LongContextConfig
    padded : bool
        Whether rows begin or end at different places: their results are then put together in one more tensor.
    """

    shape: Shape
    tokens: int
    batch: int
    dtype: torch.dtype
    settings: LongContextConfig
    held: int = 0
    padded: bool = False

    @property
    def rule(self) -> str | None:
        """The rule of sparse prefill, "auto" taken as on a device where a fast kernel takes block lists."""
        settings = self.settings
        if settings.sparse == "off" or self.tokens <= settings.sparse_attention_threshold:
            return None
        if settings.sparse != "auto":
            return settings.sparse
        worth_it = settings.tile_fits and settings.kernel != "sdpa"
        return "block_scores" if worth_it and pays(settings, self.tokens, self._queries) else None

    @property
    def _queries(self) -> int:
        return self.shape.heads * self.shape.head_dim

    def peak(self) -> Peak:
        """The peak over all chunks."""
        first, size = min(self.held, self.tokens - 1), self.settings.prefill_chunk_size
        found = [
            peak
            for start in range(first, self.tokens, size)[-_CHUNKS_LOOKED_AT:]
            for peak in self._of_chunk(start, min(start + size, self.tokens))
        ]
        most = max(found, key=lambda peak: peak.total)
        fixed = _WORKSPACE + 2 * 8 * self.tokens * self.batch  # token ids and mask
        graph = max(0, GRAPH - most.total) if self.settings.cuda_graphs else 0
        return Peak(most.activations + graph + fixed, most.selection + self._means())

    def _of_chunk(self, start: int, stop: int) -> Iterator[Peak]:
        """The moments of one layer that can be the peak."""
        rows, shape = stop - start, self.shape
        streams = rows * shape.hidden
        tables = 2 * rows * shape.head_dim * (self.batch if self.padded else 1)  # cosines and sines
        yield self._bytes(self._inside_mlp(rows) + _IN_MLP * streams * self.batch, 2 * tables)
        projected = rows * (self._queries + 2 * shape.kv_heads * shape.head_dim)
        base = self.batch * (_EMBEDDINGS_INPUT_NORMED * streams + projected)
        base += self.batch * rows * self._queries * self.padded
        cast = self.batch * rows * self._queries if self.settings.linear == "fp8" else 0  # a byte a number
        # the output projection
        yield self._bytes(base + self.batch * (rows * self._queries + streams), 2 * tables, cast)
        cut = _longest_spans(start, stop, self.settings.stride)
        if len(cut) > 1 or (self.rule and stop == self.tokens):  # results of the spans, and of all
            yield self._bytes(base + self.batch * 2 * rows * self._queries, 2 * tables)
        for span in cut:
            kinds = len(span.segments)
            done = self.batch * (span.start - start) * self._queries
            yield from self._of_span(span, base + done, (kinds + 2) * tables)

    def _of_span(self, span: Span, base: int, tables: int) -> Iterator[Peak]:
        kinds, rows = len(span.segments), span.stop - span.start
        queries = self.batch * rows * self._queries
        parts = kinds if self.rule != "vertical_slash" else 2 * kinds  # it attends to blocks and to single keys
        results = parts * queries + (queries if parts > 1 else 0)
        log_sums = (parts + 2) * self.batch * rows * self.shape.heads * 4
        if parts > MOST_FUSED:  # merged in float32, a slice at a time
            results += queries
            log_sums += 3 * self.batch * min(rows, TOKENS_AT_A_TIME) * self._queries * 4
        if self.rule is None:
            for number, (_, key_start, key_stop) in enumerate(span.segments, 1):
                read = self._read_out(key_stop - key_start)
                yield self._bytes(base + (1 + number) * queries + read, tables, log_sums)
            yield self._bytes(base + results, tables, log_sums)
            return
        rotated = kinds * queries
        base += self._read_out(span.stop)
        tile = self.settings.tile
        tiles = self.batch * self.shape.heads * -(-rows // tile)
        pairs, last = (tiles * -(-keys // tile) for keys in (span.stop, _last_segment(span)))
        yield self._bytes(base + rotated + results, tables, log_sums, _MASKED * pairs + _LISTED * last)
        pooled = kinds * queries * POOLED_ROWS // tile + (queries if rows % tile else 0)
        yield self._bytes(base + rotated + pooled, tables, 0, _SCORED * pairs)

    def _read_out(self, keys: int) -> int:
        """Numbers of the keys and values of a layer that a cache in 8 bits hands out."""
        if self.settings.kv_cache not in eight_bit.KINDS:
            return 0
        return 2 * self.batch * self.shape.kv_heads * self.shape.head_dim * min(room_for(keys), self.tokens)

    def _inside_mlp(self, rows: int) -> int:
        """Numbers in one slice of an MLP, or in the experts, which take a chunk at once."""
        shape, size = self.shape, self.settings.mlp_chunk_size
        sliced = self.batch * min(rows, size) * (_INSIDE_MLP * shape.intermediate + shape.hidden)
        return max(sliced, self.batch * rows * shape.experts_a_token * _EXPERT_COPIES * shape.hidden)

    def _means(self) -> int:
        """Bytes of the means of keys of all layers."""
        share, keys = self.settings.share_decoded(self.tokens), self.tokens * self.batch
        prefill = keys * MEANS_A_BLOCK // self.settings.tile if self.rule == "block_scores" else 0
        decode = 0 if share is None or blocks_kept(share, self.tokens) is None else keys // MEAN
        each = self.shape.layers * self.shape.kv_heads * self.shape.head_dim * self.dtype.itemsize
        return each * max(prefill, decode)

    def _bytes(self, numbers: int, tables: int, others: int = 0, selection: int = 0) -> Peak:
        return Peak((numbers + tables) * self.dtype.itemsize + others, selection)


def _longest_spans(start: int, stop: int, stride: int) -> list[Span]:
    """Spans of a chunk that can be its peak: the first and the last, and of the whole ones between them the last."""
    if (stop - start) <= 3 * stride:
        return list(spans(start, stop, stride))
    last = (stop - 1) // stride * stride
    return [*spans(start, (start // stride + 1) * stride, stride), *spans(last - stride, stop, stride)]


def _last_segment(span: Span) -> int:
    """Keys of the segment whose lists are alive as results are merged."""
    *_, (_, key_start, key_stop) = span.segments
    return key_stop - key_start
