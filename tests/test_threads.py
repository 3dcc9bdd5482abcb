"""Many threads on one model: they generate, patch and unpatch, and nobody sees half a patch."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from helpers import tiny_model
from qwen_longctx import patch_qwen, patched_qwen, patches, unpatch_qwen
from qwen_longctx.patches.method import patched_method

PATIENCE = 60  # seconds after which a test takes a thread for stuck


@pytest.fixture(autouse=True)
def _threads_switch_often():
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    unpatch_qwen()


def prompt(tokens=150):
    return torch.randint(1, 90, (1, tokens), generator=torch.Generator().manual_seed(7))  # threads share the global one


def generated(model):
    with torch.no_grad():
        return model.generate(
            prompt(), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )


def first_logits(model):
    return torch.cat(generated(model).logits)


def at_once(jobs: list[Callable[[], object]]) -> list[object]:
    """Results of all jobs, each in a thread of its own; raises what any of them raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=PATIENCE) for future in [pool.submit(job) for job in jobs]]


def is_one_of(value, choices):
    return any(value.shape == choice.shape and torch.allclose(value, choice, atol=1e-4) for choice in choices)


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("scope", ["class", "instance"])
def test_generating_while_others_patch_and_unpatch(threads, scope):
    """Every run is that of the stock model or that of one patch, and the config is as it was."""
    model = tiny_model()
    target = model if scope == "instance" else None
    before = copy.deepcopy(vars(model.config))
    choices = [first_logits(model)]
    settings = [{}, {"attention_temperature": False}, {"local_size": 8, "prefill_chunk_size": 37}]
    for given in settings:
        with patched_qwen(target, **given):
            choices.append(first_logits(model))
    done = threading.Event()

    def generate():
        runs = []
        while not done.is_set() or not runs:
            runs.append(first_logits(model))
        return runs

    def change(number):
        for turn in range(12):
            if turn % 3 == 2:
                unpatch_qwen(target)
            else:
                patch_qwen(target, **settings[(turn + number) % 3])
            time.sleep(0.003)
        return []

    def changes():
        try:
            at_once([lambda n=n: change(n) for n in range(max(1, threads // 4))])
        finally:
            done.set()
        return []

    for runs in at_once([changes] + [generate] * (threads - 1)):
        assert all(is_one_of(run, choices) for run in runs)
    unpatch_qwen(target)
    assert vars(model.config) == before
    torch.testing.assert_close(first_logits(model), choices[0])
    assert not any(patched_method(value) for module in model.modules() for value in vars(module).values())


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("scope", ["class", "instance"])
def test_blocks_of_threads_overlap(threads, scope):
    model = tiny_model()
    target = model if scope == "instance" else None
    stock = first_logits(model)
    patch_qwen(target, prefill_chunk_size=41)
    wanted = first_logits(model)

    def block(number):
        runs = []
        for _ in range(2):  # each change of the classes looks at all objects of the process
            with patched_qwen(target, prefill_chunk_size=20 + number):
                runs.append(first_logits(model))
        return runs

    for runs in at_once([lambda n=n: block(n) for n in range(threads)]):
        assert all(torch.allclose(run, wanted, atol=1e-4) for run in runs)
    assert patches.current_overrides(target) == {"prefill_chunk_size": 41}
    unpatch_qwen(target)
    torch.testing.assert_close(first_logits(model), stock)


def test_a_block_that_ends_first_leaves_the_patch_to_the_later_one():
    model = tiny_model()
    outer, inner = patched_qwen(model, prefill_chunk_size=31), patched_qwen(model, prefill_chunk_size=32)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert patches.current_overrides(model) == {"prefill_chunk_size": 32}
    inner.__exit__(None, None, None)
    assert patches.current_overrides(model) is None


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("change", ["unpatch", "patch again"])
def test_a_change_waits_for_the_run_in_progress(change, scope):
    """The run stops in its second chunk until the change is asked for, and still is one run of one patch."""
    model = tiny_model()
    target = model if scope == "instance" else None
    patch_qwen(target, prefill_chunk_size=50)
    wanted = first_logits(model)
    inside, go_on = threading.Event(), threading.Event()

    def pause(module, args, kwargs):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(PATIENCE)

    handle = model.model.layers[1].register_forward_pre_hook(pause, with_kwargs=True)
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(first_logits, model)
        assert inside.wait(PATIENCE)
        asked = pool.submit(unpatch_qwen if change == "unpatch" else patch_qwen, target)
        time.sleep(0.1)
        assert not asked.done()
        patch_qwen(tiny_model()) if scope == "instance" else None  # another model need not wait
        go_on.set()
        torch.testing.assert_close(run.result(PATIENCE), wanted)
        asked.result(PATIENCE)
    handle.remove()
    assert patches.current_overrides(target) == (None if change == "unpatch" else {})


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("where", ["embedding", "layer", "head"])
def test_a_stock_run_in_progress_ends_as_it_began(where, scope):
    model = tiny_model()
    stock = first_logits(model)
    target = model if scope == "instance" else None
    inside, go_on = threading.Event(), threading.Event()

    def pause(*args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(PATIENCE)

    module = {"embedding": model.model.embed_tokens, "layer": model.model.layers[1], "head": model.lm_head}[where]
    handle = module.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(first_logits, model)
        assert inside.wait(PATIENCE)
        patch_qwen(target)
        patched = first_logits(model)
        go_on.set()
        torch.testing.assert_close(run.result(PATIENCE), stock)
    handle.remove()
    assert not torch.allclose(patched, stock)
    torch.testing.assert_close(first_logits(model), patched)
    unpatch_qwen(target)
    torch.testing.assert_close(first_logits(model), stock)


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("change", [patch_qwen, unpatch_qwen])
def test_a_change_from_inside_a_run_is_refused(change, scope):
    model = tiny_model()
    target = model if scope == "instance" else None
    patch_qwen(target)
    wanted = first_logits(model)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *args: change(target))
    cache = DynamicCache()
    with pytest.raises(RuntimeError, match="cannot be changed from inside a run"), torch.no_grad():
        model(prompt(), past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(first_logits(model), wanted)
    unpatch_qwen(target)


def test_two_sequences_run_through_one_model():
    model = patch_qwen(tiny_model(), prefill_chunk_size=30)
    wanted = first_logits(model)
    for found in at_once([lambda: first_logits(model)] * 8):
        torch.testing.assert_close(found, wanted)
