"""The plugin in vLLM itself: `.ci/vllm` installs the CPU build of vLLM and runs this file. With a GPU it runs there."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import tiny_model
from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.bench import vllm as bench
from qwen_longctx.cli import BUNDLED
from qwen_longctx.evaluation import passkey
from qwen_longctx.vllm.attention import Segment, paged_attention
from qwen_longctx.vllm.settings import settings_of
from test_vllm_pages import PAGE as PAGE_SIZE
from test_vllm_pages import Batch, attended, config

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the bundled checkpoint says that it has 256 positions
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(SETTINGS)
vllm = pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = pytest.mark.slow

GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
SPARSE = {"sparse_attention_threshold": 600}
# of every head other numbers of columns and diagonals, which processes must take their own of
BUDGETS = [{str(head): ["vertical_and_slash", 50 + 40 * head, 300 + 90 * head, 1.0] for head in range(4)}] * 4
ON_GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if ON_GPU else "float32"  # FlashAttention knows no float32
PAGE = 64
SMALL_PAGE = 16 if ON_GPU else 32
STEP = 500  # tokens, which cross up to three borders of chunks
NEW = 8
SURE = (
    6 if ON_GPU else None
)  # tokens that are compared: the rest of an answer is guessed, and bfloat16 guesses otherwise
CLOSE = 0.1 if ON_GPU else 5e-5  # of log-probabilities, which two ways to sum differ by


def start(checkpoint=BUNDLED, **options):
    values = {
        "dtype": DTYPE,
        "gpu_memory_utilization": 0.3,
        "max_model_len": 4352,
        "enforce_eager": True,
        "block_size": PAGE,
        "max_num_batched_tokens": STEP,
        "max_num_seqs": 8,
        "disable_log_stats": False,
        "seed": 0,
    }
    return vllm.LLM(str(checkpoint), **{**values, **options})


def stop(engine):
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def engine():
    engine = start()
    yield engine
    stop(engine)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The bundled checkpoint without a section for dual chunk attention."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dual_chunk_attention_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED)


def prompts(*lengths, seed=0):
    """Passkeys at different depths, as lists of token ids, and the keys."""
    keys = [str(12345 + 6789 * i + seed) for i in range(len(lengths))]
    depths = [(i + 0.5) / len(lengths) for i in range(len(lengths))]
    made = [
        passkey.prompt(TOKENIZER, n, depth, key)[0].tolist()
        for n, depth, key in zip(lengths, depths, keys, strict=True)
    ]
    return made, keys


def served(engine, prompts, new=NEW):
    """Tokens and their log-probabilities, all prompts at once."""
    return with_hits(engine, prompts, new)[0]


def with_hits(engine, prompts, new=NEW):
    """The same, and how many tokens of the prompts were there already."""
    sampling = vllm.SamplingParams(max_tokens=new, temperature=0, logprobs=1, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answers = [
        (list(one.token_ids), [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in (output.outputs[0] for output in outputs)
    ]
    return answers, sum(output.num_cached_tokens for output in outputs)


@torch.no_grad()
def generated(model, prompts, new=NEW):
    """The same by transformers, a prompt at a time."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        run = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = run.sequences[0, ids.shape[1] :].tolist()
        logs = [score[0].log_softmax(-1)[token].item() for score, token in zip(run.scores, tokens, strict=True)]
        results.append((tokens, logs))
    return results


@torch.no_grad()
def in_steps(model, prompts, new=NEW):
    """The same by a patched model that is called with the parts of a prompt one after another, as the engine cuts it.

    An engine cuts alike where it has one prompt at a time.
    """
    results = []
    for prompt in prompts:
        cache, ids = LongContextCache(), torch.tensor([prompt])
        parts, tokens, logs = list(ids.split(STEP, dim=1)), [], []
        while len(tokens) < new:
            logits = [model(part, past_key_values=cache, use_cache=True).logits[0, -1] for part in parts][-1]
            tokens.append(int(logits.argmax()))
            logs.append(logits.log_softmax(-1)[tokens[-1]].item())
            parts = [torch.tensor([tokens[-1:]])]
        results.append((tokens, logs))
    return results


def assert_same(found, wanted, close=CLOSE):
    for (tokens, logs), (wanted_tokens, wanted_logs) in zip(found, wanted, strict=True):
        assert tokens[:SURE] == wanted_tokens[:SURE]
        assert logs[:SURE] == pytest.approx(wanted_logs[:SURE], abs=close)


