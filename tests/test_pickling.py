"""Patched models in other processes: a patched model is patched there, and a model of patched classes warns."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as processes

from helpers import tiny_model
from qwen_longctx import patch_qwen, patches, unpatch_qwen
from qwen_longctx.patches.method import patched_method


@pytest.fixture(autouse=True)
def _unpatched_classes():
    yield
    unpatch_qwen()


@torch.no_grad()
def logits(model):
    torch.manual_seed(3)
    return model(torch.randint(0, 90, (1, 200))).logits


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [by_pickle, by_torch, copy.deepcopy, copy.copy])
def test_a_patched_model_comes_back_patched(way):
    model = tiny_model()
    stock = logits(model)
    wanted = logits(patch_qwen(model, prefill_chunk_size=50, attention_temperature=False))
    twin = way(model)
    torch.testing.assert_close(logits(twin), wanted)
    settings = {"prefill_chunk_size": 50, "attention_temperature": False}
    assert patches.current_overrides(twin) == settings
    if way is not copy.copy:  # which shares the modules
        unpatch_qwen(twin)
        assert torch.equal(logits(twin), stock)
        assert not any(patched_method(value) for m in twin.modules() for value in vars(m).values())
        torch.testing.assert_close(logits(model), wanted)
    generated = model.generate(torch.ones(1, 90, dtype=torch.long), max_new_tokens=3)
    again = way(model).generate(torch.ones(1, 90, dtype=torch.long), max_new_tokens=3)
    assert torch.equal(again, generated)


def test_a_bound_method_alone_comes_back_patched():
    model = patch_qwen(tiny_model())
    wanted = logits(model)
    forward = pickle.loads(pickle.dumps(model.forward))
    torch.testing.assert_close(logits(forward.__self__), wanted)


def _in_a_spawned_process(model, results):
    results.put((logits(model).tolist(), patches.current_overrides(model)))


def test_a_spawned_process_gets_a_patched_model():
    model = patch_qwen(tiny_model(), prefill_chunk_size=50)
    wanted = logits(model)
    context = processes.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_in_a_spawned_process, args=(model, results))
    process.start()
    found, overrides = results.get(timeout=120)
    process.join(60)
    torch.testing.assert_close(torch.tensor(found), wanted)
    assert overrides == {"prefill_chunk_size": 50}


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.manual_seed(3)
with torch.no_grad():
    torch.save(model(torch.randint(0, 90, (1, 200))).logits, sys.argv[2])
"""


@pytest.mark.parametrize("scope", ["class", "instance"])
def test_another_process(scope, tmp_path):
    """The patch of a model goes along; that of the classes does not, and the process that loads it says so."""
    model = tiny_model()
    stock = logits(model)
    patch_qwen(model if scope == "instance" else None, prefill_chunk_size=50)
    wanted = logits(model)
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, tmp_path / "model.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted if scope == "instance" else stock)
    warned = "it is not patched here. Call patch_qwen(prefill_chunk_size=50) in this process too" in done.stderr
    assert warned == (scope == "class")


def test_patched_classes_in_the_same_process_need_no_warning(caplog):
    patch_qwen()
    model = tiny_model()
    wanted = logits(model)
    with caplog.at_level(logging.WARNING):
        for way in (by_pickle, by_torch, copy.deepcopy):
            torch.testing.assert_close(logits(way(model)), wanted)
    assert "is not patched here" not in caplog.text
    pickled = pickle.dumps(model)
    unpatch_qwen()
    with caplog.at_level(logging.WARNING):
        pickle.loads(pickled)
    assert "is not patched here. Call patch_qwen() in this process too" in caplog.text
