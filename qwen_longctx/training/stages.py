"""Recipes: what is trained, in which stages, from one TOML file."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from qwen_longctx.config import share
from qwen_longctx.errors import InvalidType, InvalidValue, MissingFile, MissingPackage
from qwen_longctx.training.data import DataSettings

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT = RECIPES / "default.toml"
METHODS = ("lora", "full")
OPTIMISERS = ("adamw", "adamw_8bit")
SCHEDULES = ("cosine", "constant")
DTYPES = ("bfloat16", "float32", "float64")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_Settings = TypeVar("_Settings")


@dataclass(frozen=True)
class Stage:
    """One stage: sequences of one length at one rotary base.

    Parameters
    ----------
    name : str
        Of the stage in the log.
    sequence_length : int
        Tokens of a sequence.
    rope_theta : float
        Rotary base.
    tokens : int
        Of the whole stage; rounded up to whole steps.
    learning_rate : float
        The highest of the stage.
    sequences_per_step : int
        Sequences whose gradients are added before the weights change, over all cards.
    short_share : float
        Share of the sequences that are made of shorter texts, as 25 % in the report of Qwen2.5-1M (section 3).
    short_length : int, optional
        Tokens of a shorter text; half of `sequence_length` by default.
    """

    name: str
    sequence_length: int
    rope_theta: float
    tokens: int
    learning_rate: float
    sequences_per_step: int = 1
    short_share: float = 0.25
    short_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "tokens", "sequences_per_step"):
            _at_least(self, name, 1)
        for name in ("rope_theta", "learning_rate"):
            _positive(self, name)
        _fraction(self, "short_share")
        if self.short_length is not None:
            _at_least(self, "short_length", 2)
            if self.short_length > self.sequence_length:
                raise InvalidValue(
                    f"short_length ({self.short_length}) of stage {self.name!r} is above its sequence_length "
                    f"({self.sequence_length}): make it smaller"
                )
        if self.sequence_length < 8:
            raise InvalidValue(
                f"sequence_length of stage {self.name!r} must be at least 8 tokens, got {self.sequence_length}"
            )

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return max(1, math.ceil(self.tokens / (self.sequence_length * self.sequences_per_step)))

    def parts(self, number: int) -> list[int]:
        """Tokens of the texts of sequence `number` of the stage: one text, or several shorter ones.

        The shorter ones are spread evenly: of n sequences the nearest whole number to ``n * short_share``.
        """
        return [self.sequence_length] if self._short(number + 1) == self._short(number) else self._pieces()

    def texts(self, sequences: int) -> Counter[int]:
        """How many texts of each length the first `sequences` of the stage take."""
        short = self._short(sequences)
        found = Counter({self.sequence_length: sequences - short})
        for length in self._pieces():
            found[length] += short
        return found

    def _short(self, sequences: int) -> int:
        """How many of the first `sequences` are made of shorter texts."""
        return math.floor(sequences * self.short_share + 0.5)

    def _pieces(self) -> list[int]:
        short = self.short_length or max(2, self.sequence_length // 2)
        whole, rest = divmod(self.sequence_length, short)
        pieces = [short] * whole
        if rest > 1:
            return [*pieces, rest]
        pieces[-1] += rest  # a text of one token has nothing to predict
        return pieces


@dataclass(frozen=True)
class Lora:
    """The ``[lora]`` table: adapters of low rank beside frozen weights (PEFT).

    Parameters
    ----------
    rank : int
    alpha : int, optional
        Adapters are scaled by ``alpha / rank``; twice the rank by default.
    modules : tuple of str
        Linear layers that get one.
    norms : bool
        Whether the norms learn too, as LongLoRA found helpful (arXiv 2309.12307); they are few numbers.
    largest_mib : float, optional
        The run is refused if the adapter's file would be larger.
    """

    rank: int = 16
    alpha: int | None = None
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: bool = True
    largest_mib: float | None = None

    def __post_init__(self) -> None:
        _at_least(self, "rank", 1)
        for name in ("alpha", "largest_mib"):
            if getattr(self, name) is not None:
                _positive(self, name)
        unknown = [name for name in self.modules if name not in LINEAR]
        if unknown or not self.modules:
            raise InvalidValue(f"modules of [lora] must be some of {', '.join(LINEAR)}, got {list(self.modules)}")


@dataclass(frozen=True)
class Optimiser:
    """The ``[optimiser]`` table.

    Parameters
    ----------
    name : {"adamw", "adamw_8bit"}
        AdamW with its state, and a copy of weights in half precision, in float32; or torchao's, with a state of 8 bits
        and weights that are rounded stochastically.
    beta1, beta2, weight_decay : float
        Of AdamW; only matrices decay.
    clip : float
        Norm that gradients are cut to.
    warmup : float
        Share of a stage's steps in which the learning rate rises.
    schedule : {"cosine", "constant"}
        How it goes on.
    final : float
        Share of the learning rate at the end of "cosine".
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.1
    schedule: str = "cosine"
    final: float = 0.1

    def __post_init__(self) -> None:
        _choice(self, "name", OPTIMISERS)
        _choice(self, "schedule", SCHEDULES)
        for name in ("beta1", "beta2", "weight_decay", "warmup", "final"):
            _fraction(self, name)
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise InvalidValue(f"{name} must be below 1, got 1")
        _positive(self, "clip")