def counted(engine, name):
    return next(metric.value for metric in engine.get_metrics() if metric.name == f"vllm:{name}")


def test_mixed_batches_are_those_of_transformers(engine, model):
    """Lengths around the borders of chunks, up to 16 chunks, prefilled in parts between steps of decoding."""
    lengths = (100, 191, 192, 193, 383, 384, 385, 577, 700, 1000, 1900, 3072, 4000)
    asked, keys = prompts(*lengths)
    with patched_qwen(model, sparse="off"):
        wanted = generated(model, asked)
    found = served(engine, asked)
    assert_same(found, wanted)
    answers = [TOKENIZER.decode(tokens) for tokens, _ in found]
    assert all(passkey.is_correct(answer, key) for answer, key in zip(answers, keys, strict=True))


def test_decoding_across_a_border(engine, model):
    asked, _ = prompts(188, 381, 572, 957, seed=1)
    with patched_qwen(model, sparse="off"):
        assert_same(served(engine, asked, new=30), generated(model, asked, new=30))


def test_prefix_hits_change_nothing(engine, model):
    """A prefix that other prompts have left in the cache, also where it ends in another chunk than the prompt."""
    (long,), _ = prompts(3000, seed=2)
    first = served(engine, [long])
    again, hits = with_hits(engine, [long])
    assert_same(again, first, close=CLOSE / 5)
    assert hits >= 3000 - 2 * PAGE
    cut = [long[:n] + long[-12:] for n in (200, 390, 1500, 2990)]
    found, hits = with_hits(engine, cut)
    with patched_qwen(model, sparse="off"):
        assert_same(found, generated(model, cut))
    assert hits >= 4500


@pytest.mark.skipif(ON_GPU, reason="there decoded tokens go this way by themselves")
def test_decoding_in_one_pass(model, monkeypatch):
    """As on a GPU: a step of decoded tokens reads its pages once, also in the memory of the step before."""
    from qwen_longctx.vllm import attention, backend

    counts = []
    whole = attention.decode
    monkeypatch.setattr(backend, "why_not", lambda *a: "")
    monkeypatch.setattr(attention, "decode", lambda q, *a, **how: (counts.append(len(q)), whole(q, *a, **how))[1])
    engine = start()
    try:
        asked, _ = prompts(100, 188, 191, 381, 572, 957, 1500, seed=1)
        with patched_qwen(model, sparse="off"):
            assert_same(served(engine, asked, new=30), generated(model, asked, new=30))
        assert set(counts) > {7}
    finally:
        stop(engine)


def test_a_stock_model_is_unchanged(plain, model):
    """The same weights without the section, within their trained length and beyond it, where they fail."""
    engine = start(plain, hf_overrides={"max_position_embeddings": 4352})  # the length of vLLM's own rotary table
    try:
        asked, keys = prompts(150, 3000, 240, seed=3)
        found = served(engine, asked)
        assert_same(found, generated(model, asked))
        answers = [TOKENIZER.decode(tokens) for tokens, _ in found]
        assert [passkey.is_correct(*one) for one in zip(answers, keys, strict=True)] == [True, False, True]
    finally:
        stop(engine)


