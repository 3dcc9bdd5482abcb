"""What measures and packs vLLM, without vLLM: arithmetic, command lines, archives and an OpenAI client."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from qwen_longctx.bench import vllm as bench
from qwen_longctx.bench.shapes import random_prompt, random_weights
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.errors import MissingPackage

FOLDER = Path(__file__).parent.parent / "benchmarks" / "vllm"
CPU = torch.device("cpu")


def script(name):
    """A script of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_vllm_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


def installed(monkeypatch):
    monkeypatch.setattr(bench, "check_vllm", lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_writes_both_engines_and_their_ratio(monkeypatch, tmp_path):
    """Ours as it is, vLLM played by a clock: dense up to a length, sparse beyond it."""
    asked = []

    def served(config, lengths, settings, part, new_tokens):
        asked.append((lengths, settings, part, new_tokens))
        for length in lengths:
            yield length, [2.0, *[0.25] * new_tokens]

    installed(monkeypatch)
    monkeypatch.setattr(bench, "served", served)
    output = tmp_path / "vllm.json"
    command = ["bench", "vllm", "--tiny", "--lengths", "300", "900", "--whole-up-to", "500", "--density", "0.5"]
    assert main([*command, "--prefill-chunk-size", "400", "--output", str(output)]) == 0
    sparse = {"sparse": "block_scores", "density": 0.5, "sparse_attention_threshold": 899}
    assert asked == [([300], {"sparse": "off"}, 400, 32), ([900], sparse, 400, 32)]
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert found["shape"] == "tiny" and "torch" in found["environment"]["packages"]
    assert [(row["engine"], row["tokens"], row["prefill"]) for row in rows] == [
        ("vllm", 300, "dense"),
        ("transformers", 300, "dense"),
        ("vllm", 900, "sparse"),
        ("transformers", 900, "sparse"),
        ("vllm over transformers", 300, "dense"),
        ("vllm over transformers", 900, "sparse"),
    ]
    assert rows[0]["first_token_seconds"] == 2.0 and rows[0]["token_ms"] == 250.0
    ours, ratio = rows[3], rows[5]
    assert len(ours["seconds"]["tokens"]) == 32 and ours["density_asked"] == 0.5
    assert ratio["first_token_ratio"] == pytest.approx(2 / ours["first_token_seconds"], rel=1e-2)
    assert ratio["token_ratio"] == pytest.approx(250 / ours["token_ms"], rel=1e-2)


def test_ratios():
    vllm = {"tokens": 5, "prefill": "dense", "first_token_seconds": 3.0, "token_ms": 10.0}
    ours = {"tokens": 5, "prefill": "dense", "first_token_seconds": 2.0, "token_ms": 8.0}
    found = bench.ratios(vllm, ours)
    assert (found["first_token_ratio"], found["token_ratio"], found["tokens"]) == (1.5, 1.25, 5)


def test_what_the_engines_are_asked():
    config = bench._config(False, "qwen2.5-7b")
    options = bench.engine_options(config, 1000, bench.fixed(1000, None), 300, 8)
    section = options["hf_overrides"]["dual_chunk_attention_config"]
    assert section["chunk_size"] == 262_144 and section["sparse"] == "block_scores"
    assert section["sparse_attention_threshold"] == 999 and "recall_target" not in section
    assert (options["max_model_len"], options["max_num_batched_tokens"]) == (1009, 300)
    assert not options["enable_prefix_caching"]
    assert bench.fixed(1_000_000, None) == {
        "sparse": "block_scores",
        "density": 0.02,
        "sparse_attention_threshold": 32767,
    }
    assert bench.warm_up_length([10_000, 5_000], 300) == 984 and bench.warm_up_length([700], 300) == 700
    assert torch.equal(random_prompt(50, 97), random_prompt(50, 97)) and random_prompt(50, 97).max() < 97


def test_weights_are_drawn_alike():
    """Matrices that vLLM has joined to one, and parameters of inference mode, as those of our own model."""
    torch.manual_seed(0)
    config = bench._config(True, "qwen2.5-7b")
    ours = dict(random_weights(config, CPU).named_parameters())
    with torch.inference_mode():
        theirs = Qwen2ForCausalLM(config)
        attention = theirs.model.layers[0].self_attn
        attention.qkv_proj = torch.nn.Linear(config.hidden_size, 256)
        frequencies = theirs.model.rotary_emb.inv_freq.clone()
    assert bench._draw(theirs) is None
    for name, parameter in theirs.named_parameters():
        like = ours.get(name, ours[name.replace("qkv_proj", "q_proj")] if "qkv_proj" in name else None)
        if "norm" in name:
            assert (parameter == 1).all() and (like == 1).all()
        else:
            for one in (parameter, like):
                spread = 0.1 if one.numel() > 1000 else 0.5  # a bias of the toy has 32 numbers
                assert one.detach().float().std().item() == pytest.approx(0.02, rel=spread)
    assert torch.equal(theirs.model.rotary_emb.inv_freq, frequencies)
    pickle.loads(pickle.dumps(bench._draw))


def test_times_of_a_request():
    """A step may bring no token, or several at once."""
    steps = [0, 1, 1, 3]
    engine = SimpleNamespace(asked=None)
    engine.add_request = lambda name, prompt, sampling: setattr(engine, "asked", prompt["prompt_token_ids"])
    engine.has_unfinished_requests = lambda: bool(steps)
    engine.step = lambda: [SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(range(steps.pop(0))))])]
    seconds = bench._stepped(engine, torch.tensor([[4, 5]]), None)
    assert len(seconds) == 3 and min(seconds) >= 0 and seconds[2] == 0 and engine.asked == [4, 5]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_bench_needs_vllm(capsys):
    with pytest.raises(MissingPackage, match='bench vllm needs vLLM, and importing it says "No module named'):
        next(bench.measure([300], CPU, tiny=True))
    assert main(["bench", "vllm", "--tiny", "--lengths", "300"]) == 2
    assert 'pip install "qwen-longctx[vllm]"' in capsys.readouterr().err


