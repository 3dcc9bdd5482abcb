"""Sparse prefill inside models, caches, budgets' files and commands."""

from __future__ import annotations

import copy
import json
import logging

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, ops, patch_qwen, patched_qwen
from qwen_longctx.checkpoint import Heads
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.errors import MissingFile, NotFinite
from qwen_longctx.evaluation import corpus, modes, passkey, plots, quality
from qwen_longctx.kv.sequence import sequence_of
from qwen_longctx.kv.store import mean_keys
from qwen_longctx.sparsity import SparseState, budgets, request

GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
ON = {"sparse": "block_scores", "sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}
SMALL = [{str(head): ["vertical_and_slash", 40, 120, 0.5] for head in range(4)}] * 2
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def long_model(family="qwen2", **config):
    values = {"dual_chunk_attention_config": dict(GEOMETRY), "max_position_embeddings": 256, **config}
    return tiny_model(family, dtype=torch.float64, **values)


def prompt(tokens, batch=1):
    return torch.randint(1, 90, (batch, tokens), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, ids, cache=None, **kwargs):
    return model(ids, past_key_values=cache, use_cache=cache is not None or None, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [{"density": 1.0}, {"mass": 1.0}, {"sparse": "vertical_slash"}])
def test_budgets_of_everything_are_dense(family, rule):
    model, ids = long_model(family), prompt(500)
    with patched_qwen(model, prefill_chunk_size=150):
        dense = logits(model, ids)
    cache = LongContextCache()
    with patched_qwen(model, **{**ON, **rule}):
        found = logits(model, ids, cache)
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)
    assert cache.report()["density"] == 1.0 and len(cache.report()["layers"]) == 2


def test_short_prompts_stay_exact():
    model, ids = long_model(), prompt(200)
    with patched_qwen(model, prefill_chunk_size=150):
        dense = logits(model, ids)
    cache = LongContextCache()
    with patched_qwen(model, **ON, density=0.1):
        assert torch.equal(logits(model, ids, cache), dense)
    assert cache.report()["layers"] == [] and cache.report()["density"] == 1.0


def test_auto_is_the_default():
    assert LongContextConfig(256, 64, 256).sparse == "auto"


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"sparse": "vertical_slash", "sparse_attention_config": SMALL}])
def test_any_cache_gives_the_same(rule):
    model, ids = patch_qwen(long_model(), **{**ON, **rule}), prompt(500)
    ours, theirs = LongContextCache(), DynamicCache()
    found = logits(model, ids, ours)
    assert torch.equal(logits(model, ids, theirs), found)
    assert torch.equal(logits(model, ids), found)
    assert ours.report()["density"] == sequence_of(theirs).sparse.density() < 1
    layers = ours.report()["layers"]
    assert [x["layer"] for x in layers] == [0, 1]
    assert all(0 < x["lowest_recall"] <= x["recall"] <= 1 + 1e-9 for x in layers)


def test_generate_and_its_report():
    model, ids = patch_qwen(long_model(), **ON, density=0.4), prompt(500)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    assert out.sequences.shape[1] == 506
    report = out.past_key_values.report()
    assert 0 < report["density"] < 1 and report["tokens"] == 500


def test_a_copied_cache_goes_on_by_itself():
    model, ids = patch_qwen(long_model(), **ON, density=0.3), prompt(700)
    cache = LongContextCache()
    logits(model, ids[:, :450], cache)
    copied = copy.deepcopy(cache)
    first = logits(model, ids[:, 450:], cache)
    assert torch.equal(logits(model, ids[:, 450:], copied), first)
    assert len(copied.sparse_state.records) == len(cache.sparse_state.records)


def test_a_cropped_cache_forgets_its_means():
    model, ids, other = patch_qwen(long_model(), **ON, density=0.3), prompt(600), prompt(600) + 3
    cache, fresh = LongContextCache(), LongContextCache()
    for one in (cache, fresh):
        one.prompt_length = 600
        logits(model, ids[:, :300], one)
    logits(model, other[:, 300:600], cache)
    cache.crop(300)
    assert torch.equal(logits(model, ids[:, 300:], cache), logits(model, ids[:, 300:], fresh))