@pytest.mark.skipif(ON_GPU, reason="random tokens have no sure answer in bfloat16")
def test_preemption_changes_nothing(model):
    """Fewer pages than the requests need: some are thrown out, and prefilled again later, at other borders."""
    engine = start(num_gpu_blocks_override=4096 // PAGE, max_model_len=3072)
    try:
        generator = torch.Generator().manual_seed(4)  # no two share a prefix: 10 pages each, and 11 while they decode
        asked = [torch.randint(1, 590, (621 + 2 * i,), generator=generator).tolist() for i in range(6)]
        with patched_qwen(model, sparse="off"):
            wanted = generated(model, asked, new=24)
        assert_same(served(engine, asked, new=24), wanted)
        assert counted(engine, "num_preemptions") > 0
    finally:
        stop(engine)


@pytest.mark.parametrize("temperature", ["position", False])
def test_overrides_switch_it_on(plain, model, temperature):
    section = {"chunk_size": 128, "local_size": 32, "original_max_position_embeddings": 256}
    engine = start(
        plain,
        hf_overrides={"dual_chunk_attention_config": {**section, "attention_temperature": temperature}},
        block_size=SMALL_PAGE,
    )
    try:
        asked, _ = prompts(100, 300, 1500, seed=5)
        with patched_qwen(model, sparse="off", **section, attention_temperature=temperature):
            assert_same(served(engine, asked), generated(model, asked))
    finally:
        stop(engine)


@pytest.mark.parametrize("rule", [{"density": 0.4}, {"fidelity": "fast"}])
def test_sparse_prefill_is_that_of_transformers(model, rule, caplog):
    """Prompts one at a time, then at once: parts of them, short requests and decoding share steps."""
    section = {**GEOMETRY, **SPARSE, "sparse": "block_scores", **rule}
    engine = start(hf_overrides={"dual_chunk_attention_config": section}, enable_prefix_caching=False)
    log = logging.getLogger("vllm.qwen_longctx")
    log.addHandler(caplog.handler)  # vLLM hands its records to no handler of the root
    try:
        asked, keys = prompts(590, 1100, 1900, 3000, seed=11)
        found = [served(engine, [one])[0] for one in asked]
        with patched_qwen(model, **{key: section[key] for key in ("sparse", *SPARSE, *rule)}):
            wanted = in_steps(model, asked)
        assert_same(found, wanted)
        told = [record.getMessage() for record in caplog.records if "kept" in record.getMessage()]
        assert told and "Sparse prefill (block_scores) kept" in told[0]
        with patched_qwen(model, sparse="off"):
            dense = generated(model, asked)
        assert found[0][1] == pytest.approx(dense[0][1], abs=CLOSE)  # below the threshold
        apart = [
            abs(a - b)
            for one, other in zip(found[1:], dense[1:], strict=True)
            for a, b in zip(one[1], other[1], strict=True)
        ]
        assert ON_GPU or max(apart) > CLOSE  # else it was not sparse at all
        answers = [TOKENIZER.decode(tokens) for tokens, _ in served(engine, asked)]
        assert all(passkey.is_correct(answer, key) for answer, key in zip(answers, keys, strict=True))
    finally:
        log.removeHandler(caplog.handler)
        stop(engine)


@pytest.mark.skipif(ON_GPU, reason="random weights have no sure answer in bfloat16")
@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])  # Qwen3-MoE as small as this is NaN without the plugin too
def test_families(family, tmp_path):
    """Norms of queries and keys, and layers of experts, of random models."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    section = {"chunk_size": 128, "local_size": 32, "original_max_position_embeddings": 64}
    model = tiny_model(family, **sizes, max_position_embeddings=64, dual_chunk_attention_config=section)
    model.save_pretrained(tmp_path)
    engine = start(tmp_path, skip_tokenizer_init=True, block_size=SMALL_PAGE, max_model_len=1024)
    try:
        generator = torch.Generator().manual_seed(8)
        asked = [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (50, 120, 700)]
        sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
        for ids, output in zip(asked, outputs, strict=True):
            with patched_qwen(model, sparse="off"), torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = [logs[place - 1, token].item() for place, token in enumerate(ids) if place]
            found = [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            assert found == pytest.approx(wanted, abs=CLOSE)
    finally:
        stop(engine)


@pytest.mark.skipif(ON_GPU, reason="there the kernels themselves are tested")
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "requests", [[(0, 5), (3, 1)], [(60, 1), (3, 1), (31, 1)], [(0, 70), (47, 1), (0, 0), (13, 4)]]
)
def test_flash_attention_is_called_as_it_is_defined(requests, version, monkeypatch):
    """The backend for GPUs with PyTorch in the place of FlashAttention, which is asked with its own arguments."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    from qwen_longctx.vllm.flash import DualChunkFlashAttentionImpl

    settings, batch = settings_of(config()), Batch(requests)
    step = batch.step(settings, dtype=torch.float32)
    pages = torch.randn(batch.table.numel(), 2, PAGE_SIZE, 2 * 8)
    calls = []

    def kernel(**given):
        inspect.signature(flash_attn_varlen_func).bind(**given)
        assert given["fa_version"] == version and given["return_softmax_lse"] and given["num_splits"] == 0
        segment = Segment(
            *(
                given[name]
                for name in ("cu_seqlens_q", "seqused_k", "block_table", "max_seqlen_q", "max_seqlen_k", "causal")
            )
        )
        assert (segment.keys <= segment.most_keys).all() and (segment.rows.diff() <= segment.most_queries).all()
        calls.append(segment)
        both = torch.cat((given["k"], given["v"]), -1).transpose(1, 2)
        out, lse = paged_attention(given["q"], both, segment, given["softmax_scale"])
        return out, torch.where(lse == -torch.inf, torch.inf, lse) if version == 2 else lse

    def whole(self, layer, query, key, value, kv_cache, metadata, output):
        output[:] = paged_attention(query, kv_cache, step.segments["intra"], self.scale)[0]
        return output

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", kernel, raising=False)
    monkeypatch.setattr(FlashAttentionImpl, "forward", whole)
    layer = object.__new__(DualChunkFlashAttentionImpl)
    layer.dual_chunk, layer.head_size, layer.scale, layer.vllm_flash_attn_version = settings, 8, 0.3, version
    layer.number = 0
    query = torch.randn(int(batch.starts[-1]) + 3, 4, 8)  # padded, as for a graph
    rows = len(query) - 3
    metadata = SimpleNamespace(num_actual_tokens=rows, dual_chunk=step, max_num_splits=0)
    output = torch.full((rows, 4, 8), torch.nan)
    assert layer.forward(None, query, None, None, pages, metadata, output) is output
    wanted = attended(query[:rows], step, pages)
    torch.testing.assert_close(output, wanted)
    assert len(calls) == (0 if len(step.kinds) == 1 else len(step.kinds))


