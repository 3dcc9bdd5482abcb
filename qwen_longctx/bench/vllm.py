"""The plugin in vLLM against our own generate: time to the first token, and of a token."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.bench.shapes import NAMES, draw_weights, model_config, random_prompt, random_weights
from qwen_longctx.bench.speed import SHORTEST, check_lengths, sparse_settings
from qwen_longctx.bench.timing import Clock
from qwen_longctx.config import Prefill
from qwen_longctx.errors import MissingPackage, Unsupported
from qwen_longctx.patches.method import cache_argument

LENGTHS = (262_144, 524_288, 1_000_000)
LONGEST_DENSE = 524_288
_HEADS_OF_A_TOY = {"hidden_size": 128}  # heads of 32, the smallest of vLLM's backends
_ENGINE = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_num_seqs": 4,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.9,
    "seed": 0,
}


def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    density: float | None = None,
    whole_up_to: int = LONGEST_DENSE,
    shape: str = NAMES[0],
    prefill_chunk_size: int | None = None,
    new_tokens: int = 32,
) -> Iterator[dict[str, Any]]:
    """The same prompts in vLLM and in our patched model, one at a time on one device, first all in vLLM.

    Both read prompts in parts of the same length, hold keys and values as they are, and reuse no prefix. Weights are
    random and drawn alike; sparse prefill keeps a fixed share of the blocks in both. vLLM runs in a process of
    its own, which gives the memory back, and compiles and captures as it does by default. A first prompt of two parts
    is not counted.

    Yields
    ------
    dict
        A row for each length and engine, then for each length the ratio of vLLM's times to ours.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
    tiny : bool
        A toy shape.
    density : float, optional
        Share of the blocks that sparse prefill keeps; by default that of `bench speed`.
    whole_up_to : int
        Longest prompt that is prefilled densely; others are sparse.
    shape : str
        Of the model, see ``bench.shapes.NAMES``.
    prefill_chunk_size : int, optional
        Tokens of a part.
    new_tokens : int
        Decoded after the first one.

    Raises
    ------
    ImportError
        vLLM is not installed.
    InvalidValue
        A length that is to be sparse is too short for it.
    """
    check_vllm()
    dense = [length for length in lengths if length <= whole_up_to]
    sparse = [length for length in lengths if length > whole_up_to]
    check_lengths("vllm", sparse)
    part = prefill_chunk_size or Prefill().prefill_chunk_size
    config = _config(tiny, shape)
    done: dict[tuple[str, int], dict[str, Any]] = {}
    for how, group in (("dense", dense), ("sparse", sparse)):
        if not group:
            continue
        settings = {"sparse": "off"} if how == "dense" else fixed(max(group), density)
        for engine, times in (
            ("vllm", served(config, group, settings, part, new_tokens)),
            ("transformers", generated(config, group, settings, part, new_tokens, device)),
        ):
            for length, seconds in times:
                done[engine, length] = row = _row(engine, length, how, settings, part, seconds)
                yield row
    for length in lengths:
        yield ratios(done["vllm", length], done["transformers", length])


def check_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises
    ------
    ImportError
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            f'bench vllm needs vLLM, and importing it says "{error}": pip install "qwen-longctx[vllm]"'
        ) from error


def fixed(longest: int, density: float | None) -> dict[str, Any]:
    """Settings of sparse prefill that both engines take, and that steer nothing."""
    settings = sparse_settings(longest, density)
    del settings["recall_target"]
    return settings


def _config(tiny: bool, shape: str) -> Qwen2Config:
    config = model_config(tiny, shape=shape)
    for name, value in _HEADS_OF_A_TOY.items() if tiny else ():
        setattr(config, name, value)
    config.architectures = ["Qwen2ForCausalLM"]
    return config


def _row(
    engine: str, length: int, how: str, settings: dict[str, Any], part: int, seconds: list[float]
) -> dict[str, Any]:
    first, *later = seconds
    return {
        "engine": engine,
        "tokens": length,
        "prefill": how,
        "density_asked": settings.get("density"),
        "prefill_chunk_size": part,
        "first_token_seconds": round(first, 4),
        "token_ms": round(1e3 * statistics.median(later), 3),
        "seconds": {"tokens": [round(value, 6) for value in later]},
    }


def ratios(vllm: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """vLLM's times over ours, of two rows of one length."""
    names = {"first_token_ratio": "first_token_seconds", "token_ratio": "token_ms"}
    of = {ratio: round(vllm[name] / ours[name], 4) for ratio, name in names.items()}
    return {"engine": "vllm over transformers", "tokens": vllm["tokens"], "prefill": vllm["prefill"], **of}