def test_means_of_keys_follow_every_change():
    cache = LongContextCache()
    k = torch.randn(2, 3, 70, 8)

    def check():
        layer = cache.layers[0]
        torch.testing.assert_close(layer.store.key_means(8), mean_keys(layer.keys.transpose(1, 2), 8))

    cache.update(k, k, 0)
    check()
    cache.update(k[:, :, :29], k[:, :, :29], 0)
    check()
    cache.crop(53)
    cache.update(k + 1, k, 0)
    check()
    cache.reorder_cache(torch.tensor([1, 1]))
    check()
    cache.batch_repeat_interleave(2)
    check()
    torch.testing.assert_close(cache.layers[0].store.key_means(16), mean_keys(cache.layers[0].keys.transpose(1, 2), 16))
    cache.layers[0].reset()
    cache.update(*[torch.cat((k, k - 1))] * 2, 0)
    check()


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"sparse": "vertical_slash", "sparse_attention_config": SMALL}])
@pytest.mark.parametrize("padding", [32, 45, 160])
def test_left_padded_rows_are_the_rows_alone(rule, padding):
    model, ids = patch_qwen(long_model(), **{**ON, **rule, "prefill_chunk_size": 1000}), prompt(500, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[1:], logits(model, ids[1:]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:1, padding:], logits(model, ids[:1, padding:]), atol=1e-5, rtol=1e-5)


def test_training_and_attention_weights_stay_dense():
    model, ids = long_model(), prompt(250)
    with patched_qwen(model, sparse="off"):
        dense = model(ids).logits
    with patched_qwen(model, **ON, density=0.1):
        assert torch.equal(model(ids).logits, dense)  # under a gradient
        with torch.no_grad():
            weights = model(ids[:, :180], output_attentions=True, attention_mask=None)
    assert weights.attentions[0].shape[-1] == 180


def test_a_reset_cache_forgets_budgets_and_records():
    model, ids = patch_qwen(long_model(), **ON), prompt(500)
    cache, fresh = LongContextCache(), LongContextCache()
    logits(model, prompt(600), cache)
    cache.reset()
    assert torch.equal(logits(model, ids, cache), logits(model, ids, fresh))
    assert cache.report()["layers"] == fresh.report()["layers"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex", "fa4"])
@pytest.mark.parametrize("rule", [{"density": 1.0}, {"density": 0.4}, {}, {"sparse": "vertical_slash"}])
def test_list_kernels_agree_in_a_model(name, rule):
    """Blocks of 128 and head dim 64, as real models have them; the canary watches on the way."""
    reason = ops.why_not(torch.device("cuda"), torch.bfloat16, 64, 128)[name]
    if reason:
        pytest.skip(f"{name} {reason}")
    geometry = {"chunk_size": 1024, "local_size": 256, "original_max_position_embeddings": 1024}
    # one layer: rounding in a first would change what a second selects
    shape = {"head_dim": 64, "num_hidden_layers": 1, "dual_chunk_attention_config": geometry}
    model = tiny_model("qwen2", torch.bfloat16, **shape).cuda()
    ids = prompt(3000).cuda()
    settings = {**ON, "block_size": 128, "prefill_chunk_size": 700, **rule}
    found = {}
    for kernel in ("reference", name):
        cache = LongContextCache()
        with patched_qwen(model, **settings, kernel=kernel):
            found[kernel] = logits(model, ids, cache).float(), cache.report()["layers"]
    torch.testing.assert_close(found[name][0], found["reference"][0], atol=0.1, rtol=0.1)
    for ours, theirs in zip(found[name][1], found["reference"][1], strict=True):
        assert ours["recall"] == pytest.approx(theirs["recall"], abs=5e-3)
    if rule.get("density") == 1.0:
        with patched_qwen(model, prefill_chunk_size=700):
            torch.testing.assert_close(found[name][0], logits(model, ids).float(), atol=0.1, rtol=0.1)


@torch.no_grad()
def test_sparse_prefill_under_torch_compile():
    model, ids = patch_qwen(long_model(), **ON, density=0.4), prompt(500)
    wanted = model(ids).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, wanted)