def test_compiled(model):
    """torch.compile takes in the rotation of keys."""
    engine = start(enforce_eager=False)
    try:
        asked, _ = prompts(100, 300, 1500, seed=7)
        with patched_qwen(model, sparse="off"):
            assert_same(served(engine, asked), generated(model, asked))
    finally:
        stop(engine)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 128}, ValueError, "pages of 128 tokens do not divide the 192 tokens.*--block-size 64"),
        (
            {"hf_overrides": {"dual_chunk_attention_config": {**GEOMETRY, "attention_temperature": True}}},
            NotImplementedError,
            "which the engine does not know",
        ),
        (
            {"hf_overrides": {"dual_chunk_attention_config": {"chunk_size": 256}}},
            ValueError,
            "lacks local_size, original_max_position_embeddings",
        ),
        ({"hf_overrides": {"dual_chunk_attention_config": {}}}, ValueError, "lacks chunk_size"),
        (
            {"hf_overrides": {"dual_chunk_attention_config": {**GEOMETRY, "sparse": "vertical_slash", "mass": 0.5}}},
            ValueError,
            "mass is a setting of block_scores",
        ),
        pytest.param(
            {"hf_overrides": {"dual_chunk_attention_config": {**GEOMETRY, "sparse": "block_scores", "kernel": "fa4"}}},
            ValueError,
            'kernel="fa4"',
            marks=pytest.mark.skipif(ON_GPU, reason="the kernel may run there"),
        ),
        pytest.param(
            {"kv_cache_dtype": "fp8"}, NotImplementedError, "the KV cache is 'fp8'", marks=pytest.mark.gpu
        ),  # vLLM refuses it by itself on many CPUs
        pytest.param(
            {"attention_backend": "TRITON_ATTN"},
            NotImplementedError,
            "chose the attention backend TRITON_ATTN.*--attention-backend FLASH_ATTN",
            marks=pytest.mark.gpu,
        ),
    ],
)
def test_refused_at_start(options, error, message):
    with pytest.raises(error, match=message):
        start(**options)


def test_registering_twice():
    from vllm.plugins import load_plugins_by_group
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from qwen_longctx.errors import PatchConflict

    register = load_plugins_by_group("vllm.general_plugins")["qwen_longctx"]
    register()
    register()
    register_backend(AttentionBackendEnum.FLASH_ATTN, "another.Backend")
    with pytest.raises(PatchConflict, match="another plugin has made another.Backend the backend FLASH_ATTN"):
        register()
    AttentionBackendEnum.FLASH_ATTN.clear_override()
    register()


