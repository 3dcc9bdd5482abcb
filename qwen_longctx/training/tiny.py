"""Train the bundled checkpoint, the way Qwen2.5-1M was: growing lengths, the rotary base raised at each.

    python -m qwen_longctx.training.tiny --output qwen_longctx/assets/tiny-qwen2 --device cuda

The model is a Qwen2 of 3 million parameters with a tokenizer of its own. It learns to recall numbers that a text of
at most 256 tokens gave names to, with plain rotary attention; longer texts it never sees (Qwen2.5-1M report, section
3: adjusted base frequency). Dual chunk attention then carries the recall to many times that length.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from qwen_longctx import patched_qwen
from qwen_longctx.evaluation.environment import environment
from qwen_longctx.evaluation.passkey import (
    INTRO,
    NAME,
    NEEDLE,
    NOISE,
    QUESTION,
    accuracy,
    evaluate,
    random_key,
)

logger = logging.getLogger(__name__)

SEED = 20261123
VOCABULARY = 1024
END = "<|endoftext|>"
ANSWER_SHARE = 0.8  # of the loss; the rest is ordinary language modelling
PEAK_RATE = 1.5e-3
WARMUP = 300
EVALUATED = (1, 4, 16, 64)  # multiples of the trained length


@dataclass(frozen=True)
class Stage:
    """One stage of training: sequences of `length` tokens at rotary base `rope_theta`."""

    length: int
    rope_theta: float
    steps: int
    batch: int


STAGES = (Stage(64, 1_000.0, 2000, 512), Stage(128, 3_000.0, 2000, 256), Stage(256, 10_000.0, 6000, 128))
TRAINED = STAGES[-1].length

_NAMES = (
    *(
        "door code",
        "safe code",
        "room number",
        "bus number",
        "secret number",
        "magic number",
        "ticket number",
    ),
    *(
        "order number",
        "house number",
        "phone code",
        "train number",
        "gate code",
        "box number",
        "lucky number",
    ),
    *("bank code", "garden code", "ship number", "post code", "member number", "test number", "seat number"),
)
_WHO = "The farmer|My sister|A tall man|The old teacher|Our neighbour|The small dog|A quiet girl|The baker".split("|")
_DID = "walked to|looked at|talked about|painted|found|waited near|drove past|remembered|sold|cleaned".split("|")
_WHAT = "the river|a red house|the long road|an empty box|the green hill|some bread|the market|two boats".split("|")
_WHEN = "in the morning|after lunch|last winter|before the rain|every Sunday|at night|for an hour|again".split("|")
_COUNTED = " {who} counted {n} apples.| There were {n} birds on the roof.| Page {n} was missing.| It cost {n} coins."


def sentence(source: random.Random) -> str:
    """One sentence of filler; one in eight holds a number that nobody asks for."""
    if source.random() < 0.125:
        template = source.choice(_COUNTED.split("|"))
        return template.format(who=source.choice(_WHO), n=source.randrange(10 ** source.randint(1, 5)))
    return f" {source.choice(_WHO)} {source.choice(_DID)} {source.choice(_WHAT)} {source.choice(_WHEN)}."


def train_tokenizer(source: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE over our own text; digits stay single, as in Qwen's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [sentence(source) for _ in range(4000)] + [INTRO, *NOISE] * 40
    for name in (NAME, *_NAMES):
        texts += [NEEDLE.format(name=name, key=random_key(source)), QUESTION.format(name=name)] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


class Recall(IterableDataset):
    """Endless texts of `length` tokens: named numbers among filler, then questions with their answers.

    Yields ids of shape (length,) and a mask of the same shape that marks the answers' digits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self._digits = [self._encode(str(digit))[0] for digit in range(10)]
        self._blanks: dict[tuple[str, str], list[int]] = {}

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        info = torch.utils.data.get_worker_info()
        source = random.Random(self.seed * 1000 + (info.id if info else 0))
        bank = [self._encode(sentence(source)) for _ in range(3000)]
        noise = [self._encode(text) for text in NOISE]
        self.intro = self._encode(INTRO)
        while True:
            yield self._text(source, bank, noise)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(
        self, source: random.Random, bank: list[list[int]], noise: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        named = max(1, min(source.choice((1, 1, 1, 2, 3, 4)), self.length // 48))
        names = [NAME] if source.random() < 0.5 else [source.choice(_NAMES)]
        names += source.sample([n for n in _NAMES if n not in names], named - 1)
        keys = [random_key(source) for _ in names]
        asked = list(zip(names, keys, strict=True))
        source.shuffle(asked)
        asked = asked[: source.randint(1, len(asked))]
        end, marks = self._questions(asked)
        needles = [self._with_key(NEEDLE, n, k)[0] for n, k in zip(names, keys, strict=True)]
        start = self.intro if source.random() < 0.5 else []
        room = self.length - sum(map(len, needles)) - len(end)
        start = start if room >= len(start) else []
        room = max(0, room - len(start))
        trailing = source.randrange(room + 1) if source.random() < 0.25 else 0
        cuts = sorted(source.randrange(room - trailing + 1) for _ in needles)
        gaps = np.diff([0, *cuts, room - trailing]).tolist()
        plain = source.random() < 0.5
        body = list(start)
        for gap, needle in zip(gaps, [*needles, []], strict=True):
            body += self._filler(source, bank, noise, gap, plain) + needle
        ids = body + end + self._filler(source, bank, noise, trailing, plain)
        mask = [0] * len(body) + marks + [0] * trailing
        return np.array(ids[-self.length :]), np.array(mask[-self.length :], dtype=bool)

    def _questions(self, asked: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        marks: list[int] = []
        for name, key in asked:
            text, first = self._with_key(QUESTION + " {key}.", name, key)
            ids += text
            marks += [0] * (first - 1) + [1] * (len(text) - first + 1)  # from the space before the key
        return ids, marks

    def _with_key(self, template: str, name: str, key: str) -> tuple[list[int], int]:
        """Ids of a template filled in, and where the key first stands; each template is encoded once a name."""
        if (template, name) not in self._blanks:
            self._blanks[template, name] = self._encode(template.format(name=name, key="00000"))
        ids = list(self._blanks[template, name])
        places = [place for place, token in enumerate(ids) if token == self._digits[0]]
        for place, digit in zip(places, cycle(key), strict=False):
            ids[place] = self._digits[int(digit)]
        return ids, places[0]

    @staticmethod
    def _filler(
        source: random.Random, bank: list[list[int]], noise: list[list[int]], length: int, plain: bool
    ) -> list[int]:
        """`length` tokens of the passkey's noise (`plain`) or of varied sentences; the first may be cut."""
        out: list[int] = []
        turn = source.randrange(len(noise))
        while len(out) < length:
            out += noise[turn % len(noise)] if plain else source.choice(bank)
            turn += 1
        return out[len(out) - length :]


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of about 3 million parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    chunks = {"chunk_size": TRAINED, "local_size": TRAINED // 4, "original_max_position_embeddings": TRAINED}
    config.update({"dual_chunk_attention_config": chunks})
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def set_rope_theta(model: Qwen2ForCausalLM, theta: float) -> None:
    """Raise the rotary base: in the config, and in the frequencies the model uses."""
    config: Any = model.config
    if getattr(config, "rope_parameters", None):
        config.rope_parameters["rope_theta"] = theta
    else:
        config.rope_theta = theta
    old = model.model.rotary_emb
    model.model.rotary_emb = type(old)(config).to(old.inv_freq.device)


def loss_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss of a batch, and the loss on the answers alone."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    answers = mask[:, 1:].flatten().float()
    on_answers = (losses * answers).sum() / answers.sum()
    elsewhere = (losses * (1 - answers)).sum() / (1 - answers).sum()
    return ANSWER_SHARE * on_answers + (1 - ANSWER_SHARE) * elsewhere, on_answers


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    scale: float,
    workers: int,
) -> list[dict[str, Any]]:
    """Run all stages; returns the log, a row every hundred steps."""
    stages = [Stage(s.length, s.rope_theta, max(1, round(s.steps * scale)), s.batch) for s in STAGES]
    total = sum(stage.steps for stage in stages)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / total)) + 0.02)
    )
    log, done, begin = [], 0, time.perf_counter()
    for index, stage in enumerate(stages):
        set_rope_theta(model, stage.rope_theta)
        batch = stage.batch if device.type == "cuda" else min(stage.batch, 16)
        data = DataLoader(
            Recall(tokenizer, stage.length, SEED + index),
            batch_size=batch,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=8 if workers else None,
        )
        bar = transformers_logging.tqdm(total=stage.steps, desc=f"{stage.length} tokens", unit="step")
        for step, (ids, mask) in zip(range(stage.steps), data, strict=False):
            ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, on_answers = loss_of(model, ids, mask)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 100 == 99 or step == stage.steps - 1:
                row = {
                    "stage": asdict(stage),
                    "step": done + step + 1,
                    "loss": round(loss.item(), 4),
                    "loss_on_answers": round(on_answers.item(), 5),
                    "seconds": round(time.perf_counter() - begin, 1),
                }
                log.append(row)
                logger.info("%s", row)
        bar.close()
        done += stage.steps
    return log