@dataclass(frozen=True)
class Memory:
    """The ``[memory]`` table: how little room a step takes.

    Parameters
    ----------
    kernel : str
        Of attention; "auto" times those that run.
    slice_tokens : int
        Tokens that pass through an MLP at a time.
    offload : bool, optional
        Whether activations wait on the host; by default where they would take more than half of the card's free memory.
    recompute : bool
        Whether layers are computed again for the backward.
    """

    kernel: str = "auto"
    slice_tokens: int = 4096
    offload: bool | None = None
    recompute: bool = True

    def __post_init__(self) -> None:
        _at_least(self, "slice_tokens", 1)


@dataclass(frozen=True)
class Evaluation:
    """The ``[evaluation]`` table: the loss by position on texts held out, before and after.

    Parameters
    ----------
    texts : int
        How many; 0 leaves it out.
    length : int, optional
        Tokens of each; those of the longest stage by default.
    """

    texts: int = 4
    length: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, "texts", 0)
        if self.length is not None:
            _at_least(self, "length", 8)


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Parameters
    ----------
    stages : tuple of Stage
        In their order.
    data : DataSettings
    method : {"lora", "full"}
        Adapters beside frozen weights, or all weights.
    dtype : {"bfloat16", "float32", "float64"}
        Of the weights while training.
    seed : int
    save_every : int
        Steps between two saves of the state: what a kill costs at most.
    local_size : int, optional
        Of the result's ``dual_chunk_attention_config``; by default a quarter of the longest stage, 8,192 at most, as
        the 1M checkpoints have it.
    lora, optimiser, memory, evaluation
        Tables of their own.
    """

    stages: tuple[Stage, ...]
    data: DataSettings = field(default_factory=DataSettings)
    method: str = "lora"
    dtype: str = "bfloat16"
    seed: int = 0
    save_every: int = 5
    local_size: int | None = None
    lora: Lora = field(default_factory=Lora)
    optimiser: Optimiser = field(default_factory=Optimiser)
    memory: Memory = field(default_factory=Memory)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidValue("a recipe needs a [[stages]] table: give one for each length")
        _choice(self, "method", METHODS)
        _choice(self, "dtype", DTYPES)
        _at_least(self, "seed", 0)
        _at_least(self, "save_every", 1)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise InvalidValue(f"stages must have names of their own, got {', '.join(names)}")
        if self.local_size is not None:
            _at_least(self, "local_size", 1)
            if self.local_size > self.longest // 2:
                raise InvalidValue(
                    f"local_size ({self.local_size}) must be at most half of the longest stage ({self.longest})"
                )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: the trained length of the result."""
        return max(stage.sequence_length for stage in self.stages)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step's number within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError(step)

    def numbered(self, stage: Stage, number: int) -> list[tuple[int, int]]:
        """The texts of sequence `number` of a stage: of each its number, and its length.

        Numbers go through the whole run, for each length by itself: a text comes once before any comes again.
        """
        taken = stage.texts(number)
        for other in self.stages[: self.stages.index(stage)]:
            taken += other.texts(other.steps * other.sequences_per_step)
        found = []
        for length in stage.parts(number):
            found.append((taken[length], length))
            taken[length] += 1
        return found


