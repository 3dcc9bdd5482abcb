"""Bad input gets a clear error before work starts, and nothing is left half-patched."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from helpers import GEOMETRY, tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, ops, patch_qwen, patched_qwen, patches
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.evaluation import passkey

SETTINGS = [
    ({"chunk_size": "64"}, TypeError, "chunk_size must be a whole number of tokens, got '64'"),
    ({"chunk_size": 64.0}, TypeError, "chunk_size must be a whole number of tokens, got 64.0"),
    ({"chunk_size": True}, TypeError, "chunk_size must be a whole number of tokens, got True"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1 token, got 0"),
    ({"local_size": -3}, ValueError, "local_size must be at least 1 token, got -3"),
    ({"local_size": 64}, ValueError, r"local_size \(64\) must be smaller than chunk_size \(64\)"),
    ({"local_size": 40}, ValueError, r"local_size \(40\) must be at most half of chunk_size \(64\)"),
    ({"original_max_position_embeddings": 0}, ValueError, "original_max_position_embeddings must be at least 1"),
    ({"attention_temperature": 1}, TypeError, "attention_temperature must be True, False or 'position', got 1"),
    ({"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size must be at least 1 token, got 0"),
    ({"prefill_chunk_size": None}, TypeError, "prefill_chunk_size must be a whole number of tokens, got None"),
    ({"mlp_chunk_size": 1.5}, TypeError, "mlp_chunk_size must be a whole number of tokens, got 1.5"),
    ({"kernel": "fast"}, ValueError, "kernel must be one of auto, fa4, flex, sdpa, reference, got 'fast'"),
    ({"chunksize": 3}, TypeError, "unknown setting 'chunksize': the settings are chunk_size, local_size"),
]


@pytest.mark.parametrize("settings, error, message", SETTINGS)
@pytest.mark.parametrize("scope", ["class", "instance"])
def test_settings(settings, error, message, scope):
    model = tiny_model("qwen2")
    complete = settings if scope == "instance" else {**GEOMETRY, **settings}
    with pytest.raises(error, match=message):
        patch_qwen(model if scope == "instance" else None, **complete)
    assert not any("forward" in vars(m) for m in model.modules())
    assert patches.current_overrides(None) is None


CHECKPOINTS = [
    (
        {"dual_chunk_attention_config": [1, 2]},
        TypeError,
        r"dual_chunk_attention_config must be a mapping, got \[1, 2\]",
    ),
    (
        {"dual_chunk_attention_config": {**GEOMETRY, "chunk_size": "big"}},
        TypeError,
        "chunk_size must be a whole number of tokens, got 'big'",
    ),
    (
        {"dual_chunk_attention_config": {**GEOMETRY, "local_size": 100}},
        ValueError,
        r"local_size \(100\) must be smaller than chunk_size \(64\)",
    ),
    (
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        ValueError,
        r"sliding-window layers \(sliding_window=16\) cannot use dual chunk attention",
    ),
]


@pytest.mark.parametrize("config, error, message", CHECKPOINTS)
def test_checkpoints(config, error, message):
    model = tiny_model("qwen2", **config)
    with pytest.raises(error, match=message):
        patch_qwen(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_bases_that_depend_on_the_length(kind):
    config = Qwen2Config()
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    setattr(config, "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling", rope)
    with pytest.raises(ValueError, match=f"rope_type '{kind}' changes the rotary base with the length"):
        LongContextConfig.from_model_config(config)


def test_config_broken_after_patching_is_refused_at_the_forward():
    model = patch_qwen(tiny_model("qwen2"))
    model.config.dual_chunk_attention_config["local_size"] = 64
    with pytest.raises(ValueError, match=r"local_size \(64\) must be smaller"), torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("thing", ["Qwen/Qwen2.5-7B-Instruct-1M", 3, {"model": 1}])
def test_no_model(thing):
    with pytest.raises(TypeError, match=f"patch_qwen takes a model or nothing, got {type(thing).__name__}"):
        patch_qwen(thing)


def test_unknown_family():
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(
        TypeError, match="LlamaForCausalLM holds no model that can be patched: known families are Qwen2"
    ):
        patch_qwen(LlamaForCausalLM(config))


@pytest.mark.parametrize("version", ["4.56.2", "6.0.0"])
@pytest.mark.parametrize("scope", ["class", "instance"])
def test_transformers_out_of_range(version, scope, monkeypatch):
    model = tiny_model("qwen2")
    monkeypatch.setattr(patches.family.transformers, "__version__", version)
    with pytest.raises(ImportError, match=f"needs transformers >=4.57,<6, installed is {version}"):
        patch_qwen(model if scope == "instance" else None)
    assert patches.current_overrides(None) is None


def test_qwen2_moe_below_5(monkeypatch):
    monkeypatch.setattr(patches.family.transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match="Qwen2Moe needs transformers >=5.0,<6, installed is 4.57.6"):
        patches.qwen2_moe.FAMILY.check()


@pytest.mark.parametrize("scope", ["class", "instance"])
def test_signature_drift(scope, monkeypatch):
    """A transformers whose attention no longer takes what we pass."""

    def forward(self, hidden_states, rotary, attention_mask, past_key_values=None, **kwargs):
        """Stands for tomorrow's code."""

    model = tiny_model("qwen2")
    monkeypatch.setattr(qwen2.Qwen2Attention, "forward", forward)
    message = f"transformers {transformers.__version__} changed Qwen2Attention.forward: it has no position_embeddings"
    with pytest.raises(RuntimeError, match=message):
        patch_qwen(model if scope == "instance" else None)
    assert "qwen_longctx" not in vars(qwen2.Qwen2MLP.forward)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("capacity, error", [(-1, ValueError), (2.5, TypeError), (True, TypeError), ("9", TypeError)])