def retrieval(model: Any, tokenizer: Any, keys: int, multiples: tuple[int, ...] = EVALUATED) -> dict[str, Any]:
    """Share of `keys` passkeys found over depths, with and without the patch, by multiple of the trained length."""
    depths = [i / (keys - 1) for i in range(keys)]
    trained = model.config.max_position_embeddings
    lengths = [multiple * trained for multiple in multiples]
    model.eval()
    with patched_qwen(model):
        patched = accuracy(evaluate(model, tokenizer, lengths, depths, seed=SEED))
    stock = accuracy(evaluate(model, tokenizer, lengths, depths, seed=SEED))
    return {"keys": keys, "trained_length": trained, "patched": patched, "unpatched": stock}


def suit_older_transformers(folder: Path) -> None:
    """Add to a saved checkpoint what transformers 4.57 reads and transformers 5 no longer writes."""
    config_file, tokenizer_file = folder / "config.json", folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = json.loads(tokenizer_file.read_text())
    tokenizer.pop("backend", None)
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that both generations know
    tokenizer_file.write_text(json.dumps(tokenizer, indent=2) + "\n")


def main() -> None:
    """Train, evaluate and write a checkpoint that ``from_pretrained`` loads; or only evaluate one again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the steps to run")
    parser.add_argument("--workers", type=int, default=0, help="processes that write texts")
    parser.add_argument("--keys", type=int, default=100, help="passkeys asked for at each length")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint in --output again")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(args.device)
    log_file = args.output / "training_log.json"
    log: dict[str, Any] = json.loads(log_file.read_text()) if args.evaluate_only else {}
    if not args.evaluate_only:
        random.seed(SEED)
        torch.manual_seed(SEED)
        tokenizer = train_tokenizer(random.Random(SEED))
        model: Any = new_model(tokenizer)
        model.to(device)
        rows = train(model, tokenizer, device, args.steps_scale, args.workers)
        args.output.mkdir(parents=True, exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        suit_older_transformers(args.output)
        log = {"seed": SEED, "workers": args.workers, "environment": environment(), "steps": rows}
    model = Qwen2ForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    model.to(device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    found = {"environment": environment(), "dtype": "float32", **retrieval(model, tokenizer, args.keys)}
    log.setdefault("retrieval", []).append(found)
    log_file.write_text(json.dumps(log, indent=1) + "\n")
    logger.info("%s", json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
