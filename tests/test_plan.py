"""Plans: sizes as people write them, weights from a config alone, verdicts, and what would fit."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLConfig

from helpers import FAMILIES, tiny_model
from qwen_longctx import memory, shapes, sizes
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.errors import InvalidType, InvalidValue, Refused, Unsupported
from qwen_longctx.prefill.weights import weights_of

BF16 = torch.bfloat16
# what the model cards say, in billions of parameters
PUBLISHED = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616,
    "qwen2.5-7b-1m": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-14b-1m": 14.770,
    "qwen2.5-32b": 32.764,
    "qwen2.5-72b": 72.706,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-4b-2507": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.768,
    "qwen3-32b": 32.762,
    "qwen3-30b-a3b": 30.532,
    "qwen3-30b-a3b-2507": 30.532,
    "qwen3-235b-a22b": 235.094,
}


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1000000", 10**6),
        ("1M", 10**6),
        ("512K", 512_000),
        ("512Ki", 524_288),
        ("1.5m", 1_500_000),
        (" 2 k ", 2000),
        (7, 7),
    ],
)
def test_tokens(text, tokens):
    assert sizes.parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("80 GB", 80 * 10**9), ("80gb", 80 * 10**9), ("80GiB", 80 << 30), ("0.5TB", 5 * 10**11)]
    + [("24564MiB", 24564 << 20), ("1.1GB", 1_100_000_000), (5, 5)],
)
def test_memory_sizes(text, size):
    assert sizes.parse_bytes(text) == size


NONSENSE = [
    "",
    " ",
    "0",
    "-1",
    "nan",
    "inf",
    "1e30",
    "1e3",
    "x",
    "1,000",
    "1_000",
    "١",
    "²",
    "1M1",
    "M",
    "1 M M",
    "0x10",
]
NO_TOKENS = [*NONSENSE, "0.5", "0.0001K", "1GB", "1G", "9" * 31, "9" * 30, "2000000000M", 0, -3, 10**16]
NO_BYTES = [
    *NONSENSE,
    "80",
    "80G",
    "80B",
    "0GB",
    "-1GB",
    "nanGB",
    "1e30GB",
    "9999999999GB",
    "0.0000000001MB",
    0,
    -3,
    10**19,
]


@pytest.mark.parametrize("value", NO_TOKENS)
def test_no_tokens(value):
    with pytest.raises(
        InvalidValue, match="tokens must be (a whole number from 1 on, such as 131072|at most 1,000,000)"
    ):
        sizes.parse_tokens(value)


@pytest.mark.parametrize("value", NO_BYTES)
def test_no_memory(value):
    with pytest.raises(
        InvalidValue, match="memory must be (a number above 0 with its unit, such as 24GB|at most 1,000)"
    ):
        sizes.parse_bytes(value)


@pytest.mark.parametrize("value", [None, True, 1.5, float("nan"), [1], b"1M"])
def test_no_text_and_no_number(value):
    for parse in (sizes.parse_tokens, sizes.parse_bytes):
        with pytest.raises(InvalidType, match="must be a"):
            parse(value)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_have_the_published_sizes(name):
    """All experts count, and a head that is tied to the embeddings does not."""
    weights = weights_of(shapes.known_config(name), BF16)
    assert weights.total / 2e9 == pytest.approx(PUBLISHED[name], abs=6e-4)
    assert len(weights.layers) == shapes.SHAPES[name]["num_hidden_layers"]


def test_an_unknown_shape_is_refused():
    with pytest.raises(InvalidValue, match="'qwen9-1b' is no known shape: name one of qwen2.5-0.5b, "):
        memory.plan("qwen9-1b", "1M", "24GB")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_live_models(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    held = {p.data_ptr(): p.numel() * 4 for p in model.parameters()}
    assert weights_of(model.config, torch.float32).total == sum(held.values())


def quantised(name="qwen2.5-7b", **section):
    config = copy.deepcopy(shapes.known_config(name))
    config.quantization_config = section
    return config


def linear_of(name="qwen2.5-7b"):
    """Numbers of all matrices of the layers, and of everything else."""
    config = shapes.known_config(name)
    hidden, inner, kv = config.hidden_size, config.intermediate_size, 128 * config.num_key_value_heads
    matrices = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    return matrices, weights_of(config, BF16).total // 2 - matrices


BITSANDBYTES = {"quant_method": "bitsandbytes"}
COMPRESSED = {"quant_method": "compressed-tensors"}
METHODS = [
    ({**BITSANDBYTES, "load_in_4bit": True}, 0.5 + 4 / 64),
    ({**BITSANDBYTES, "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5 + (1 + 4 / 256) / 64),
    ({**BITSANDBYTES, "load_in_8bit": True}, 1),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1),
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
    ({"quant_method": "fp8"}, 1),
    ({**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}}, 0.5 + 2 / 128),
    ({**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 8}}}, "ignore": ["re:.*lm_head"]}, 1),
]


@pytest.mark.parametrize(("section", "each"), METHODS, ids=lambda value: str(value)[:60])
def test_quantised_weights_count_by_their_bits(section, each):
    matrices, others = linear_of()
    assert weights_of(quantised(**section), BF16).total == pytest.approx(matrices * each + 2 * others, rel=2e-3)


@pytest.mark.parametrize("left", ["model.layers.3.mlp.up_proj", "layers.3.mlp.up_proj", "re:model.layers.3.mlp.up"])
def test_modules_that_are_left_as_they_are(left):
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    few, more = (weights_of(quantised(**section, modules_to_not_convert=names), BF16) for names in (None, [left]))
    grown = [number for number, pair in enumerate(zip(few.layers, more.layers, strict=True)) if pair[0] != pair[1]]
    assert grown == [3] and more.layers[3] - few.layers[3] == pytest.approx(3584 * 18944, rel=1e-3)


def test_experts_of_a_quantised_checkpoint():
    total = weights_of(quantised("qwen3-30b-a3b", quant_method="fp8", weight_block_size=[128, 128]), BF16).total
    assert 30.5e9 < total < 32.5e9


@pytest.mark.parametrize(
    "section",
    [{"quant_method": "torchao"}, {}, {"quant_method": None}, {"quant_method": ["gptq"]}, {"quant_method": "gptq"}]
    + [{"quant_method": "gptq", "bits": bits} for bits in (0, "four", True, 1.5, 99)]
    + [{"quant_method": "awq", "bits": 4, "group_size": "x"}, {"quant_method": "fp8", "weight_block_size": [0, 128]}]
    + [{"quant_method": "fp8", "weight_block_size": 5}, {"quant_method": "fp8", "ignore": ["re:("]}, BITSANDBYTES]
    + [COMPRESSED, {**COMPRESSED, "config_groups": {}}, {**COMPRESSED, "config_groups": {"a": {"weights": None}}}]
    + [{**COMPRESSED, "config_groups": {str(n): {"weights": {"num_bits": n}} for n in (4, 8)}}],
    ids=str,
)
def test_what_cannot_be_told_is_said(section):
    with pytest.raises(Unsupported, match="quantised .* in a way whose bytes are not known here"):
        memory.plan(quantised("qwen2.5-0.5b", **section), "1M", "24GB")


def test_cards_share_the_layers():
    weights = weights_of(shapes.known_config("qwen2.5-7b"), BF16)
    for cards in (1, 2, 3, 5, 28, 29, 1000):
        dealt = weights.on_cards(cards)
        counts = [count for count, _ in dealt]
        assert sum(counts) == 28 and max(counts) - min(counts) <= 1 and len(counts) == min(cards, 28)
        assert sum(size for _, size in dealt) == weights.total
    first, *_, last = weights.on_cards(28)
    assert first[1] == weights.layers[0] + weights.embeddings and last[1] == weights.layers[0] + weights.head


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_million_tokens_of_the_7b_fit_on_80_gb():
    found = memory.plan("Qwen2.5-7B-1M", "1M", "80GB")
    assert found.fits and found.suggestions == () and found.tokens == 10**6 and found.gpu == 80 * 10**9
    assert found.memory.kv_cache == 57_344 * 10**6 and found.memory.weights == 2 * 7_615_616_512
    assert "It fits, " in str(found) and "selection scratch" in str(found)


def changed(line, arguments):
    """The plan that a suggestion leads to."""
    arguments = dict(arguments)
    if line.startswith("patch_qwen(model, "):
        settings = eval(f"dict({line.removeprefix('patch_qwen(model, ')}")
        arguments.update(settings)
    else:
        name, value = re.fullmatch(r"--(gpus|batch|tokens) (\d+)", line).groups()
        arguments[name] = int(value)
    return memory.plan(**arguments)


TIGHT = [
    {"model": "qwen2.5-7b-1m", "tokens": 10**6, "gpu": "24GB"},
    {"model": "qwen2.5-7b-1m", "tokens": 10**6, "gpu": "76GB", "mlp_chunk_size": 4096},
    {"model": "qwen2.5-7b-1m", "tokens": 10**6, "gpu": "74.1GB"},
    {"model": "qwen2.5-7b-1m", "tokens": 10**6, "gpu": "74.2GB", "prefill_chunk_size": 1024},
    {"model": "qwen2.5-0.5b", "tokens": 200_000, "gpu": "8GB", "batch": 7},
    {"model": "qwen3-30b-a3b", "tokens": 131_072, "gpu": "24GB", "gpus": 2},
    {"model": "qwen3-8b", "tokens": 40_000, "gpu": "24GB", "sparse": "off"},
]


@pytest.mark.parametrize("arguments", TIGHT, ids=str)
def test_every_suggestion_fits_and_is_the_mildest_of_its_kind(arguments):
    found = memory.plan(**arguments)
    assert found.fits is False and found.suggestions and "It would with:" in str(found)
    kinds = [one.line.split()[0] for one in found.suggestions]
    order = ["patch_qwen(model,", "--batch", "--tokens", "--gpus"]
    assert kinds == [kind for kind in order if kind in kinds]
    for one in found.suggestions:
        then = changed(one.line, arguments)
        assert then.fits and then.memory.total == one.total and one.line in str(found)
        if not one.line.startswith("patch_qwen"):
            name, value = one.line.removeprefix("--").split()
            worse = {**arguments, name: int(value) + (-1 if name == "gpus" else 1)}
            assert not memory.plan(**worse).fits
        elif (size := then.settings.get("prefill_chunk_size")) and then.settings.get("sparse") != "off":
            assert not memory.plan(**{**arguments, "prefill_chunk_size": 2 * size}).fits


def test_settings_are_tried_in_order():
    """A smaller chunk, then dense prefill, then both; what was given stays in the line."""
    firsts = [memory.plan(**arguments).suggestions[0] for arguments in TIGHT[1:4]]
    assert [(one.line, one.meaning) for one in firsts] == [
        ("patch_qwen(model, mlp_chunk_size=4096, prefill_chunk_size=16384)", "smaller prefill chunks"),
        ("patch_qwen(model, sparse='off', prefill_chunk_size=4096)", "dense prefill in smaller chunks"),
        ("patch_qwen(model, prefill_chunk_size=1024, sparse='off')", "dense prefill"),
    ]


def test_nothing_helps():
    found = memory.plan("qwen2.5-72b", "32K", "1GB")
    assert found.suggestions == () and "No single change makes it fit." in str(found)


def test_without_a_card_there_is_no_verdict():
    found = memory.plan("qwen2.5-0.5b", 1000)
    assert found.fits is None and found.suggestions == () and "fit" not in str(found)


def test_cards():
    """The fullest holds ceil(28 / 3) layers; more cards than layers are as many as layers."""
    one, three, many, more = (memory.plan("qwen2.5-7b-1m", "1M", gpus=n).memory for n in (1, 3, 28, 4096))
    assert three.kv_cache == one.kv_cache * 10 // 28 and many == more
    # four chunks are on their way: hidden states, and three tables of cosines and sines
    ahead = 4 * 32768 * (3584 + 3 * 2 * 128) * 2
    assert one.weights > three.weights > one.weights / 3 and three.activations == one.activations + ahead
    off = memory.plan("qwen2.5-7b-1m", "1M", gpus=3, pipeline="off").memory
    assert off.activations == one.activations


def test_short_prompts_and_many_rows():
    short, longer = (memory.plan("qwen2.5-7b", tokens).memory for tokens in (1, 1000))
    assert short.activations < longer.activations and short.selection == 0
    many = memory.plan("qwen2.5-7b", 1000, batch=1000).memory
    assert many.kv_cache == 1000 * longer.kv_cache and many.activations > 500 * (longer.activations - (32 << 20))
    huge = memory.plan("qwen2.5-7b", 10**15, "24GB", batch=1 << 20)
    assert huge.fits is False and huge.memory.kv_cache == 57_344 * 10**15 << 20


def test_experts_take_activations_of_all_tokens():
    experts, dense = (memory.plan(name, 200_000, sparse="off").memory for name in ("qwen3-30b-a3b", "qwen3-4b"))
    assert experts.activations > 4 * 32_768 * 8 * 2048 * 2 > dense.activations


def test_numbers_of_other_libraries():
    own, other = (memory.plan("qwen3-4b", n, n * 10**6, batch=n // 1000) for n in (2000, numpy.int64(2000)))
    assert own == other and type(other.batch) is type(other.tokens) is type(other.gpu) is int


def test_dtypes():
    half, whole = (memory.plan("qwen2.5-0.5b", 9000, dtype=dtype).memory for dtype in (torch.float16, torch.float32))
    assert whole.weights == 2 * half.weights and whole.kv_cache == 2 * half.kv_cache


BAD = [
    ({"dtype": torch.int8}, InvalidValue, "dtype must be torch.bfloat16, torch.float16 or torch.float32"),
    ({"dtype": "bfloat16"}, InvalidValue, "dtype must be"),
    ({"gpus": 0}, InvalidValue, "gpus must be from 1 to 4,096, got 0"),
    ({"gpus": 10**9}, InvalidValue, "gpus must be from 1 to 4,096"),
    ({"gpus": 1.5}, InvalidType, "gpus must be a whole number, got 1.5"),
    ({"batch": True}, InvalidType, "batch must be a whole number, got True"),
    ({"batch": -1}, InvalidValue, "batch must be from 1 to"),
    ({"gpu": "80"}, InvalidValue, "memory must be a number above 0 with its unit"),
    ({"gpu": 0}, InvalidValue, "memory must be"),
    ({"tokens": 0}, InvalidValue, "tokens must be"),
    ({"kv_caches": "fp8"}, InvalidType, "unknown setting 'kv_caches'"),
    ({"sparse": "fast"}, InvalidValue, "sparse must be one of"),
    ({"prefill_chunk_size": 0}, InvalidValue, "prefill_chunk_size must be at least 1"),
    ({"model": 7}, InvalidType, "model must be the name of a shape or the config of a checkpoint, got 7"),
    ({"model": Qwen2_5_VLConfig()}, Unsupported, "a model of type 'qwen2_5_vl': give one of those known, qwen2,"),
    ({"model": AutoConfig.for_model("llama")}, Unsupported, "a model of type 'llama'"),
    ({"model": AutoConfig.for_model("qwen2", num_attention_heads=0)}, InvalidValue, "num_attention_heads"),
    ({"model": AutoConfig.for_model("qwen2", use_sliding_window=True)}, InvalidValue, "sliding"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as told:
        memory.plan(**{"model": "qwen2.5-0.5b", "tokens": "1M", "gpu": "24GB", **arguments})
    assert isinstance(told.value, Refused)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_the_plan_and_writes_it(tmp_path, capsys):
    output = tmp_path / "deep" / "plan.json"
    command = ["plan", "Qwen2.5-7B-1M", "--tokens", "1M", "--gpu", "76GB", "--sparse", "block_scores"]
    assert main([*command, "--json", str(output)]) == 0
    found = memory.plan("qwen2.5-7b-1m", "1M", "76GB", sparse="block_scores")
    assert capsys.readouterr().out == f"{found}\n"
    written = json.loads(output.read_text())
    assert written["memory"]["total"] == found.memory.total and written["fits"] is False
    assert written["model"] == "Qwen2.5-7B-1M" and written["settings"] == {"sparse": "block_scores"}
    assert [one["line"] for one in written["suggestions"]] == [one.line for one in found.suggestions]


def test_the_command_reads_a_checkpoint(capsys):
    options = [
        "--gpus",
        "2",
        "--batch",
        "3",
        "--dtype",
        "float32",
        "--prefill-chunk-size",
        "64",
        "--mlp-chunk-size",
        "32",
    ]
    options += ["--sparse-attention-threshold", "9", "--block-size", "32"]
    assert main(["plan", str(BUNDLED), "--tokens", "4096", "--gpu", "24GB", *options]) == 0
    out = capsys.readouterr().out
    assert "3 x 4,096 tokens, float32, on the fullest of 2 cards" in out and "It fits" in out


def test_the_plan_that_the_documents_show(capsys):
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    command, _, shown = page.partition("```\n$ qwen-longctx ")[2].partition("```")[0].partition("\n")
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown
    named = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text().partition("one of these shapes:")[2]
    words = re.findall(r"`([\w.-]+)`", named.partition("\n\n")[0])
    family = ""
    for at, word in enumerate(words):
        family = family if word.startswith("-") else word.partition("-")[0]
        words[at] = family + word if word.startswith("-") else word
    assert words == list(shapes.SHAPES)


def test_a_folder_of_the_name_of_a_shape_is_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-8b").symlink_to(BUNDLED)
    assert main(["plan", "qwen3-8b", "--tokens", "4096", "--gpu", "24GB"]) == 0
    assert re.search(r"weights +0\.01 GiB", capsys.readouterr().out)


def test_the_smallest_card_of_the_machine(monkeypatch, capsys):
    totals = [30 * 10**9, 20 * 10**9]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    about = type("Properties", (), {})
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: type("", (about,), {"total_memory": totals[i]})()
    )
    assert main(["plan", "qwen2.5-7b", "--tokens", "32K"]) == 0
    assert re.search(r"card +18\.63 GiB", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokens", "1GB", "argument --tokens: tokens must be a whole number from 1 on, such as"),
        ("--tokens", "nan", "argument --tokens: tokens must be"),
        (
            "--gpu",
            "80",
            "argument --gpu: memory must be a number above 0 with its unit, such as 24GB or 80GiB, got '80'",
        ),
        ("--gpu", "1e30GB", "argument --gpu: memory must be"),
        ("--gpus", "0", "argument --gpus: must be at least 1"),
    ],
)
def test_bad_options(option, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "qwen3-8b", "--tokens", "1M", "--gpu", "24GB", option, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_refusals_are_one_line(tmp_path, capsys):
    for words, message in (
        (["no/such/folder", "--tokens", "1M"], "cannot load the config of 'no/such/folder'"),
        (["qwen3-8b", "--tokens", "1M", "--sparse", "fast"], "sparse must be one of"),
        (["qwen3-8b", "--tokens", "1M", "--gpus", "5000"], "gpus must be from 1 to 4,096"),
        (["qwen3-8b", "--tokens", "1M", "--json", str(tmp_path)], str(tmp_path)),
    ):
        assert main(["plan", *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