def test_speculative_decoding(model):
    """Drafts of four tokens, which cross borders of chunks and are partly rejected.

    The last engine of this process: drafts load numba, after which vLLM 0.32 cannot start another.
    """
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engine = start(speculative_config=drafts)
    try:
        asked, _ = prompts(100, 188, 572, 957, 1900, seed=10)
        with patched_qwen(model, sparse="off"):
            assert_same(served(engine, asked, new=40), generated(model, asked, new=40))
        drafted, accepted = (counted(engine, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
        assert 0 < accepted < drafted
    finally:
        stop(engine)


@pytest.mark.skipif(ON_GPU, reason="a toy on the CPU")
def test_bench(tmp_path):
    """`qwen-longctx bench vllm` on a toy: dense and sparse, each engine by itself."""
    output = tmp_path / "vllm.json"
    command = [sys.executable, "-m", "qwen_longctx.cli", "bench", "vllm", "--tiny", "--lengths", "300", "900"]
    command += ["--whole-up-to", "500", "--prefill-chunk-size", "400", "--density", "0.4", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(output.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [300, 300, 900, 900, 300, 900]
    assert all(row["first_token_seconds"] > 0 and len(row["seconds"]["tokens"]) == 32 for row in rows[:4])
    assert all(row["first_token_ratio"] > 0 and row["token_ratio"] > 0 for row in rows[4:])


def test_bench_tells_what_its_process_refuses():
    config = bench._config(True, "qwen2.5-7b")
    config.dual_chunk_attention_config["sparse_attention_enabled"] = "maybe"
    with pytest.raises(NotImplementedError, match="vLLM could not measure 400 tokens: .*must be true or false"):
        list(bench.served(config, [400], {"sparse": "off"}, 400, 2))


@pytest.fixture(scope="module")
def server(plain, tmp_path_factory):
    """The server of the OpenAI API on the checkpoint without the section; two processes hold half of the heads each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    section = {**GEOMETRY, **SPARSE, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS}
    overrides = {"dual_chunk_attention_config": section, "max_position_embeddings": 4096}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(plain), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", DTYPE, "--block-size", str(PAGE), "--served-model-name", "tiny"]
    command += ["--hf-overrides", json.dumps(overrides), "--max-num-batched-tokens", str(STEP), "--max-num-seqs", "8"]
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.3", "--tensor-parallel-size", str(ranks)]
    of_tests = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if key not in of_tests}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_the_http_server_streams(server, model):
    asked, keys = prompts(250, 1500, 3000, seed=6)
    for prompt, key in zip(asked, keys, strict=True):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "logprobs": 1, "stream": True}
        request = urllib.request.Request(
            f"{server}/v1/completions",
            json.dumps({**body, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            lines = [line.decode().removeprefix("data: ").strip() for line in reply if line.startswith(b"data: ")]
        assert lines[-1] == "[DONE]"
        pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
        assert len(pieces) >= NEW - 1 and passkey.is_correct("".join(piece["text"] for piece in pieces), key)
        found = [log for piece in pieces if piece["logprobs"] for log in piece["logprobs"]["token_logprobs"]]
        with patched_qwen(model, sparse="vertical_slash", sparse_attention_config=BUDGETS, **SPARSE):
            ((_, wanted),) = in_steps(model, [prompt])
        assert found[:SURE] == pytest.approx(wanted[:SURE], abs=CLOSE)


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "vllm" / "passkeys.py"


def test_passkeys_by_the_client_of_openai(server, tmp_path):
    """The script of the benchmarks, as its own process; prompts on both sides of the threshold of sparse prefill."""
    output = tmp_path / "passkeys.json"
    command = [sys.executable, str(SCRIPT), "--url", f"{server}/v1", "--tokenizer", str(BUNDLED)]
    command += ["--api", "completions", "--lengths", "2500", "500", "--depths", "0.1", "0.9", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "4 of 4 keys found" in done.stdout, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["model"] == "tiny" and [one["length"] for one in found["records"]] == [500, 500, 2500, 2500]
    assert all(0 < one["first_token_seconds"] <= one["seconds"] for one in found["records"])


def test_passkeys_without_a_server(tmp_path):
    command = [sys.executable, str(SCRIPT), "--lengths", "200", "--url", "http://127.0.0.1:9/v1", "--tokenizer"]
    done = subprocess.run([*command, str(BUNDLED)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("http://127.0.0.1:9/v1 does not answer")
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr
