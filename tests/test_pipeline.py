"""Several devices on neighbouring chunks: the same logits as one device, nothing that waits, nothing left behind.

The devices are the CPU twice, on which nothing is asynchronous: what is handed over, and when, is looked at instead.
"""

from __future__ import annotations

import copy
import threading
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen2Model

from fake_streams import Machine
from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen, unpatch_qwen
from qwen_longctx.ops import engines
from qwen_longctx.patches import causal_lm, pipelined
from qwen_longctx.prefill import memory, pipeline, schedule
from qwen_longctx.prefill.pipeline import Pipeline, Stage, Streams, stages_of
from sync_watch import Waits, no_waits

CPU = torch.device("cpu")
GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
ON = {"sparse": "block_scores", "sparse_attention_threshold": 200, "block_size": 32}
BUDGETS = [{str(head): ["vertical_and_slash", 40, 120, 0.5] for head in range(4)}] * 4
SLASH = {**ON, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS}
CHUNK = 96
TOKENS = 500


def four_layers(**config):
    values = {"dual_chunk_attention_config": dict(GEOMETRY), "max_position_embeddings": 256, "num_hidden_layers": 4}
    return tiny_model(dtype=torch.float64, **{**values, **config})


def prompt(tokens=TOKENS, batch=1):
    return torch.randint(1, 90, (batch, tokens), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def stages(monkeypatch):
    """Layers 0, 1 and 2, and 3 are taken for those of three devices, and chunks may be short."""
    found = (Stage(CPU, 0, 1), Stage(CPU, 1, 3), Stage(CPU, 3, 4))
    monkeypatch.setattr(pipelined, "stages_of", lambda layers: found)
    monkeypatch.setattr(pipelined, "why_not", lambda stages, base: "")
    monkeypatch.setattr(schedule, "SHORTEST", 16)
    return found


@torch.no_grad()
def logits(model, ids, cache=None, **kwargs):
    cache = LongContextCache() if cache is None else cache
    return model(ids, past_key_values=cache, **kwargs).logits, cache


def no_hooks(model):
    return not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("rule", [{"sparse": "off"}, ON, SLASH], ids=lambda rule: rule["sparse"])
def test_the_same_as_one_device(rule, stages):
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, pipeline="off", **rule)
    wanted, alone = logits(model, prompt())
    assert "pipeline" not in alone.report()
    patch_qwen(model, prefill_chunk_size=CHUNK, pipeline="equal", **rule)
    found, cache = logits(model, prompt())
    assert torch.equal(found, wanted) and no_hooks(model)
    assert cache.report()["layers"] == alone.report()["layers"]
    report = cache.report()["pipeline"]
    assert report["stages"] == 3 and report["chunks"] == [(i, min(i + CHUNK, TOKENS)) for i in range(0, TOKENS, CHUNK)]
    patch_qwen(model, prefill_chunk_size=CHUNK, **rule)
    (found, cache), (again, _) = logits(model, prompt()), logits(model, prompt())
    chunks = cache.report()["pipeline"]["chunks"]
    assert torch.equal(found, again)
    lengths = [stop - start for start, stop in chunks]
    assert max(lengths) <= CHUNK and lengths != [CHUNK] * 5 + [20]
    if rule["sparse"] == "off":
        torch.testing.assert_close(found, wanted)


def test_every_way_to_call(stages):
    """Padding, labels, picked logits, a base model, a cache that goes on, other caches, and generate."""
    model, plain = four_layers(), four_layers()
    patch_qwen(model, prefill_chunk_size=CHUNK, sparse="off")
    patch_qwen(plain, prefill_chunk_size=CHUNK, sparse="off", pipeline="off")
    ids = prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :130] = 0
    calls = [
        {"attention_mask": mask},
        {"labels": ids},
        {"logits_to_keep": 1},
        {"logits_to_keep": 150},
        {"logits_to_keep": torch.tensor([3, 200, 499])},
        {"past_key_values": DynamicCache()},
        {"past_key_values": LongContextCache(kv_cache="int8"), "attention_mask": mask},
    ]
    for call in calls:
        with torch.no_grad():
            found, wanted = (
                one(ids, **{"past_key_values": LongContextCache(), **copy.deepcopy(call)}) for one in (model, plain)
            )
        torch.testing.assert_close(found.logits, wanted.logits, msg=str(call))
        if "labels" in call:
            torch.testing.assert_close(found.loss, wanted.loss)
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids)[0], plain.model(ids)[0])
        caches = [one(ids[:, :200], use_cache=True).past_key_values for one in (model, plain)]
        ends = [
            one(ids[:, 200:], past_key_values=cache).logits for one, cache in zip((model, plain), caches, strict=True)
        ]
    torch.testing.assert_close(*ends)
    tokens = [one.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for one in (model, plain)]
    assert torch.equal(*tokens)
    unpatch_qwen(model)
    assert no_hooks(model)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 299), max_size=9, unique=True), padded=st.integers(0, 299))
def test_any_cuts_give_the_same_logits(cuts, padded, stages):
    ends = [*sorted(cuts), 300]
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[0, :padded] = 0
    model = patch_qwen(four_layers(), prefill_chunk_size=299, sparse="off")

    class Drawn(schedule.Schedule):
        def _cut(self, start):
            return [stop for stop in ends if stop > start]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "Schedule", Drawn)
        found, cache = logits(model, prompt(300, 2), attention_mask=mask)
    assert [stop for _, stop in cache.report()["pipeline"]["chunks"]] == ends
    patch_qwen(model, prefill_chunk_size=300, sparse="off")
    wanted, _ = logits(model, prompt(300, 2), attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()])


class Log(Streams):
    """Notes what a pipeline asks for. A chunk takes as many seconds on a stage as its number, counted from 1."""

    def __init__(self, stages):
        super().__init__(stages)
        self.notes, self.flying, self.highest, self.marks = [], set(), 0, 0

    def mark(self, stage):
        self.marks += 1
        self.notes.append(("mark", stage, self.marks))
        return self.marks

    def wait(self, mark):
        self.notes.append(("wait", mark))

    def seconds(self, first, last):
        assert first < last
        return 0.5

    def enter(self, stage):
        self.notes.append(("enter", stage))

    def carry(self, stage, move):
        self.notes.append(("carry", stage))
        super().carry(stage, move)
        return len(self.notes)

    def release(self, stage, copied):
        self.notes.append(("release", stage, copied))

    def close(self):
        self.notes.append(("close",))


def test_how_streams_are_used(stages, monkeypatch):
    """A border is crossed once a chunk, sources are kept until then, and no more than four chunks are under way."""
    made = []

    def logged(layers, stages, schedule):
        made.append(Pipeline(layers, stages, schedule, Log(stages)))
        return made[-1]

    monkeypatch.setattr(pipelined, "Pipeline", logged)
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, sparse="off", pipeline="measured")
    logits(model, prompt(900))
    (one,) = made
    notes, chunks = one._streams.notes, one.schedule.chunks
    assert one.most == 4 and len(chunks) > 8
    borders = [note for note in notes if note[0] in ("carry", "enter")]
    assert borders == [("enter", 0), ("carry", 1), ("enter", 1), ("carry", 2), ("enter", 2)] * len(chunks)
    # of the marks of a chunk the last one is waited for, before the chunk four behind it begins
    waits = [note[1] for note in notes if note[0] == "wait"]
    each = 2 * len(stages)
    assert waits == [each * (number + 1) for number in range(len(chunks) - one.most)]
    for number, mark in enumerate(waits):
        assert notes.index(("wait", mark)) < notes.index(("mark", 0, each * (number + one.most) + 1))
    # what was carried out of a stage is kept until the stage has done as much again, or to the end
    carried = [number + 1 for number, note in enumerate(notes) if note[0] == "carry"]
    released = [note[2] for note in notes if note[0] == "release"]
    assert sorted(released) == carried
    assert notes[-1] == ("close",) and one.schedule._seen and all(m.seconds == 1.5 for m in one.schedule._seen)


def test_layers_get_what_was_carried_to_their_device(stages, monkeypatch):
    """Tables are copied once a chunk and border; a layer that got those of another device would wait for it."""
    places = {}

    def moved(device, one):
        if isinstance(one, torch.Tensor):
            result = one.clone()
        else:
            result = copy.copy(one)
            result.tables = copy.copy(one.tables)
            result.tables.keys = type(one.tables.keys)(*(x.clone() for x in one.tables.keys))
            result.tables.queries = {}
            result.tables.queries = {kind: type(t)(*(x.clone() for x in t)) for kind, t in one.tables.queries.items()}
        for x in pipeline._tensors(result):
            places[x.data_ptr()] = x
        return result

    monkeypatch.setattr(pipeline, "_to", moved)
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, sparse="off")
    seen = {number: [] for number in range(4)}
    for number, layer in enumerate(model.model.layers):
        inner = layer.forward

        def forward(hidden, *args, number=number, inner=inner, **kwargs):
            tables = kwargs["dual_chunk"].tables
            given = [*tables.keys, *kwargs["position_embeddings"], *([hidden] if number in (1, 3) else [])]
            seen[number].append([x.data_ptr() in places for x in given])
            return inner(hidden, *args, **kwargs)

        layer.forward = forward
    found, cache = logits(model, prompt())
    assert len(cache.report()["pipeline"]["chunks"]) == len(seen[3]) > 4
    assert not any(any(one) for one in seen[0]) and all(all(one) for number in (1, 2, 3) for one in seen[number])
    monkeypatch.undo()
    for layer in model.model.layers:
        del layer.forward
    torch.testing.assert_close(found, logits(patch_qwen(model, prefill_chunk_size=CHUNK, sparse="off"), prompt())[0])


def test_under_the_hooks_of_accelerate(stages):
    """It finds tensors where they are needed, and moves none itself; patched before dispatch and after it."""
    accelerate = pytest.importorskip("accelerate")
    names = ["embed_tokens", "rotary_emb", "norm", *(f"layers.{number}" for number in range(4))]
    device_map = {**{f"model.{name}": "cpu" for name in names}, "lm_head": "cpu"}
    wanted = logits(patch_qwen(four_layers(), prefill_chunk_size=CHUNK, sparse="off", pipeline="off"), prompt())[0]
    for first in (True, False):
        model = four_layers()
        if first:
            patch_qwen(model, prefill_chunk_size=CHUNK, sparse="off")
        model = accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
        if not first:
            patch_qwen(model, prefill_chunk_size=CHUNK, sparse="off")
        found, cache = logits(model, prompt())
        assert cache.report()["pipeline"]["stages"] == 3 and no_hooks(model)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("aside", [True, False], ids=["on streams of their own", "on the computing ones"])
def test_what_waits_for_what(aside, monkeypatch):
    """No race, and no wait between neighbouring chunks; where copies take the computing streams, there is one."""
    machine = Machine()
    machine.install(monkeypatch)
    devices = [torch.device("cuda", number) for number in range(3)]
    stages = (Stage(devices[0], 0, 1), Stage(devices[1], 1, 3), Stage(devices[2], 3, 4))
    monkeypatch.setattr(pipelined, "stages_of", lambda layers: stages)
    monkeypatch.setattr(pipelined, "why_not", lambda stages, base: "")
    chunk = [0] * 4

    def copied(device, one):
        to = devices.index(device)
        machine.copy(devices[to - 1], device, ("copy", to, chunk[0] - 1, type(one).__name__))
        return one

    monkeypatch.setattr(pipeline, "_to", copied)
    own = lru_cache(lambda device, way: torch.cuda.Stream(device))
    monkeypatch.setattr(pipeline, "_beside", own if aside else lambda device, way: machine.stream_of(device))
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, sparse="off", pipeline="equal")
    for number, layer in enumerate(model.model.layers):
        inner = layer.forward

        def forward(hidden, *args, number=number, inner=inner, **kwargs):
            stage = next(i for i, one in enumerate(stages) if one.first <= number < one.stop)
            machine.work(devices[stage], ("layer", number, chunk[number]))
            chunk[number] += 1
            return inner(hidden, *args, **kwargs)

        layer.forward = forward
    logits(model, prompt(900))
    count = chunk[0]
    assert chunk == [count] * 4 and count == 10
    before = machine.must_precede
    for i in range(count):
        for stage, (last, first) in enumerate([(0, 1), (2, 3)], start=1):
            for kind in ("Tensor", "Layout"):
                copy = "copy", stage, i, kind
                assert before(("layer", last, i), copy) and before(copy, ("layer", first, i))
                # what was carried out of a stage lies in memory that its chunk after the next may take
                assert i + 2 >= count or before(copy, ("layer", last, i + 2))
    # the host is four chunks ahead, and nothing else lets an earlier device wait for a later one
    free = [not before(("layer", 3, i), ("layer", 0, j)) for i in range(count) for j in range(i + 1, min(i + 4, count))]
    assert all(before(("layer", 3, i), ("layer", 0, i + 4)) for i in range(count - 4))
    assert all(free) if aside else not all(free)
    assert not before(("layer", 2, 0), ("layer", 0, 1)) or not aside


@pytest.mark.parametrize(("error", "layer"), [(RuntimeError, 0), (KeyboardInterrupt, 2), (RuntimeError, 3)])
def test_a_failure_in_a_chunk(error, layer, stages):
    """The cache goes back to what it held, no hook stays, and the next call is right."""
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, **ON)
    ids = prompt(400)
    wanted = logits(model, ids[:, 100:], logits(model, ids[:, :100])[1])[0]
    _, cache = logits(model, ids[:, :100])
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("in the third chunk")

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        logits(model, ids[:, 100:], cache)
    handle.remove()
    assert cache.get_seq_length() == 100 and no_hooks(model)
    torch.testing.assert_close(logits(model, ids[:, 100:], cache)[0], wanted, atol=0, rtol=0)


def test_two_threads_on_one_model(stages):
    """Each run moves its own chunks only."""
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, sparse="off")
    prompts = [prompt() + number for number in range(3)]
    wanted = [logits(model, ids)[0] for ids in prompts]
    found = [None] * 3

    def run(number):
        found[number] = logits(model, prompts[number])[0]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)) and no_hooks(model)


# --- nothing waits ------------------------------------------------------------------------------------------------


def in_one_go(q, k, v, *, causal, scale, blocks):
    """Attention over lists that asks no list for its length, as the kernels of GPUs do: stands for them here."""
    batch, heads, tiles, width = blocks.indices.shape
    listed = torch.arange(width) < blocks.counts[..., None]
    at = blocks.indices.long().where(listed, width)
    seen = torch.zeros(batch, heads, tiles, width + 1, dtype=torch.bool).scatter_(3, at, True)[..., :width]
    seen = seen.repeat_interleave(blocks.size, 2)[:, :, : q.shape[1]]
    seen = seen.repeat_interleave(blocks.size, 3)[..., : k.shape[1]]
    if causal:
        last = torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]
        seen = seen & (torch.arange(k.shape[1]) <= last[:, None])
    group = heads // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    return (weights @ values).transpose(1, 2), lse


@pytest.fixture
def watched(monkeypatch):
    """What runs in chunks may not wait; an engine of the GPU stands in for the one that looks at lists."""
    row = engines.ENGINES["reference"]
    monkeypatch.setitem(engines.ENGINES, "reference", row._replace(function=in_one_go))
    whole = causal_lm._in_chunks

    def watching(patched, model, run, labels, logits_to_keep, arguments):
        given = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        with no_waits([*model.parameters(), *model.buffers(), *given]):
            return whole(patched, model, run, labels, logits_to_keep, arguments)

    monkeypatch.setattr(causal_lm, "_in_chunks", watching)


RULES = {
    "dense": {"sparse": "off"},
    "dense, temperature of the prompt": {"sparse": "off", "attention_temperature": True},
    "block scores, steered": ON,
    "block scores, fixed": {**ON, "density": 0.4},
    "block scores, fast": {**ON, "fidelity": "fast"},
    "exact shares": {**ON, "sparse": "exact_shares"},
    "vertical slash": SLASH,
}


@pytest.mark.parametrize(
    ("rule", "kind"), [*((rule, "device") for rule in RULES), ("dense", "dynamic"), ("block scores, fixed", "int8")]
)
def test_nothing_waits_within_a_chunk(rule, kind, watched, monkeypatch):
    """Rows of two lengths over three chunks, and all of their logits; the first chunk finds the budgets."""
    monkeypatch.setattr(pipelined, "stages_of", lambda layers: (Stage(CPU, 0, 1), Stage(CPU, 1, 2)))
    monkeypatch.setattr(pipelined, "why_not", lambda stages, base: "")
    values = {**RULES[rule], **({"sparse_attention_config": BUDGETS[:2]} if rule == "vertical slash" else {})}
    model = patch_qwen(four_layers(num_hidden_layers=2).float(), prefill_chunk_size=128, **values)
    ids = prompt(300, 2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = DynamicCache() if kind == "dynamic" else LongContextCache(kv_cache=kind)
    logits(model, ids, cache, attention_mask=mask)


def test_what_does_wait_is_told(stages, watched):
    """The watch sees what the report names. A copy of an index to a device leaves no trace on the CPU to be seen."""
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK, **SLASH, recall_target=0.8)
    cache = LongContextCache()
    with pytest.raises(Waits):
        logits(model, prompt(), cache)
    assert "vertical_slash with a recall_target" in cache.qwen_longctx.pipeline["waits"][0]
    patch_qwen(model, prefill_chunk_size=CHUNK, sparse="off")
    _, cache = logits(model, prompt(), logits_to_keep=torch.tensor([3, 200]))
    assert cache.report()["pipeline"]["waits"] == ["logits are picked by their numbers"]
    model = tiny_model("qwen3_moe", dual_chunk_attention_config=dict(GEOMETRY), num_hidden_layers=4)
    patch_qwen(model, prefill_chunk_size=CHUNK, sparse="off")
    with pytest.raises(Waits):
        logits(model, prompt(), cache := LongContextCache())
    assert cache.qwen_longctx.pipeline["waits"] == ["experts are chosen on the host"]


def test_the_watch_itself():
    x, host = torch.randn(4), torch.arange(3)
    with no_waits([x]):
        assert int(host[host > 0].sum()) == 3 and (x[1:] + 1).clamp(min=0).shape == (3,)
        y = torch.zeros(4)
        y[1:] = x[1:]
        for wrong in [
            lambda: x.sum().item(),
            lambda: bool((x > 0).any()),
            lambda: x[x > 0],
            lambda: (x > 0).nonzero(),
            lambda: torch.equal(x, x),
            lambda: y.tolist(),
            lambda: x.cpu(),
            lambda: float(y.mean()),
            lambda: torch.tensor([1, 2], device=x.device),
            lambda: x.masked_select(x > 0),
            lambda: x.repeat_interleave((x > 0).long()),
        ]:
            with pytest.raises(Waits):
                wrong()


# --- which devices ------------------------------------------------------------------------------------------------


def on(*devices, norm=None):
    """Layers, and what `why_not` looks at, on devices that need not be there."""
    model = four_layers(num_hidden_layers=len(devices)).model
    for layer, device in zip([*model.layers, model.norm], [*devices, norm or devices[-1]], strict=True):
        layer._hf_hook = type("Hook", (), {"execution_device": device, "offload": False})()
    return model


def test_which_devices_make_a_pipeline():
    first, second = "cuda:0", torch.device("cuda:1")
    model = on(first, first, torch.device(first), second)
    assert stages_of(model.layers) == (Stage(torch.device(first), 0, 3), Stage(second, 3, 4))
    assert pipeline.why_not(stages_of(model.layers), model) == ""
    for devices, norm, why in [
        ((first, "cpu"), None, "layers lie on cpu"),
        ((first, second, first), None, "layers of cuda:0 do not follow one another"),
        ((first, second), first, "the norm behind it on cuda:0"),
    ]:
        model = on(*devices, norm=norm)
        assert why in pipeline.why_not(stages_of(model.layers), model)
    model = on(first, second)
    model.layers[1]._hf_hook.offload = True
    assert "offloaded" in pipeline.why_not(stages_of(model.layers), model)


def test_why_not_is_reported(monkeypatch):
    found = (Stage(CPU, 0, 2), Stage(torch.device("meta"), 2, 4))
    monkeypatch.setattr(pipelined, "stages_of", lambda layers: found)
    model = patch_qwen(four_layers(), prefill_chunk_size=CHUNK)
    _, cache = logits(model, prompt())
    assert cache.report()["pipeline"] == {"stages": 1, "why_not": "layers lie on cpu"}
    patch_qwen(model, prefill_chunk_size=CHUNK, pipeline="off")
    assert "pipeline" not in logits(model, prompt())[1].report()


def test_memory_of_chunks_on_the_way(stages):
    from qwen_longctx.checkpoint import Shape
    from qwen_longctx.config import LongContextConfig

    model = four_layers().model
    config = LongContextConfig.from_model_config(model.config, prefill_chunk_size=CHUNK)
    assert pipelined.chunks_ahead(model, TOKENS, config) == 4 and pipelined.chunks_ahead(model, CHUNK, config) == 0
    need = memory.Need(TOKENS, 2, torch.bfloat16)
    device = memory.Device("cuda:1", 2, 1 << 40)
    one, more = (memory._needed(Shape.of(model.config), device, need._replace(ahead=n), config).total for n in (0, 4))
    # hidden states of both rows, and three tables of cosines and sines of 8 numbers a head
    assert more - one == 4 * CHUNK * (2 * 32 + 3 * 2 * 8) * 2


def test_bad_settings():
    with pytest.raises(ValueError, match="pipeline must be one of auto, equal, measured, off, got 'on'"):
        patch_qwen(four_layers(), pipeline="on")


def test_base_models_of_other_heads(stages):
    """Hidden states of all chunks, without a head for tokens."""
    torch.manual_seed(0)
    whole = four_layers()
    base = Qwen2Model(whole.config).double().eval()
    patch_qwen(base, prefill_chunk_size=CHUNK, sparse="off")
    with torch.no_grad():
        found = base(prompt())[0]
        patch_qwen(base, prefill_chunk_size=CHUNK, sparse="off", pipeline="off")
        torch.testing.assert_close(found, base(prompt())[0])


# --- on GPUs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_model():
    config = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    return tiny_model(dtype=torch.float32, dual_chunk_attention_config=dict(GEOMETRY), **config)


def mapped(model, second):
    accelerate = pytest.importorskip("accelerate")
    places = {f"model.layers.{number}": 0 if number < 2 else second for number in range(4)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": second, "lm_head": second}
    return accelerate.dispatch_model(model, {**places, **ends}, main_device=0)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [{"sparse": "off"}, {**ON, "block_size": 64}], ids=["dense", "sparse"])
def test_on_two_gpus(rule, gpu_model, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    monkeypatch.setattr(schedule, "SHORTEST", 16)
    ids = prompt(2000).cuda()
    wanted, _ = logits(patch_qwen(copy.deepcopy(gpu_model).cuda(), prefill_chunk_size=256, **rule), ids)
    model = patch_qwen(mapped(gpu_model, 1), prefill_chunk_size=256, pipeline="equal", **rule)
    for _ in range(3):  # races show now and then
        found, cache = logits(model, ids)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert cache.report()["pipeline"]["stages"] == 2 and cache.report()["pipeline"]["waits"] == []
    found = []
    for way in ("measured", "off"):
        patch_qwen(model, prefill_chunk_size=256, pipeline=way, sparse="off")
        found.append(logits(model, ids)[0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [{"sparse": "off"}, {**ON, "block_size": 64}], ids=["dense", "sparse"])
def test_on_streams_of_one_gpu(rule, gpu_model, monkeypatch):
    """Stages compute on streams of their own, and may be late: every wait that is needed is asked for."""
    model = gpu_model.cuda()
    ids = prompt(2000).cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    wanted, _ = logits(patch_qwen(model, prefill_chunk_size=256, pipeline="off", **rule), ids)
    patch_qwen(model, prefill_chunk_size=256, pipeline="equal", **rule)
    monkeypatch.setattr(pipelined, "stages_of", lambda layers: (Stage(device, 0, 2), Stage(device, 2, 4)))
    monkeypatch.setattr(pipelined, "why_not", lambda stages, base: "")
    for _ in range(3):
        before = torch.cuda.current_stream()
        found, cache = logits(model, ids)
        assert torch.cuda.current_stream() == before
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert cache.report()["pipeline"]["stages"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [r for r in RULES if r != "exact shares"])
@pytest.mark.parametrize("kind", ["device", "int8", "host"])
def test_pytorch_sees_no_wait(rule, kind, gpu_model, monkeypatch):
    """As `test_nothing_waits_within_a_chunk`, told by PyTorch; the first prompt compiles, which may wait."""
    values = {**RULES[rule], **({"block_size": 64} if RULES[rule]["sparse"] != "off" else {})}
    model = patch_qwen(gpu_model.cuda(), prefill_chunk_size=CHUNK, **values)
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(pipelined, "stages_of", lambda layers: (Stage(device, 0, 2), Stage(device, 2, 4)))
    monkeypatch.setattr(pipelined, "why_not", lambda stages, base: "")
    whole = causal_lm._in_chunks

    def watching(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return whole(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    ids = prompt(600, 2).cuda()
    mask = torch.ones_like(ids)
    mask[1, :150] = 0
    logits(model, ids, LongContextCache(kv_cache=kind), attention_mask=mask, logits_to_keep=1)
    monkeypatch.setattr(causal_lm, "_in_chunks", watching)
    logits(model, ids, LongContextCache(kv_cache=kind), attention_mask=mask, logits_to_keep=1)
