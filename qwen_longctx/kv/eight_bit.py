"""Keys and values of one layer in 8 bits, quantised once as they are appended.

The projections of Qwen2 and Qwen2.5 add to every key a bias that is up to 150 in the first and last layers, where the
rest of a key is below 10. So what is quantised is the key without its rotated bias, which is worked out again from the
key's position and added as keys are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx.errors import Unsupported
from qwen_longctx.kv.store import ALL_ROWS, Form, Store
from qwen_longctx.ops import eight_bit
from qwen_longctx.ops.eight_bit import CODES, EightBit, KeyBias
from qwen_longctx.ops.read_out import read_out
from qwen_longctx.ops.rotate import rotate

_SIZES = 8  # between a length and its double, to which what is read out is rounded up


def room_for(tokens: int) -> int:
    """Tokens for which memory is taken to read out so many: few sizes, so that the allocator has one left over.

    Each chunk of a prefill reads out more than the one before, and a gigabyte that was given back is of no use to what
    is a little larger.
    """
    step = max(1, (1 << max(0, tokens - 1).bit_length()) // (2 * _SIZES))
    return -(-tokens // step) * step


class Turning(NamedTuple):
    """How keys are rotated: where, and by which frequencies.

    Attributes
    ----------
    spots : torch.Tensor
        Shape (1 or batch, tokens), integer: positions modulo the stride, by which new keys were rotated.
    inv_freq : torch.Tensor
        Shape (head_dim / 2,).
    scaling : float
        Factor on all rotated vectors, 1 but for YaRN.
    """

    spots: torch.Tensor
    inv_freq: torch.Tensor
    scaling: float


class EightBitStore(Store):
    """A `Store` whose buffers are codes and scales of keys, the same of values, and the spots of keys.

    Parameters
    ----------
    kind : {"int8", "fp8"}
    capacity : int
        As of `Store`.

    Attributes
    ----------
    dtype : torch.dtype
        In which keys and values are handed out: that of the first ones.
    bias : KeyBias, optional
        What all keys lack.
    """

    def __init__(self, kind: str, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.kind = kind
        self.dtype = torch.float32
        self.bias: KeyBias | None = None

    def append(
        self, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, turning: Turning | None = None
    ) -> None:
        """Add tokens: `k` (rotated) and `v` of shape (batch, tokens, kv_heads, head_dim).

        `bias`, shape (kv_heads * head_dim,), is in all keys and was rotated along, as `turning` says. The bias of the
        first tokens holds until the store is empty again.

        Raises
        ------
        NotImplementedError
            A graph of gradients is wanted.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise Unsupported('a cache in 8 bits has no gradients: train with kv_cache="device", or without a cache')
        if self.length == 0:
            self.dtype, self._means, self.bias = k.dtype, None, None
            if bias is not None and turning is not None:
                vector, inv_freq = (x.detach().to(k.device) for x in (bias, turning.inv_freq))
                self.bias = KeyBias.of(vector.view(k.shape[2:]), inv_freq, turning.scaling, k.dtype)
        spots = k.new_zeros((1, k.shape[1]), dtype=torch.int32) if turning is None else turning.spots.to(k.device)
        eight_bit.write(self._room_for(*self._like(k)), k, v, spots, self.bias, start=self.length)
        self.length += k.shape[1]

    def _like(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes and dtypes of what is held for keys such as `k`."""
        batch, tokens, kv_heads, head_dim = k.shape
        forms = self.forms(kv_heads, head_dim, k.dtype).values()
        return tuple(k.new_empty(1, dtype=one.dtype).expand(batch, tokens, *one.shape) for one in forms)

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        slot: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        spots: torch.Tensor,
    ) -> None:
        """See `Store.write`; quantised on the way."""
        assert self.buffers is not None
        eight_bit.write(self.buffers, rotate(k, *table), v, spots, self.bias, slot=slot)

    def held(self) -> tuple[torch.Tensor, ...]:
        """See `Store.held`; with the bias."""
        bias = () if self.bias is None else self.bias[:3]
        return (*super().held(), *bias)

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. New tensors, of the dtype of the first keys."""
        keys, values = self._held(rows, slice(start, stop))
        return self._read_out(keys), self._read_out(values)

    def _keys(self, start: int, stop: int) -> torch.Tensor:
        return self._read_out(self._held(ALL_ROWS, slice(start, stop))[0])

    def _read_out(self, x: EightBit) -> torch.Tensor:
        """What `x` stands for, in new memory of `room_for` its tokens."""
        assert self.buffers is not None
        rows, tokens, *vector = x.shape
        room = min(room_for(tokens), self.buffers[0].shape[1])
        out = torch.empty((rows, room, *vector), dtype=self.dtype, device=x.codes.device)[:, :tokens]
        read_out(x, out)
        return out

    def _held(self, rows: slice, tokens: slice) -> tuple[EightBit, EightBit]:
        assert self.buffers is not None
        k, k_scales, v, v_scales, spots = (x[rows, tokens] for x in self.buffers)
        return EightBit(k, k_scales, spots, self.bias), EightBit(v, v_scales)

    def forms(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Form]:
        """See `Store`: codes and scales do not depend on `dtype`."""
        codes = Form(CODES[self.kind], (kv_heads, head_dim))
        scales = Form(torch.float32, (kv_heads, 1))
        spots = Form(torch.int32, ())
        return {"keys": codes, "key_scales": scales, "values": codes, "value_scales": scales, "spots": spots}

    def room(self, blocks: torch.Tensor | None = None) -> tuple[EightBit, EightBit]:
        """See `KeyValues`. The buffers."""
        return self._held(ALL_ROWS, ALL_ROWS)

    def size(self) -> tuple[int, torch.dtype]:
        """See `KeyValues`."""
        assert self.buffers is not None
        return self.buffers[0].shape[1], self.dtype

    def adopt(self, which: int, taken: torch.Tensor | None) -> None:
        """Refuse tensors of others: quantised keys and values are none that could be exchanged."""
        if taken is None:
            super().adopt(which, None)
        else:
            raise Unsupported('a cache in 8 bits takes no tensors of keys and values: use kv_cache="device"')
