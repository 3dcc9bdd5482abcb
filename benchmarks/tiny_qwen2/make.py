"""Train the bundled checkpoint, the way Qwen2.5-1M was: growing lengths, the rotary base raised at each.

    python benchmarks/tiny_qwen2/make.py --output qwen_longctx/assets/tiny-qwen2 --device cuda

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
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from recall import Recall, train_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from qwen_longctx import patched_qwen
from qwen_longctx.evaluation.environment import environment
from qwen_longctx.evaluation.passkey import accuracy, evaluate

logger = logging.getLogger(__name__)

SEED = 20261123
ANSWER_SHARE = 0.8  # of the loss; the rest is ordinary language modelling
PEAK_RATE = 1.5e-3
WARMUP = 300
LOG_EVERY = 100  # steps
CPU_BATCH = 16  # sequences at most
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
    """Run all stages, `scale` times their steps; returns the log, a row every hundred steps."""
    stages = [replace(stage, steps=max(1, round(stage.steps * scale))) for stage in STAGES]
    total = sum(stage.steps for stage in stages)
    optimizer = new_optimizer(model, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / total)) + 0.02)
    )
    log, done, begin = [], 0, time.perf_counter()
    for index, stage in enumerate(stages):
        set_rope_theta(model, stage.rope_theta)
        bar = transformers_logging.tqdm(total=stage.steps, desc=f"{stage.length} tokens", unit="step")
        for step, (ids, mask) in enumerate(batches(tokenizer, stage, SEED + index, device, workers), 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, on_answers = loss_of(model, ids, mask)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % LOG_EVERY == 0 or step == stage.steps:
                row = {
                    "stage": asdict(stage),
                    "step": done + step,
                    "loss": round(loss.item(), 4),
                    "loss_on_answers": round(on_answers.item(), 5),
                    "seconds": round(time.perf_counter() - begin, 1),
                }
                log.append(row)
                logger.info("%s", row)
        bar.close()
        done += stage.steps
    return log


def new_optimizer(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=device.type == "cuda")


def batches(
    tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, device: torch.device, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and masks of the answers for every step of a stage, each of shape (batch, length)."""
    on_gpu = device.type == "cuda"
    data = DataLoader(
        Recall(tokenizer, stage.length, seed),
        batch_size=stage.batch if on_gpu else min(stage.batch, CPU_BATCH),
        num_workers=workers,
        pin_memory=on_gpu,
        prefetch_factor=8 if workers else None,
    )
    for ids, mask in islice(data, stage.steps):
        yield ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def retrieval(model: Any, tokenizer: Any, keys: int) -> dict[str, Any]:
    """Share of `keys` passkeys retrieved, with and without the patch, by length: those of `EVALUATED`."""
    depths = [i / (keys - 1) for i in range(keys)]
    trained = model.config.max_position_embeddings
    lengths = [multiple * trained for multiple in EVALUATED]
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


def make(folder: Path, device: torch.device, scale: float, workers: int) -> dict[str, Any]:
    """Train and write a checkpoint that ``from_pretrained`` loads; returns the log of the training."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(random.Random(SEED))
    model: Any = new_model(tokenizer)
    model.to(device)
    rows = train(model, tokenizer, device, scale, workers)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suit_older_transformers(folder)
    return {"seed": SEED, "workers": workers, "environment": environment(), "steps": rows}


def measure(folder: Path, device: torch.device, keys: int) -> dict[str, Any]:
    """What the checkpoint in `folder` retrieves."""
    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return {"environment": environment(), "dtype": "float32", **retrieval(model, tokenizer, keys)}


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and write a checkpoint; or only measure one again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the steps to run")
    parser.add_argument("--workers", type=int, default=0, help="processes that write texts")
    parser.add_argument("--keys", type=int, default=100, help="passkeys for each length, 2 at least")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint in --output again")
    args = parser.parse_args(arguments)
    if args.keys < 2:
        parser.error(f"--keys must be at least 2, got {args.keys}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(args.device)
    log_file = args.output / "training_log.json"
    if args.evaluate_only:
        log = json.loads(log_file.read_text())
    else:
        log = make(args.output, device, args.steps_scale, args.workers)
    measured = measure(args.output, device, args.keys)
    log.setdefault("retrieval", []).append(measured)
    log_file.write_text(json.dumps(log, indent=1) + "\n")
    logger.info("%s", json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