def test_a_warning_says_once_that_attention_is_approximate(caplog):
    request._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING), patched_qwen(model := long_model(), **ON):
        for tokens in (150, 480, 490):
            logits(model, prompt(tokens))
    said = [r.getMessage() for r in caplog.records if "Sparse prefill (block_scores) is on" in r.getMessage()]
    assert len(said) == 1 and "more than 200 tokens" in said[0]


def test_broken_activations_stop_the_run():
    model = patch_qwen(long_model(), **ON)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    cache = LongContextCache()
    with pytest.raises(NotFinite, match="layer 1, tokens .* 'reference', recalls nan: the activations .* not finite"):
        logits(model, prompt(500), cache)
    assert cache.get_seq_length() == 0 == cache.report()["tokens"]


def test_budgets_lie_beside_the_checkpoint_or_in_its_config(tmp_path):
    model, ids = long_model(), prompt(500)
    (tmp_path / budgets.FILE_NAME).write_text(json.dumps(SMALL))
    model.config.name_or_path = str(tmp_path)
    with patched_qwen(model, **{**ON, "sparse": "vertical_slash"}):
        cache = LongContextCache()
        logits(model, ids, cache)
    assert cache.sparse_state.head_budgets.verticals == [[40] * 4] * 2
    assert cache.report()["density"] < 1
    model.config.dual_chunk_attention_config["sparse_attention_config"] = [{}, {}]
    with patched_qwen(model, **{**ON, "sparse": "vertical_slash"}):
        cache = LongContextCache()
        logits(model, ids, cache)
    assert cache.sparse_state.head_budgets.verticals == [[1000] * 4] * 2


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [
        ({"kernel": "reference"}, False),  # which is not fast
        ({}, False),  # nothing fast here
        ({"kernel": "flex"}, False),  # which cannot run here
        ({"kernel": "fa4"}, False),
        ({"kernel": "flex", "sparse": "off"}, False),
        ({"kernel": "reference", "sparse": "block_scores"}, True),
        ({"kernel": "sdpa"}, False),
        ({"kernel": "reference", "block_size": 24}, False),  # does not fit the stride
        ({"kernel": "reference", "sparse": "off"}, False),
    ],
)
def test_auto_is_sparse_where_it_can_be_fast(settings, sparse, monkeypatch):
    monkeypatch.setattr(ops, "why_not", lambda *kind: {"fa4": "is not here", "flex": "neither"})
    monkeypatch.setattr(request, "_WORTH_IT", 0)
    on = {name: value for name, value in ON.items() if name != "sparse"}
    cache = LongContextCache()
    with patched_qwen(model := long_model(), **{**on, **settings}):
        logits(model, prompt(500), cache)
    assert bool(cache.sparse_state.records) == sparse
    assert {rule for rule, _ in cache.sparse_state.budgets} == ({"block_scores"} if sparse else set())


@pytest.mark.parametrize(
    ("heads", "head_dim", "length", "sparse"),
    [(14, 64, 65_536, False), (14, 64, 131_072, True), (28, 128, 33_000, True), (2, 64, 131_072, False)],
)
def test_auto_is_dense_where_choosing_takes_longer(heads, head_dim, length, sparse, monkeypatch):
    monkeypatch.setattr(request, "rule_name", lambda *kind: "block_scores")
    model_config = tiny_model("qwen2").config
    model_config.head_dim = head_dim

    def plan(**settings):
        what = {"heads": lambda: Heads(heads, 2, 0), "device": torch.device("cpu"), "dtype": torch.bfloat16}
        config = LongContextConfig(32768, 8192, 32768, **settings)
        return request.plan_request(config, model_config, **what, state=SparseState(), length=length)

    assert (plan() is not None) == sparse
    assert plan(sparse="block_scores") is not None  # asked for by name