def warm_up_length(lengths: list[int], part: int) -> int:
    """Tokens of the prompt that is not counted: two parts and an end, unless all prompts are shorter."""
    return min(2 * part + SHORTEST, *lengths)


def served(
    config: Qwen2Config, lengths: list[int], settings: dict[str, Any], part: int, new_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Each length with vLLM's seconds to the first token, and of every later one."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        options = engine_options(config, max(lengths), settings, part, new_tokens)
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(sender, folder, options, lengths, part, new_tokens))
        process.start()
        sender.close()  # so that the other end's closing is noticed
        try:
            for length in lengths:
                try:
                    answer = receiver.recv()
                except EOFError:
                    process.join()
                    answer = f"its process ended with {process.exitcode}"
                if isinstance(answer, str):
                    raise Unsupported(f"vLLM could not measure {length} tokens: {answer}")
                yield length, answer
        finally:
            receiver.close()
            process.join(60)
            if process.is_alive():
                process.terminate()
                process.join()


def engine_options(
    config: Qwen2Config, longest: int, settings: dict[str, Any], part: int, new_tokens: int
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` beside the checkpoint."""
    section = {**config.dual_chunk_attention_config, **settings}
    return {
        **_ENGINE,
        "max_model_len": longest + new_tokens + 1,
        "max_num_batched_tokens": part,
        "hf_overrides": {"dual_chunk_attention_config": section},
    }


def _serve(
    sender: Connection, checkpoint: str, options: dict[str, Any], lengths: list[int], part: int, new_tokens: int
) -> None:
    """In a process of its own: send the seconds of each length, or why there are none."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for a function of ours to reach the engine's own process
    try:
        import vllm

        engine = vllm.LLM(checkpoint, **options)
        engine.apply_model(_draw)
        sampling = vllm.SamplingParams(max_tokens=new_tokens + 1, temperature=0, ignore_eos=True, detokenize=False)
        vocabulary = engine.llm_engine.model_config.get_vocab_size()
        _stepped(engine.llm_engine, random_prompt(warm_up_length(lengths, part), vocabulary), sampling)
        for length in lengths:
            sender.send(_stepped(engine.llm_engine, random_prompt(length, vocabulary), sampling))
        engine.llm_engine.engine_core.shutdown()
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
        raise


@torch.inference_mode()
def _draw(model: torch.nn.Module) -> None:
    """Draw a model's weights as ours are: vLLM's are so small that sparse prefill takes all blocks for equal."""
    draw_weights(model)


def _stepped(engine: Any, ids: torch.Tensor, sampling: Any) -> list[float]:
    """Seconds to the first token, and of every later one, of one request."""
    begin = time.perf_counter()
    engine.add_request(f"{ids.shape[1]}", {"prompt_token_ids": ids[0].tolist()}, sampling)
    times: list[float] = [begin]
    while engine.has_unfinished_requests():
        for output in engine.step():
            fresh = len(output.outputs[0].token_ids) - len(times) + 1
            times += [time.perf_counter()] * fresh
    return [after - before for before, after in zip(times, times[1:], strict=False)]


@torch.no_grad()
def generated(
    config: Qwen2Config,
    lengths: list[int],
    settings: dict[str, Any],
    part: int,
    new_tokens: int,
    device: torch.device,
) -> Iterator[tuple[int, list[float]]]:
    """Each length with our seconds to the first token, and of every later one."""
    model = random_weights(config, device)
    vocabulary = config.vocab_size
    with patched_qwen(model, **settings, prefill_chunk_size=part):
        _streamed(model, random_prompt(warm_up_length(lengths, part), vocabulary).to(device), new_tokens)
        for length in lengths:
            yield length, _streamed(model, random_prompt(length, vocabulary).to(device), new_tokens)
    del model
    gc.collect()  # patched modules and their methods refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the next engine


def _streamed(model: Qwen2ForCausalLM, ids: torch.Tensor, new_tokens: int) -> list[float]:
    clock, count = Clock(), new_tokens + 1
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock,
        **cache_argument(LongContextCache(ids.shape[1] + count)),
    )
    return [clock.first(), *clock.seconds()]
