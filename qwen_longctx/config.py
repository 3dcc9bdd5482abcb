"""What a run needs to know: read from the checkpoint, overridden by keyword, validated before any work starts.

`LongContextConfig` joins four parts, `Geometry`, `Prefill`, `Sparse` and `Kernels`. Each has its fields and checks
them; a function that needs one part only says so by its type. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any

from qwen_longctx import checkpoint
from qwen_longctx.errors import InvalidType, InvalidValue

KV_CACHES = ("device", "fp8", "int8", "host")
# what kv_cache="auto" tries, in this order: int8 loses less than fp8, and the host's memory is slower than either
AUTO_KV_CACHES = ("device", "int8", "host")
KERNELS = ("auto", "fa4", "flex", "sdpa", "reference")
# a rule of sparse prefill and the settings that it owns: the file of that name in sparsity/rules checks them
_OF_SCORES = ("fidelity", "density", "mass", "score_threshold")
RULES: dict[str, tuple[str, ...]] = {"block_scores": _OF_SCORES, "exact_shares": _OF_SCORES, "vertical_slash": ()}
LINEAR = ("auto", "fp8")
PIPELINES = ("auto", "equal", "measured", "off")
SPARSE = ("off", "auto", *RULES)
_LARGEST_BLOCK = 128
_LARGEST_CHUNK = 1 << 62  # positions are 64-bit integers, and two chunks must fit


class _Part:
    """What the parts share: checks that replace a number of another library by Python's own."""

    def _whole_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InvalidType(f"{name} must be a whole number of tokens, got {value!r}")
        if value < 1:
            raise InvalidValue(f"{name} must be at least 1 token, got {value}")
        object.__setattr__(self, name, int(value))  # of numpy, say, which overflows

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise InvalidValue(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class Geometry(_Part):
    """Chunks of dual chunk attention, and the attention temperature. See `LongContextConfig` for the fields."""

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int
    attention_temperature: bool | str = "position"

    def __post_init__(self) -> None:
        for name in checkpoint.GEOMETRY_KEYS:
            self._whole_number(name)
        if not isinstance(self.attention_temperature, bool) and self.attention_temperature != "position":
            raise InvalidType(
                f"attention_temperature must be True, False or 'position', got {self.attention_temperature!r}"
            )
        if self.chunk_size >= _LARGEST_CHUNK:
            raise InvalidValue(f"chunk_size must be below 2**62 tokens, got {self.chunk_size}")
        if self.local_size >= self.chunk_size:
            raise InvalidValue(
                f"local_size ({self.local_size}) must be smaller than chunk_size ({self.chunk_size}): "
                "their difference is the stride of the chunks"
            )
        if self.local_size > self.stride:
            raise InvalidValue(
                f"local_size ({self.local_size}) must be at most half of chunk_size ({self.chunk_size}), "
                "or a query's exact window would reach past the previous chunk"
            )

    @property
    def stride(self) -> int:
        """Length of a chunk in tokens, ``s = chunk_size - local_size``."""
        return self.chunk_size - self.local_size

    def temperature(self, length: int) -> float:
        """Factor ``f²`` on the logits of a sequence of `length` tokens (Qwen2.5-1M report, equation 1)."""
        if not self.attention_temperature or length <= self.original_max_position_embeddings:
            return 1.0
        # a difference of logarithms, because a quotient of whole numbers beyond 1e308 overflows
        times = math.log(length) - math.log(self.original_max_position_embeddings)
        return (0.1 * times + 1.0) ** 2


@dataclass(frozen=True)
class Prefill(_Part):
    """Tokens that pass through the model, and through an MLP, at a time; and how several devices share them."""

    prefill_chunk_size: int = 32768
    mlp_chunk_size: int = 2048
    pipeline: str = "auto"

    def __post_init__(self) -> None:
        self._whole_number("prefill_chunk_size")
        self._whole_number("mlp_chunk_size")
        self._choice("pipeline", PIPELINES)


@dataclass(frozen=True)
class Sparse(_Part):
    """Sparse prefill: the rule that chooses keys, when it does, and the settings that rules own."""

    sparse: str = "auto"
    sparse_attention_threshold: int = 32768
    last_q: int = 64
    block_size: int | None = None
    sparse_attention_config: Any = field(default=None, hash=False)
    recall_target: float | None = None
    fidelity: str = "balanced"
    density: float | None = None
    mass: float | None = None
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        self._choice("sparse", SPARSE)
        self._whole_number("sparse_attention_threshold")
        self._whole_number("last_q")
        if self.block_size is not None:
            self._whole_number("block_size")
        if self.recall_target is not None:
            object.__setattr__(self, "recall_target", share("recall_target", self.recall_target, below_one=True))
        if not isinstance(self.sparse_attention_config, (str, Path, list, Mapping, NoneType)):
            raise InvalidType(
                "sparse_attention_config must be a file, its content or 'minference', "
                f"got {self.sparse_attention_config!r:.80}"
            )
        defaults = {field.name: field.default for field in fields(Sparse)}
        for rule, names in RULES.items():
            given = [name for name in names if getattr(self, name) != defaults[name]]
            if not given:
                continue
            if self.sparse in RULES and given[0] not in RULES[self.sparse]:
                raise InvalidValue(
                    f"{given[0]} is a setting of {rule}, sparse is {self.sparse!r}: leave {given[0]} out, or set "
                    f"sparse={rule!r}"
                )
            self.options(rule)

    def options(self, rule: str) -> Any:
        """The settings that a rule owns, checked by the rule's own file (loaded here: it imports torch)."""
        owned = {name: getattr(self, name) for name in RULES[rule]}
        return import_module(f"qwen_longctx.sparsity.rules.{rule}").Options(**owned)


@dataclass(frozen=True)
class Kernels(_Part):
    """The attention kernel, what a decoded token attends to, how it is launched, and the dtype of linear layers."""

    kernel: str = "auto"
    sparse_decode: float | None = None
    sparse_decode_threshold: int = 131072
    linear: str = "auto"
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        self._choice("kernel", KERNELS)
        self._choice("linear", LINEAR)
        self._whole_number("sparse_decode_threshold")
        if not isinstance(self.cuda_graphs, bool):
            raise InvalidType(f"cuda_graphs must be True or False, got {self.cuda_graphs!r}")
        if self.sparse_decode is None:
            return
        object.__setattr__(self, "sparse_decode", share("sparse_decode", self.sparse_decode))
        if self.kernel in ("sdpa", "reference"):
            raise InvalidValue(
                f"kernel={self.kernel!r} has no sparse_decode: leave kernel at 'auto', or sparse_decode out"
            )

    def share_decoded(self, length: int) -> float | None:
        """Share of the keys that a token attends to as the last of `length`; None is all of them."""
        return self.sparse_decode if length > self.sparse_decode_threshold else None


@dataclass(frozen=True)
class KeyValueCache(_Part):
    """How keys and values are held."""

    kv_cache: str = "device"

    def __post_init__(self) -> None:
        self._choice("kv_cache", ("auto", *KV_CACHES))


@dataclass(frozen=True)
class LongContextConfig(KeyValueCache, Kernels, Sparse, Prefill, Geometry):  # fields come from the last base on
    """Settings of dual chunk attention, of chunked prefill and of sparse prefill.

    Parameters
    ----------
    chunk_size : int
        Largest relative position the model ever sees, in tokens (``c`` of the Qwen2.5-1M report, section 5.1).
    local_size : int
        Tokens of the previous chunk whose distance stays exact (``w``). Keys rotate by ``position mod (c - w)``.
    original_max_position_embeddings : int
        Trained length, in tokens. The attention temperature starts beyond it.
    attention_temperature : bool or "position"
        Multiply logits by ``f²``, ``f = max(1, 0.1 ln(n / original_max_position_embeddings) + 1)``. With True, n is
        the length of the prompt, and of the sequence from the prompt's end on; with "position", n is the position of
        each query plus 1.
    prefill_chunk_size : int
        Tokens of a prompt that pass through the model at a time.
    mlp_chunk_size : int
        Tokens that pass through an MLP at a time.
    pipeline : {"auto", "equal", "measured", "off"}
        Where layers lie on several CUDA devices, these work on neighbouring chunks of a prompt at once: on chunks of
        equal time by the model's shape ("auto", the same in every run), of equal length, or of equal time as the first
        chunks were measured. "off" is one chunk at a time. See ``docs/several-devices.md``.
    sparse : {"off", "auto", "block_scores", "exact_shares", "vertical_slash"}
        How prefill chooses keys. "auto" is "block_scores" where a fast kernel takes block lists and the prompt is long
        enough for this model that it is faster, else dense. "exact_shares" is for study: slower than dense.
    sparse_attention_threshold : int
        Prompts of more tokens are prefilled sparsely.
    last_q : int
        Queries at the end of a span on which recall is measured, and by which vertical-slash selects.
    block_size : int, optional
        Tokens per query tile and per key block of sparse prefill, a power of 2 from 32 on that divides the stride; the
        largest such up to 128 if left out. "fa4" takes 128 only.
    sparse_attention_config : str, path or list, optional
        Budgets for vertical-slash: a file, its content, or "minference" for the file that package ships.
    recall_target : float, optional
        Share of the dense attention below which a head gets more than others; None is the rule's own.
    fidelity : {"fast", "balanced", "careful"}
        How much of the attention block scores keep: see ``docs/sparse-prefill.md`` for what each costs.
    density, mass, score_threshold : float, optional
        What block scores keep, in place of a fidelity: the best share of the blocks, of the scored mass, or what
        has this fraction of a tile's best score; `density` can limit the other two. Held for all heads, unless a
        `recall_target` is given too.
    kernel : {"auto", "fa4", "flex", "sdpa", "reference"}
        Attention kernel; "auto" takes the fastest one that runs here. "fa4" and "flex" are for sparse prefill and run
        dense attention as "auto" does. "sdpa" is PyTorch's own attention, for decoding too, and takes no block lists.
    kv_cache : {"device", "auto", "fp8", "int8", "host"}
        How the caches that are made for a run hold keys and values: as they are, in 8 bits, or in the memory of the
        host, from where they come up to the device a layer at a time. "auto" is the first of "device", "int8" and
        "host" that fits. See ``docs/memory.md``.
    sparse_decode : float, optional
        Share of the keys, above 0 and up to 1, that a decoded token attends to in each KV head, 4,096 keys at least;
        None is all of them. See ``docs/sparse-decode.md``.
    sparse_decode_threshold : int
        Tokens of longer sequences only are decoded sparsely: before that, choosing takes longer than it saves.
    linear : {"auto", "fp8"}
        What the linear layers of attention and MLPs compute in: "auto" is their own dtype. "fp8" casts them to 8 bits,
        which must be bf16 on a CUDA device of compute capability 8.9 or newer, and keeps the originals on the host.
    cuda_graphs : bool
        Let `generate` capture the forward of a token as a CUDA graph where that is safe, and repeat it for the next
        tokens.

    Raises
    ------
    TypeError
        A field has the wrong type. Whole numbers of other libraries, such as numpy's, are taken as Python's.
    ValueError
        A field is out of range.
    """

    def __post_init__(self) -> None:
        for part in (Geometry, Prefill, Kernels, Sparse, KeyValueCache):
            part.__post_init__(self)
        if self.sparse in ("off", "auto"):
            return
        if self.kernel == "sdpa":
            raise InvalidValue(f"kernel='sdpa' takes no block lists, sparse is {self.sparse!r}: leave kernel at 'auto'")
        if not self.tile_fits:
            raise InvalidValue(
                f"sparse prefill needs blocks of a power of 2 from 32 on that divides chunk_size - local_size "
                f"({self.stride}), got {self.tile}: change block_size or local_size, or set sparse='off'"
            )

    @property
    def geometry(self) -> Geometry:
        """The geometry alone: two settings of equal geometry can share a cache."""
        return Geometry(**{part.name: getattr(self, part.name) for part in fields(Geometry)})

    @property
    def tile(self) -> int:
        """Tokens per query tile and per key block of sparse prefill."""
        return self.block_size or min(_LARGEST_BLOCK, self.stride & -self.stride)

    @property
    def tile_fits(self) -> bool:
        """Whether sparse prefill can work in such tiles: a power of 2 from 32 on that divides the stride."""
        return self.tile >= 32 and self.tile & (self.tile - 1) == 0 and self.stride % self.tile == 0

    @classmethod
    def from_model_config(cls, config: Any, **overrides: Any) -> LongContextConfig:
        """Read a transformers config; keyword overrides win.

        Without ``dual_chunk_attention_config`` in the checkpoint, `chunk_size` and
        `original_max_position_embeddings` are the trained length and `local_size` is a quarter of `chunk_size`.

        Parameters
        ----------
        config : transformers.PretrainedConfig
            Config of a Qwen2, Qwen2-MoE, Qwen3 or Qwen3-MoE checkpoint.
        **overrides
            Fields of this class.

        Raises
        ------
        TypeError
            An override or a key of the checkpoint's section is unknown or has the wrong type.
        ValueError
            A value is out of range, or the checkpoint has sliding-window layers or a length-dependent rotary base.
        """
        check_overrides(overrides)
        return cls(**{**checkpoint.settings_of(config, overrides.get("chunk_size")), **overrides})


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise TypeError if a keyword is not a field of `LongContextConfig`."""
    known = [known.name for known in fields(LongContextConfig)]
    for name in overrides:
        if name not in known:
            raise InvalidType(f"unknown setting {name!r}: the settings are {', '.join(known)}")


def share(name: str, value: Any, below_one: bool = False) -> float:
    """`value` as a number above 0 and up to 1, or below 1.

    Raises
    ------
    TypeError, ValueError
        It is no number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidType(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not 0 < number <= 1 or (below_one and number == 1):
        raise InvalidValue(f"{name} must lie between 0 and 1, got {value}")
    return number