# --- files of budgets ---------------------------------------------------------------------------------------------


def test_budgets_are_read_back_as_written(tmp_path):
    source = [{"0": ["vertical_and_slash", 30, 800, 0.7], "1": ["vertical_and_slash", 5, 6, 0.1]}, {}]
    found = budgets.load(source, 2, 2)
    assert found.verticals == [[130, 5], [1000, 1000]] and found.slashes == [[800, 6], [6096, 6096]]
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(budgets.dump(found)))
    assert budgets.load(path, 2, 2) == found
    by_layer = {str(i): entry for i, entry in enumerate(budgets.dump(found))}
    assert budgets.load(by_layer, 2, 2) == found


class Hub:
    """Stands for the hub and its cache: the files that a name has there, and what was asked for."""

    def __init__(self, monkeypatch, cached=(), absent=(), offline=True):
        self.cached, self.absent, self.offline = dict(cached), absent, offline
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.look)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.fetch)

    def look(self, name, file, revision=None):
        return self.cached.get((name, file), object() if (name, file) in self.absent else None)

    def fetch(self, name, file, revision=None):
        if self.offline:
            raise LocalEntryNotFoundError("offline")
        path = self.folder / file
        path.write_text(json.dumps(SMALL))
        return str(path)


def of_the_hub(**section):
    config = long_model().config
    config.name_or_path = "nobody/tiny"
    config.dual_chunk_attention_config.update(section)
    return config


def folder_of_that_name(tmp_path, monkeypatch, verticals=7, **config):
    """A folder in the working directory that happens to have the name of a checkpoint on the hub."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nobody" / "tiny"
    folder.mkdir(parents=True)
    content = [{str(head): ["vertical_and_slash", verticals, 120, 0.5] for head in range(4)}] * 2
    for name in (budgets.FILE_NAME, "other.json"):
        (folder / name).write_text(json.dumps(content))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("there", [{}, {"model_type": "qwen2", "num_hidden_layers": 99}, [1]])
@pytest.mark.parametrize("section", [{}, {"sparse_attention_config": "other.json"}])
def test_a_name_of_the_hub_is_no_folder(there, section, tmp_path, monkeypatch):
    folder = folder_of_that_name(tmp_path, monkeypatch)
    if there:
        (folder / "config.json").write_text(json.dumps(there))
    file = section.get("sparse_attention_config", budgets.FILE_NAME)
    cached = tmp_path / "cached.json"
    cached.write_text(json.dumps(SMALL))
    Hub(monkeypatch, {("nobody/tiny", file): str(cached), ("nobody/tiny", "config.json"): "there"})
    assert budgets.of_checkpoint(of_the_hub(**section)).verticals == [[40] * 4] * 2
    cache = LongContextCache()
    model = long_model()
    model.config.name_or_path = "nobody/tiny"
    model.config.dual_chunk_attention_config.update(section)
    with patched_qwen(model, **{**ON, "sparse": "vertical_slash"}):
        logits(model, prompt(500), cache)
    assert cache.sparse_state.head_budgets.verticals == [[40] * 4] * 2


def test_a_relative_folder_of_the_model_itself_is_taken(tmp_path, monkeypatch):
    config = of_the_hub()
    keys = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    folder_of_that_name(tmp_path, monkeypatch, **{key: getattr(config, key) for key in keys})
    Hub(monkeypatch)
    assert budgets.of_checkpoint(config).verticals == [[7] * 4] * 2
    config.dual_chunk_attention_config["sparse_attention_config"] = "other.json"
    assert budgets.of_checkpoint(config).verticals == [[7] * 4] * 2


@pytest.mark.parametrize("section", [{"sparse_attention_enabled": True}, {"sparse_attention_config": "other.json"}])
def test_budgets_that_a_checkpoint_has_are_never_replaced_in_silence(section, tmp_path, monkeypatch):
    """Not by a folder of that name, and not by MInference's default."""
    folder_of_that_name(tmp_path, monkeypatch)
    Hub(monkeypatch, {("nobody/tiny", "config.json"): "there"})
    with pytest.raises(MissingFile, match="needs the budgets that nobody/tiny has, but .* cannot be fetched .offline"):
        budgets.of_checkpoint(of_the_hub(**section))
    config = of_the_hub(**section)
    config.name_or_path = str(tmp_path)
    with pytest.raises(MissingFile, match=r"has, but there is no (other|sparse_attention_config)\.json in"):
        budgets.of_checkpoint(config)