def test_sparse_prompts_that_are_too_short(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(ValueError, match="bench vllm measures prompts of at least 384 tokens, got 300"):
        next(bench.measure([300], CPU, tiny=True, whole_up_to=200))


def wheel(folder, name, files):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in files.items():
            archive.writestr(place, content)
    return path


def test_packing_and_unpacking(tmp_path, capsys):
    pack = script("pack")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    binary = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wheel(
        wheels,
        "vllm",
        {
            "vllm/__init__.py": "x = 1",
            "vllm/_C_stable_libtorch.abi3.so": binary.numpy().tobytes(),
            "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "left",
            "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": "kept",
            "vllm/third_party/deep_gemm/include/a.hpp": "left",
            "vllm/vllm-rs": "left",
            "vllm-1.0.dist-info/entry_points.txt": "kept",
        },
    )
    wheel(wheels, "other", {"other-1.0.data/purelib/other.py": "y = 2", "other-1.0.data/scripts/run": "left"})
    pack.main([str(tmp_path / "parts"), "--wheels", str(wheels)])
    assert "bytes  sha256" in capsys.readouterr().out
    (part,) = (tmp_path / "parts").iterdir()
    parts = pack.split(part, largest=3000)
    assert [one.name for one in parts] == ["vllm.tar.xz.0.0", "vllm.tar.xz.0.1"]
    assert all(one.stat().st_size <= 3000 for one in parts) and not part.exists()
    with tarfile.open(fileobj=io.BytesIO(b"".join(one.read_bytes() for one in parts))) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    assert found == {
        "vllm/__init__.py": b"x = 1",
        "vllm/_C_stable_libtorch.abi3.so": binary.numpy().tobytes(),
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": b"kept",
        "vllm-1.0.dist-info/entry_points.txt": b"kept",
        "other.py": b"y = 2",
    }


def test_packing_is_refused(tmp_path, capsys):
    pack = script("pack")
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path / "parts"), "--wheels", str(tmp_path)])
    assert "there are no wheels in" in capsys.readouterr().err
    both = [wheel(tmp_path, name, {"same.py": "1"}) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"two-1.0.* and one-1.0.* both hold same.py"):
        pack.pack(both, tmp_path / "x")


class Client:
    """An OpenAI client whose server finds the key, or says nothing."""

    def __init__(self, knows=True):
        self.asked, self.knows = [], knows
        self.completions = SimpleNamespace(create=self.complete)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.talk))

    def pieces(self, text):
        key = text.split(" is the pass key")[0][-5:] if self.knows else ""
        return [key[:2], "", key[2:]]

    def complete(self, prompt, **options):
        self.asked.append((prompt, options))
        return [SimpleNamespace(choices=[SimpleNamespace(text=piece)]) for piece in self.pieces(prompt)]

    def talk(self, messages, **options):
        self.asked.append((messages[0]["content"], options))
        events = [SimpleNamespace(choices=[])]  # of what a server tells of its usage
        for piece in self.pieces(messages[0]["content"]):
            events.append(SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=piece))]))
        return events


@pytest.mark.parametrize("chat", [True, False])
def test_passkeys_by_a_client(chat):
    passkeys, tokenizer = script("passkeys"), AutoTokenizer.from_pretrained(BUNDLED)
    client = Client()
    found = list(passkeys.answers(client, "m", tokenizer, [300, 200], [0.0, 1.0], chat=chat))
    assert [(one.length, one.depth, one.correct) for one in found] == [
        (200, 0.0, True),
        (200, 1.0, True),
        (300, 0.0, True),
        (300, 1.0, True),
    ]
    assert all(0 <= one.first_token_seconds <= one.seconds for one in found)
    text, options = client.asked[0]
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == 200
    assert options == {"model": "m", "max_tokens": 16, "temperature": 0, "stream": True}
    (nothing,) = passkeys.answers(Client(knows=False), "m", tokenizer, [200], [0.5], chat=chat)
    assert not nothing.correct and nothing.answer == "" and nothing.first_token_seconds is None