def test_cache_capacity(capacity, error):
    with pytest.raises(error, match="capacity must"):
        LongContextCache(capacity)


def test_forward_without_input():
    model = patch_qwen(tiny_model("qwen2"))
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds: the forward got neither"):
        model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64, torch.uint8, torch.int16, torch.uint64])
def test_ids_of_a_dtype_that_no_embedding_takes(dtype):
    model, ids = patch_qwen(tiny_model("qwen2")), torch.ones(1, 5).to(dtype)
    for call in (model, model.generate):
        with pytest.raises(TypeError, match=f"input_ids must be integers, got {dtype}: an embedding takes torch.int64"):
            call(ids)


def test_embeddings_that_are_integers():
    model = patch_qwen(tiny_model("qwen2"))
    for call in (model, model.generate):
        with pytest.raises(TypeError, match="inputs_embeds must be floating point, got torch.int64"):
            call(inputs_embeds=torch.ones(1, 5, 32, dtype=torch.long))


def test_a_layer_called_alone():
    model = patch_qwen(tiny_model("qwen2"))
    with pytest.raises(RuntimeError, match="Qwen2Attention of a patched model was called without its model's forward"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 32), position_embeddings=None, attention_mask=None)


def test_a_foreign_cache():
    model = patch_qwen(tiny_model("qwen2"))
    ids = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="tuple is not supported: pass a DynamicCache or a LongContextCache"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_dropout_in_training():
    model = patch_qwen(tiny_model("qwen2", attention_dropout=0.1)).train()
    with pytest.raises(NotImplementedError, match="attention_dropout=0.1 is not supported by dual chunk attention"):
        model(torch.ones(1, 5, dtype=torch.long))


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of auto, fa4, flex, sdpa, reference, got 'flash'"):
        ops.get("flash")


def test_the_error_of_a_context_manager_leaves_the_earlier_patch():
    model = patch_qwen(tiny_model("qwen2"), prefill_chunk_size=9)
    with pytest.raises(ValueError, match="mlp_chunk_size must be at least 1"), patched_qwen(model, mlp_chunk_size=0):
        pass
    assert patches.current_overrides(model) == {"prefill_chunk_size": 9}


PROMPTS = [
    ({"depth": 1.5}, r"a depth must be between 0 \(the start\) and 1 \(the end of the prompt\), got 1.5"),
    ({"key": "123"}, "key must be five digits, got '123'"),
    ({"key": "12a45"}, "key must be five digits, got '12a45'"),
    ({"length": 20}, "length must be at least .* tokens for this tokenizer, got 20"),
]


@pytest.mark.parametrize("change, message", PROMPTS)
def test_passkey_prompts(change, message):
    class Letters:
        """A token a character."""

        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    arguments = {"length": 1000, "depth": 0.5, "key": "12345", **change}
    with pytest.raises(ValueError, match=message):
        passkey.prompt(Letters(), **arguments)


QUALITY = ["quality", "--model", str(BUNDLED), "--lengths", "512"]
CALIBRATE = ["calibrate", "--model", str(BUNDLED), "--lengths", "512", "--output", "never_written.json"]
COMMANDS = [
    (["bench", "stock"], "bench needs a CUDA device"),
    (["bench", "mlp", "--tiny"], "bench mlp reads CUDA's memory statistics"),
    (["passkey", "--model", "no/such/folder", "--lengths", "1000"], "no/such/folder"),
    (["plan", "no/such/folder", "--tokens", "1000"], "no/such/folder"),
    ([*QUALITY, "--judged", "64", "--variants", "fast"], "sparse must be one of off, auto, block_scores"),
    ([*QUALITY, "--variants", "block_scores:density"], "a variant reads RULE or RULE:SETTING=VALUE"),
    ([*QUALITY, "--judged", "64", "--packages", "no_such_package"], "package 'no_such_package' is not installed"),
    ([*CALIBRATE, "--start", "nowhere.json"], "there is no file nowhere.json"),
    (["bench", "speed"], "bench needs a CUDA device"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asserts what a machine without CUDA says")
@pytest.mark.parametrize("command, message", COMMANDS)
def test_commands(command, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan", "x", "--tokens", "0"], ["bench", "everything"], [], ["demo", "now"]])
def test_usage(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "usage: qwen-longctx" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _nothing_is_left_patched():
    yield
    assert patches.current_overrides(None) is None