def test_a_checkpoint_without_budgets_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.chdir(tmp_path)
    budgets._warn_once.cache_clear()
    Hub(monkeypatch, {("nobody/tiny", "config.json"): "there"}, absent=[("nobody/tiny", budgets.FILE_NAME)])
    with caplog.at_level(logging.WARNING):
        assert budgets.of_checkpoint(of_the_hub()) == budgets.uniform(2, 4)
    assert f"because nobody/tiny has no {budgets.FILE_NAME} on the hub" in caplog.text


def test_budgets_are_fetched_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, {("nobody/tiny", "config.json"): "there"}, offline=False)
    hub.folder = tmp_path
    assert budgets.of_checkpoint(of_the_hub(sparse_attention_enabled=True)).verticals == [[40] * 4] * 2


def test_budgets_of_an_installed_minference(tmp_path, monkeypatch):
    """Found by the model's name, without an import: the package's own import fails on new transformers."""
    folder = tmp_path / "minference" / "configs"
    folder.mkdir(parents=True)
    (tmp_path / "minference" / "__init__.py").write_text("raise ImportError('imported')")
    for name, verticals in (
        ("Qwen2.5_7B_Instruct_1M", 11),
        ("Qwen2.5_7B_Instruct_128k_instruct_kv_out_v32_fit_o_best_pattern", 22),
        ("Qwen3_8B_128k_kv_out_v32_fit_o_best_pattern", 33),
    ):
        (folder / f"{name}.json").write_text(json.dumps([{"0": ["vertical_and_slash", verticals, 5, 0.0]}]))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, verticals in (("Qwen/Qwen2.5-7B-Instruct-1M", 11), ("Qwen2.5-7B-Instruct", 22), ("a/Qwen3-8B", 33)):
        assert budgets.load("minference", 1, 1, name).verticals == [[verticals]]
    with pytest.raises(FileNotFoundError, match="has no file for 'Qwen3-4B'"):
        budgets.load("minference", 1, 1, "Qwen3-4B")


BAD_BUDGETS = [
    ([{}], "must list 2 layers, got 1"),
    (7, "must list 2 layers, got int"),
    ([[], {}], "layer 0 must be a mapping of heads"),
    ([{"0": 3}, {}], "head 0 of layer 0 must be .pattern, verticals, slashes, score., got 3"),
    ([{"1": ["block_sparse", 8, 1, 0.5]}, {}], "head 1 of layer 0 has the pattern 'block_sparse'"),
    ([{}, {"0": ["vertical_and_slash", 0, 10, 1]}], "verticals must be a positive whole number, got 0"),
    ([{}, {"0": ["vertical_and_slash", 10, 1.5, 1]}], "slashes must be a positive whole number, got 1.5"),
    ([{}, {"0": ["vertical_and_slash", 10**30, 10, 1]}], "verticals must be a positive whole number, got 1000"),
    ([{}, {"0": ["vertical_and_slash", 10, 10, "x"]}], "head 0 of layer 1: the score must be a number, got 'x'"),
    ([{}, {"0": ["vertical_and_slash", 10, 10, None]}], "the score must be a number, got None"),
    ([{}, {"9": ["vertical_and_slash", 10, 10, 1]}], "names head '9' of layer 1: the model has 2"),
    ([{}, {"²": ["vertical_and_slash", 10, 10, 1]}], "names head '²' of layer 1: the model has 2"),
]


