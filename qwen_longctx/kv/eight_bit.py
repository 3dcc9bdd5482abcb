"""Keys and values of one layer in 8 bits, quantised once as they are appended.

The projections of Qwen2 and Qwen2.5 add to every key a bias that is up to 150 in the first and last layers, where the
rest of a key is below 10. So what is quantised is the key without its rotated bias, which is worked out again from the
key's position and added as keys are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx.errors import Unsupported
from qwen_longctx.kv.store import ALL_ROWS, Store
from qwen_longctx.ops import eight_bit
from qwen_longctx.ops.eight_bit import AT_A_TIME, EightBit, KeyBias


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
    """

    def __init__(self, kind: str, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.kind = kind
        self.dtype = torch.float32
        self._bias: KeyBias | None = None

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
            self.dtype, self._means, self._bias = k.dtype, None, None
            if bias is not None and turning is not None:
                vector, inv_freq = (x.detach().to(k.device) for x in (bias, turning.inv_freq))
                self._bias = KeyBias.of(vector.view(k.shape[2:]), inv_freq, turning.scaling, k.dtype)
        spots = k.new_zeros((1, k.shape[1]), dtype=torch.int32) if turning is None else turning.spots.to(k.device)
        eight_bit.write(self._room_for(*self._like(k)), k, v, spots, self._bias, start=self.length)
        self.length += k.shape[1]

    def _like(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes and dtypes of what is held for keys such as `k`."""
        codes = k.new_empty(1, dtype=torch.int8 if self.kind == "int8" else torch.uint8).expand(k.shape)
        scales = k.new_empty(1, dtype=torch.float32).expand(*k.shape[:3], 1)
        return codes, scales, codes, scales, k.new_empty(1, dtype=torch.int32).expand(k.shape[:2])

    def write(self, k: torch.Tensor, v: torch.Tensor, slot: torch.Tensor, spots: torch.Tensor) -> None:
        """See `Store.write`; quantised on the way."""
        assert self.buffers is not None
        eight_bit.write(self.buffers, k, v, spots, self._bias, slot=slot)

    def held(self) -> tuple[torch.Tensor, ...]:
        """See `Store.held`; with the bias."""
        bias = () if self._bias is None else self._bias[:3]
        return (*super().held(), *bias)

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. New tensors, of the dtype of the first keys."""
        held = self._held(rows, slice(start, stop))
        shape, device = held[0].shape, held[0].codes.device
        keys, values = (torch.empty(shape, dtype=self.dtype, device=device) for _ in held)
        for at in range(0, shape[1], AT_A_TIME):
            part = slice(at, at + AT_A_TIME)
            keys[:, part], values[:, part] = (x.part(part).numbers() for x in held)
        return keys, values

    def _held(self, rows: slice, tokens: slice) -> tuple[EightBit, EightBit]:
        assert self.buffers is not None
        k, k_scales, v, v_scales, spots = (x[rows, tokens] for x in self.buffers)
        return EightBit(k, k_scales, spots, self._bias), EightBit(v, v_scales)

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
