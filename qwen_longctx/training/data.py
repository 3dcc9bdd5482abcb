"""What a model is trained on: sequences out of text, drawn by their number alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.training.packing import Document, Packed, pack


@dataclass(frozen=True)
class DataSettings:
    """The ``[data]`` table of a recipe."""

    paths: tuple[str, ...] = ()
    dataset: str | None = None
    fill_in_the_middle: float = 0.0
    keyword_retrieval: float = 0.0
    position_retrieval: float = 0.0
    paragraph_reordering: float = 0.0
    conversations: tuple[str, ...] = ()
    held_out: float = 0.01


class Source:
    """Sequences by number: first version, plain text only; the interface stays."""

    def __init__(self, documents: list[np.ndarray], padding: int, seed: int) -> None:
        self.documents, self.padding, self.seed = documents, padding, seed

    def sequence(self, index: int, tokens: int) -> Packed:
        """The sequence of a number, `tokens` long: a pure function of the seed and both."""
        order = np.random.default_rng([self.seed, index, tokens]).permutation(len(self.documents))
        chosen: list[Document] = []
        free = tokens
        for number in order:
            ids = self.documents[number][:free]
            chosen.append(Document(ids, np.ones(len(ids), dtype=bool)))
            free -= len(ids)
            if not free:
                break
        return pack(chosen, tokens, self.padding)


def source(data: DataSettings, tokenizer: Any, seed: int) -> Source:
    """Read what the settings name, and refuse what cannot be trained on."""
    documents = []
    for name in data.paths:
        path = Path(name)
        if not path.exists():
            raise MissingFile(f"{name} does not exist: name a file or folder of text")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                documents.append(np.array([*tokenizer(text).input_ids, tokenizer.eos_token_id]))
    if not documents:
        raise InvalidValue("no text to train on: name files or folders of text in paths")
    return Source(documents, tokenizer.eos_token_id, seed)