@pytest.mark.parametrize(("source", "message"), BAD_BUDGETS)
def test_bad_budgets(source, message):
    with pytest.raises(ValueError, match=message):
        budgets.load(source, 2, 2)


def test_bad_files_of_budgets(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.json"):
        budgets.load(tmp_path / "nowhere.json", 2, 2)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is no JSON"):
        budgets.load(tmp_path / "bad.json", 2, 2)
    with pytest.raises(FileNotFoundError, match="needs the package minference"):
        budgets.load("minference", 2, 2, "Qwen2.5-7B-Instruct")


BAD_SETTINGS = [
    (
        {"sparse": "some"},
        ValueError,
        "sparse must be one of off, auto, block_scores, exact_shares, vertical_slash, got 'some'",
    ),
    ({"recall_target": 1.0}, ValueError, "recall_target must lie between 0 and 1, got 1.0"),
    ({"density": 0.0}, ValueError, "density must lie between 0 and 1, got 0.0"),
    ({"mass": "all"}, TypeError, "mass must be a number, got 'all'"),
    ({"score_threshold": 0.1, "mass": 0.9}, ValueError, "mass and score_threshold are given"),
    ({"sparse": "vertical_slash", "density": 0.1}, ValueError, "density is a setting of block_scores"),
    ({"sparse_attention_config": 5}, TypeError, "sparse_attention_config must be a file"),
    ({"sparse": "block_scores", "kernel": "sdpa"}, ValueError, "kernel='sdpa' takes no block lists"),
    ({"sparse": "block_scores", "block_size": 24}, ValueError, r"divides chunk_size - local_size \(192\), got 24"),
    ({"sparse": "block_scores", "block_size": 128}, ValueError, r"divides chunk_size - local_size \(192\), got 128"),
    ({"sparse": "block_scores", "local_size": 63}, ValueError, r"\(193\), got 1: change block_size or local_size"),
    ({"block_size": 1.5}, TypeError, "block_size must be a whole number of tokens, got 1.5"),
    ({"last_q": 0}, ValueError, "last_q must be at least 1 token, got 0"),
    ({"sparse_attention_threshold": -1}, ValueError, "sparse_attention_threshold must be at least 1 token, got -1"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_SETTINGS)
def test_bad_settings(values, error, message):
    model = long_model()
    with pytest.raises(error, match=message):
        patch_qwen(model, **values)
    assert "forward" not in vars(model)


def test_a_missing_file_of_budgets_stops_the_run_before_it_starts():
    model = patch_qwen(long_model(), **{**ON, "sparse": "vertical_slash", "sparse_attention_config": "nowhere.json"})
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.json"):
        model.generate(prompt(500), max_new_tokens=2)


@pytest.mark.parametrize(
    ("stride", "given", "tile"), [(253952, None, 128), (192, None, 64), (24576, None, 128), (192, 32, 32)]
)
def test_the_default_block_divides_the_stride(stride, given, tile):
    assert LongContextConfig(stride + 64, 64, 100, sparse="auto", block_size=given).tile == tile


# --- quality --------------------------------------------------------------------------------------


def test_source_code_is_real_text_of_exact_length():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = corpus.source_code(tokenizer, 300, "qwen_longctx")
    assert ids.shape == (1, 300) and "patch_qwen" in tokenizer.decode(ids[0])
    assert corpus.fingerprint(ids) == corpus.fingerprint(ids.clone()) != corpus.fingerprint(ids + 1)
    with pytest.raises(ValueError, match="package 'no_such_package' is not installed"):
        corpus.source_code(tokenizer, 300, "no_such_package")
    for length in (0, -5):
        with pytest.raises(ValueError, match=f"a text must have at least 1 token, got {length}"):
            corpus.source_code(tokenizer, length, "qwen_longctx")
    with pytest.raises(ValueError, match="name a larger package"):
        corpus.source_code(tokenizer, 10_000_000, "qwen_longctx")


def test_variants():
    assert modes.variant("vertical_slash") == ("vertical_slash", {"sparse": "vertical_slash"})
    found = modes.variant("block_scores:density=0.1,last_q=32")
    assert found.overrides == {"sparse": "block_scores", "density": 0.1, "last_q": 32}
    words = modes.variant("off:attention_temperature=position,kernel=auto").overrides
    assert words == {"sparse": "off", "attention_temperature": "position", "kernel": "auto"}
    assert modes.variant("off:attention_temperature=false").overrides["attention_temperature"] is False
    for text in ("block_scores:density", "block_scores:density="):
        with pytest.raises(ValueError, match="a variant reads RULE"):
            modes.variant(text)


def test_quality_command(tmp_path):
    """On the bundled checkpoint: everything kept is dense; less is further away; passkeys are asked for."""
    output, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    variants = ["block_scores:density=1.0", "block_scores:density=0.3", "vertical_slash"]
    command = ["quality", "--model", str(BUNDLED), "--lengths", "512", "--judged", "128", "--dtype", "float32"]
    command += ["--packages", "qwen_longctx", "--depths", "0.5", "--variants", *variants]
    assert main([*command, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    dense, everything, some, slashes = found["rows"]
    assert [row["variant"] for row in found["rows"]] == ["dense", *variants]
    assert everything["nll"] == pytest.approx(dense["nll"], abs=1e-4) and everything["agreement"] == 1.0
    assert slashes["density"] == 1.0  # budgets of thousands hold all of a short text
    assert some["density"] < 0.9 and some["kl"] > everything["kl"] and some["recall"] < 1
    assert dense["passkeys"] == "1/1" and found["texts"][0]["fingerprint"]
    pytest.importorskip("matplotlib")
    assert main(["plot", str(output), "--output", str(plot)]) == 0 and plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("tokens", "judged"), [(2, 1), (3, 1), (512, 256), (16383, 8191), (16384, 8192), (10**6, 8192)]
)
def test_half_of_a_short_text_is_judged(tokens, judged):
    assert quality.default_judged(tokens) == judged


def test_quality_of_short_texts_needs_no_judged(tmp_path):
    """Each text has its own default; a length that is given twice is one text."""
    output = tmp_path / "quality.json"
    command = ["quality", "--model", str(BUNDLED), "--lengths", "64", "512", "64", "--dtype", "float32"]
    assert main([*command, "--packages", "qwen_longctx", "--variants", "off", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["tokens"], row["judged"], row["variant"]) for row in rows] == [
        (tokens, tokens // 2, variant) for tokens in (64, 512) for variant in ("dense", "off")
    ]


def test_points_of_a_plot_are_means_over_texts():
    rows = [
        {"tokens": 9, "package": package, "variant": variant, "nll": nll, "density": share, "agreement": 0.9}
        for package, variant, nll, share in [
            ("a", "dense", 1.0, 1.0),
            ("a", "rule:mass=0.5", 1.25, 0.1),
            ("b", "dense", 2.0, 1.0),
            ("b", "rule:mass=0.5", 2.75, 0.3),
        ]
    ]
    assert plots._points(rows) == {("rule:mass", 9): [(pytest.approx(20), 0.5, pytest.approx(90))]}


def test_bundled_checkpoint_finds_passkeys_sparsely():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    with patched_qwen(model, sparse="block_scores", sparse_attention_threshold=256, prefill_chunk_size=1024):
        records = passkey.evaluate(model, tokenizer, [2048], [0.1, 0.5, 0.9])
    assert sum(r.correct for r in records) >= 2