# --- reading ------------------------------------------------------------------------------------------------------


def read(path: str | Path, **changed: Any) -> Recipe:
    """The recipe of a TOML file.

    Parameters
    ----------
    path : str or Path
    **changed
        Values that take the place of the file's, by name; those of ``[data]`` in a mapping `data`.

    Raises
    ------
    MissingFile
        The file cannot be read, or is no TOML.
    InvalidType, InvalidValue
        A name in it is unknown, or a value is none that it can take; the message says which.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFile(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse(content, str(path), **changed)


def parse(content: str, name: str = "the recipe", **changed: Any) -> Recipe:
    """The recipe of TOML text. See `read`."""
    toml = _toml()
    try:
        table = toml.loads(content)
    except toml.TOMLDecodeError as error:
        raise InvalidValue(f"{name} is no TOML: {error}") from error
    table |= {key: value for key, value in changed.items() if key != "data"}
    table["data"] = {**_table(table.get("data", {}), "data", name), **changed.get("data", {})}
    return of(table, name)


def of(table: Mapping[str, Any], name: str = "the recipe") -> Recipe:
    """The recipe of a mapping, as TOML has it; `as_table` is the other way."""
    values = dict(table)
    stages = values.pop("stages", ())
    if not isinstance(stages, (list, tuple)):
        raise InvalidType(f"stages of {name} must be tables headed [[stages]], got {stages!r:.80}")
    parts: dict[str, Any] = {"stages": tuple(_build(Stage, one, "[[stages]]", name) for one in stages)}
    tables: dict[str, type] = {
        "data": DataSettings, "lora": Lora, "optimiser": Optimiser, "memory": Memory, "evaluation": Evaluation
    }  # fmt: skip
    for key, kind in tables.items():
        if key in values:
            parts[key] = _build(kind, values.pop(key), f"[{key}]", name)
    return _build(Recipe, {**values, **parts}, "", name)


def as_table(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, such as JSON takes."""
    return dataclasses.asdict(recipe)


def _toml() -> Any:
    for name in ("tomllib", "tomli"):  # the first comes with Python 3.11
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise MissingPackage(
        'Python 3.10 needs tomli to read a recipe, which is not installed: pip install "qwen-longctx[train]"'
    )


def _table(value: Any, key: str, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidType(f"{key} of {name} must be a table headed [{key}], got {value!r:.80}")
    return value


def _build(kind: type[_Settings], table: Any, head: str, name: str) -> _Settings:
    """A settings class from a table; every value has the type of its field."""
    if not isinstance(table, Mapping):
        raise InvalidType(f"{head} of {name} must be a table, got {table!r:.80}")
    hints = get_type_hints(kind)
    known = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    where = f"{head} of {name}" if head else name
    for key in table:
        if key not in known:
            raise InvalidType(f"{where} has the unknown name {key!r}: it knows {', '.join(known)}")
    missing = [
        key
        for key, one in known.items()
        if key not in table and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InvalidValue(f"{where} lacks {', '.join(missing)}")
    return kind(**{key: _typed(value, hints[key], f"{key} of {where}") for key, value in table.items()})


def _typed(value: Any, hint: Any, what: str) -> Any:
    """`value` if it is of the type `hint`: whole numbers pass as floats, and lists become tuples."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if kind is NoneType and value is None:
            return None
        if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            item = get_args(kind)[0]
            return tuple(_typed(one, item, f"an entry of {what}") for one in value)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
            return value
    wanted = " or ".join(_WORDS.get(get_origin(kind) or kind, str(kind)) for kind in kinds)
    raise InvalidType(f"{what} must be {wanted}, got {value!r:.80}")


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    NoneType: "left out",
}


# --- checks -------------------------------------------------------------------------------------------------------


def _at_least(settings: Any, name: str, least: int) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise InvalidValue(f"{name} must be at least {least}, got {value}")


def _positive(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if not 0 < value < math.inf:
        raise InvalidValue(f"{name} must be a number above 0, got {value}")


def _fraction(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if value != 0:
        share(name, value)


def _choice(settings: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(settings, name)
    if value not in choices:
        raise InvalidValue(f"{name} must be one of {', '.join(choices)}, got {value!r}")
