"""A tokenizer as Qwen's is made, small, with a chat template; texts whose every document can be told."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen_longctx.evaluation.prose import names, sentences

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@lru_cache(maxsize=1)
def _backend() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = sentences(random.Random(1))
    texts = ["\n\n".join(next(lines) for _ in range(3)) + "\n\n" for _ in range(300)]
    tokenizer.train_from_iterator(texts + ["    def f(x):\n        return x\n\n\n"] * 50, trainer)
    tokenizer.add_tokens(FIM)
    return tokenizer.to_str()


def tokenizer(template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return made


def text(seed: int, paragraphs: int) -> str:
    """Paragraphs of one to four sentences; the first names the document by a word of its own, ``document-SEED-``."""
    source = random.Random(seed)
    lines = sentences(source)
    found = [f"This is document-{seed}- and {names(source, 1)[0]}."]
    found += [" ".join(next(lines) for _ in range(source.randint(1, 4))) for _ in range(paragraphs - 1)]
    return "\n\n".join(found) + "\n"


def folder(path: Path, documents: int, paragraphs: int = 8) -> Path:
    """A folder of text files, in two folders of its own."""
    for number in range(documents):
        file = path / "ab"[number % 2] / f"{number:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(number, paragraphs), encoding="utf-8")
    return path
