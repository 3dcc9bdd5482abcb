"""Decoding as a captured graph: the same tokens and logits as without, and no graph where it could be wrong.

On the CPU a graph is a tape of operations, noted while the forward runs and repeated on the same tensors. Like a CUDA
graph it knows nothing of Python: whatever the host worked out while it was captured stays as it was.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, patch_qwen, patched_qwen, unpatch_qwen
from qwen_longctx.attention import choice
from qwen_longctx.bench.shapes import random_model
from qwen_longctx.geometry import layout as layouts
from qwen_longctx.kv import store
from qwen_longctx.ops import fp8
from qwen_longctx.patches import graphs
from qwen_longctx.patches.linear import Fp8Linear
from qwen_longctx.patches.method import cache_argument

NEW = 60  # enough to cross chunks of 48
PAD = 0


class Tape(TorchDispatchMode):
    """Operations in order, which `replay` repeats: every tensor that one of them made is the new one then."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.replays = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self, most=None):
        self.replays += 1
        made = {}

        def now(x):
            return made.get(id(x), x)

        for operation, args, kwargs, before in self.operations[:most]:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            after = operation(*args, **kwargs)
            pairs = zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (before, after)), strict=True)
            made.update({id(old): new for old, new in pairs if isinstance(old, torch.Tensor)})
        if most is None:  # what a forward returns is its last operation's, at the address that was captured
            last = self.operations[-1][3]
            last.copy_(made[id(last)])


@pytest.fixture
def tapes(monkeypatch):
    """Decoding is captured on the CPU. The tapes of a test, in order."""
    made = []

    def capture(forward, device):
        tape = Tape()
        with tape:
            forward()
        made.append(tape)
        return tape

    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(layouts, "why_not", one_pass)
    return made


def one_pass(setting, device, dtype, head_dim, tokens):
    return "" if setting == "auto" and tokens <= 8 and dtype != torch.float64 else "asked not to"


def prompt(tokens, batch=1, seed=5):
    return torch.randint(1, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **kwargs):
    """Ids and logits of every token."""
    arguments = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "return_dict_in_generate": True,
        "output_logits": True,
        **kwargs,
    }
    out = model.generate(ids, **arguments)
    return out.sequences, torch.stack(out.logits)


def both(ids, tapes, family="qwen2", settings=None, model=None, **kwargs):
    """The same with and without graphs; the tapes of the first."""
    model = model or tiny_model(family)
    outs = []
    for wanted in (False, True):
        assert not tapes
        with patched_qwen(model, cuda_graphs=wanted, **(settings or {})):
            given = {name: value() if callable(value) else value for name, value in kwargs.items()}
            outs.append(generate(model, ids, **given))
    assert torch.equal(outs[0][0], outs[1][0])
    torch.testing.assert_close(outs[1][1], outs[0][1], rtol=1e-4, atol=1e-5)
    return outs[1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tokens", [1, 30, 47, 48, 90, 300])
def test_same_as_without(tapes, family, tokens):
    both(prompt(tokens), tapes, family)
    assert len(tapes) == 1 and tapes[0].replays > NEW - 8


KINDS = {
    "int8": {"kv_cache": "int8"},
    "fp8": {"kv_cache": "fp8"},
    "sparse": {"sparse_decode": 0.5, "sparse_decode_threshold": 1},
    "int8, sparse": {"kv_cache": "int8", "sparse_decode": 0.5, "sparse_decode_threshold": 1},
}
FEW = {"max_new_tokens": 30, "min_new_tokens": 30}  # enough to complete a mean of keys


@pytest.fixture
def kind(request, short):
    """Settings of sparse decode, of caches in 8 bits, or of both, as a test asks for by name."""
    return KINDS[getattr(request, "param", "int8, sparse")]


@pytest.fixture
def short(monkeypatch):
    """Sparse decode begins at 128 keys; the number of blocks changes every 128."""
    monkeypatch.setattr(choice, "LEAST", 128)
    monkeypatch.setattr(choice, "NEWEST", 40)
    monkeypatch.setattr(choice, "_STEP", 128)


def biased(family="qwen2", **config):
    """A model whose keys have a bias that 8 bits could not hold beside the rest."""
    model = tiny_model(family, **config)
    with torch.no_grad():
        for layer in model.model.layers if family == "qwen2" else ():
            layer.self_attn.k_proj.bias.copy_(20 * torch.randn(layer.self_attn.k_proj.bias.shape))
    return model


@pytest.mark.parametrize(
    ("kind", "family"),
    [("int8", "qwen2"), ("fp8", "qwen3"), ("sparse", "qwen2"), ("int8, sparse", "qwen2")],
    indirect=["kind"],
)
def test_kinds_across_chunks_and_blocks_kept(tapes, kind, family):
    """The sequence crosses a chunk at 384, where another number of blocks is kept."""
    assert choice.blocks_kept(0.5, 384) == 3 and choice.blocks_kept(0.5, 385) == 4
    both(prompt(345), tapes, model=biased(family), settings=kind)
    assert len(tapes) == (2 if "sparse_decode" in kind else 1) and sum(tape.replays for tape in tapes) > NEW - 14


def test_sparse_decode_begins_in_mid_sequence(tapes, short):
    """All keys up to 128; then another graph."""
    both(prompt(115), tapes, settings={"sparse_decode": 0.1, "sparse_decode_threshold": 1}, **FEW)
    assert len(tapes) == 2 and all(tape.replays > 5 for tape in tapes)


def test_sparse_decode_begins_beyond_its_threshold(tapes, short):
    """As above, by the setting: the number of keys that are kept would leave some out from 129 on."""
    both(prompt(135), tapes, settings={"sparse_decode": 0.1, "sparse_decode_threshold": 148}, **FEW)
    assert len(tapes) == 2 and all(tape.replays > 5 for tape in tapes)


def test_kinds_with_rows_and_left_padding(tapes, kind):
    ids = prompt(200, 3)
    mask = torch.ones_like(ids)
    mask[0, :90], mask[1, :37] = 0, 0
    both(ids, tapes, model=biased(), settings=kind, attention_mask=mask, **FEW)
    assert len(tapes) == 1 and tapes[0].replays > 22


@pytest.mark.parametrize("kind", ["sparse", "int8, sparse"], indirect=True)
def test_kinds_with_beams(tapes, kind):
    ids = prompt(150, 2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    both(ids, tapes, model=biased(), settings=kind, attention_mask=mask, num_beams=3, **FEW)
    assert len(tapes) == 1 and tapes[0].replays > 22


def test_kinds_with_drafts(tapes, kind):
    """Steps of several tokens come between those of one."""
    ids = prompt(200)
    ids[:, 100:180] = ids[:, :80]
    both(ids, tapes, model=biased(), settings=kind, prompt_lookup_num_tokens=3, eos_token_id=96, **FEW)


def test_kinds_with_growth(tapes, kind, monkeypatch):
    """The buffer of means grows with those of keys."""
    monkeypatch.setattr(store, "STEP", 100)
    monkeypatch.setattr(store, "_SMALLEST", 100)
    cache = cache_argument(lambda: LongContextCache(160, kv_cache="int8"))
    both(prompt(145), tapes, model=biased(), settings=kind, **FEW, **cache)
    assert len(tapes) == 2 and all(tape.replays > 5 for tape in tapes)


def test_kinds_in_turns_that_are_cropped(tapes, kind):
    """Caches hold the same after each turn, means of keys among it; a turn without sparse decode comes between."""
    model, texts = biased(), [prompt(230)] * 2
    caches = [LongContextCache(600, kv_cache="int8") for _ in texts]
    for turn, settings in enumerate((kind, {**kind, "sparse_decode": None}, kind)):
        for number, wanted in enumerate((False, True)):
            patch_qwen(model, cuda_graphs=wanted, **settings)
            ids, _ = generate(
                model, texts[number], max_new_tokens=20, min_new_tokens=20, **cache_argument(caches[number])
            )
            caches[number].crop(-7)
            texts[number] = torch.cat((ids[:, :-6], prompt(9, seed=turn)), 1)
        assert torch.equal(*texts) and len(tapes) > turn
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(one.keys, other.keys)
            torch.testing.assert_close(one.values, other.values)
            torch.testing.assert_close(one.store.key_means(32), other.store.key_means(32))


def test_linear_layers_in_8_bits_beside_a_cache_in_8_bits_and_sparse_decode(tapes, short, monkeypatch):
    monkeypatch.setattr(fp8, "why_not", lambda device: "")
    settings = {"linear": "fp8", **KINDS["int8, sparse"]}
    model = biased(dtype=torch.bfloat16, head_dim=16, hidden_size=64, intermediate_size=96)
    out, _ = both(prompt(200), tapes, model=model, settings=settings, **FEW)
    assert len(tapes) == 1 and tapes[0].replays > 22
    with patched_qwen(model, **settings):
        assert type(model.model.layers[0].self_attn.q_proj) is Fp8Linear
    with patched_qwen(model, cuda_graphs=False):
        assert not torch.equal(out, generate(model, prompt(200), **FEW)[0])  # or the test tells nothing


@pytest.mark.parametrize("temperature", [True, False, "position"])
def test_temperature(tapes, temperature):
    both(prompt(100), tapes, settings={"attention_temperature": temperature, "original_max_position_embeddings": 8})
    assert len(tapes) == 1


@pytest.mark.parametrize("batch", [2, 5])
def test_batch(tapes, batch):
    both(prompt(100, batch), tapes)
    assert len(tapes) == 1


@pytest.mark.parametrize("padding", [[1, 0], [60, 3], [40, 40]])
def test_left_padding(tapes, padding):
    ids = prompt(130, 2)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    both(ids, tapes, attention_mask=mask)
    assert len(tapes) == 1 and tapes[0].replays > NEW - 8


@pytest.mark.parametrize("padding", [0, 20])
def test_beams(tapes, padding):
    """Rows are reordered within their buffers, whose addresses the graph knows."""
    ids = prompt(100, 2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    model = tiny_model("qwen2")
    how = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "do_sample": False}
    outs = []
    for wanted in (False, True):
        with patched_qwen(model, cuda_graphs=wanted):
            outs.append(model.generate(ids, min_new_tokens=NEW, **how))
    assert torch.equal(*outs)
    assert len(tapes) == 1 and tapes[0].replays > NEW - 8


def test_beams_beyond_what_is_copied_in_place(tapes, monkeypatch):
    monkeypatch.setattr(store, "_IN_PLACE", 0)
    ids = prompt(100, 2)
    model = patch_qwen(tiny_model("qwen2"))
    out = model.generate(ids, num_beams=3, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    monkeypatch.undo()
    with patched_qwen(model, cuda_graphs=False):
        assert torch.equal(
            out, model.generate(ids, num_beams=3, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        )


def test_growth(tapes, monkeypatch):
    """A buffer that is full grows without a graph, and another one is captured."""
    monkeypatch.setattr(store, "STEP", 20)
    monkeypatch.setattr(store, "_SMALLEST", 20)
    both(prompt(100), tapes, **cache_argument(lambda: LongContextCache(110)))
    assert len(tapes) >= 2 and all(tape.replays for tape in tapes[:-1])


def test_cache_is_continued_and_cropped(tapes):
    """Every turn captures anew, and the cache holds the same as without graphs after each."""
    model = tiny_model("qwen2")
    caches = []
    for wanted in (False, True):
        patch_qwen(model, cuda_graphs=wanted)
        cache = LongContextCache(600)
        ids = prompt(100)
        for turn in range(3):
            ids, _ = generate(model, ids, **cache_argument(cache))
            cache.crop(-7)
            ids = torch.cat((ids[:, :-6], prompt(9, seed=turn)), 1)
        caches.append(cache)
    assert len(tapes) == 3
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
        torch.testing.assert_close(one.store.key_means(8), other.store.key_means(8))


def test_inference_mode(tapes):
    ids = prompt(100)
    model = patch_qwen(tiny_model("qwen2"))
    plain = generate(model, ids)
    with torch.inference_mode():
        watched = generate(model, ids)
    assert torch.equal(plain[0], watched[0]) and len(tapes) == 2


def test_outputs_stay_what_they_were(tapes, monkeypatch):
    """The next token is written where the graph wrote this one; whoever kept its hidden state has a copy."""
    kept, repeat = [], graphs._Token.repeat

    def watched(self, *args):
        kept.append(repeat(self, *args).last_hidden_state)
        kept.append(kept[-1].clone())
        return repeat(self, *args)

    monkeypatch.setattr(graphs._Token, "repeat", watched)
    generate(patch_qwen(tiny_model("qwen2")), prompt(100))
    assert len(kept) > 60 and all(torch.equal(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))
    assert not torch.equal(kept[0], kept[2])


class Meddler(LogitsProcessor):
    """Does something at some token of a generate."""

    def __init__(self, at, action):
        self.at, self.action, self.calls = at, action, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return scores


def meddled(model, ids, action, at=20):
    return generate(model, ids, logits_processor=LogitsProcessorList([Meddler(at, action)]))


CHANGES = {
    "a weight in place": lambda layer: layer.mlp.up_proj.weight.data.mul_(1.5),
    "a weight": lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data * 1.5),
    "a parameter": lambda layer: setattr(
        layer.mlp.up_proj, "weight", torch.nn.Parameter(layer.mlp.up_proj.weight.detach() * 1.5)
    ),
    "a module": lambda layer: setattr(layer.mlp, "up_proj", copy.deepcopy(layer.mlp.down_proj.__class__(32, 64))),
    "a hook": lambda layer: layer.mlp.register_forward_hook(lambda module, args, out: 1.5 * out),
    "a pre-hook": lambda layer: layer.mlp.register_forward_pre_hook(lambda module, args: (1.5 * args[0],)),
    "a forward": lambda layer: setattr(layer.mlp, "forward", lambda x: 1.5 * x),
    "a foreign module": lambda layer: setattr(layer, "mlp", Foreign()),
}


class Foreign(torch.nn.Module):
    """Remembers what Python did, which a graph would not repeat."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return x * self.calls


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_take_effect_at_once(tapes, change):
    ids = prompt(100)
    outs = []
    for wanted in (False, True):
        model = patch_qwen(tiny_model("qwen2"), cuda_graphs=wanted)
        torch.manual_seed(1)
        outs.append(meddled(model, ids, lambda model=model: CHANGES[change](model.model.layers[1])))
    torch.testing.assert_close(outs[1][1], outs[0][1], rtol=1e-4, atol=1e-5)
    assert tapes[0].replays > 5
    unchanged = generate(patch_qwen(tiny_model("qwen2")), ids)
    assert not torch.allclose(outs[1][1], unchanged[1])  # or the test tells nothing


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.endswith("moe")])
def test_experts_are_not_captured(tapes, family):
    both(prompt(60), tapes, family)
    assert not tapes


def test_few_tokens_are_not_captured(tapes):
    both(prompt(60), tapes, max_new_tokens=graphs.FEWEST_TOKENS - 1, min_new_tokens=0)
    assert not tapes


@pytest.mark.parametrize(
    "why",
    [
        {"output_hidden_states": True},
        {"past_key_values": DynamicCache},
        {"use_cache": False},
        {"settings": {"kernel": "sdpa"}},
    ],
    ids=lambda why: next(iter(why)),
)
def test_not_captured(tapes, why):
    if "past_key_values" in why:
        why = cache_argument(why["past_key_values"])
    both(prompt(60), tapes, **why)
    assert not tapes


def test_hidden_states_asked_for_once_do_not_end_captures(tapes):
    """Transformers leaves hooks behind, which do nothing later."""
    model = patch_qwen(tiny_model("qwen2"))
    with torch.no_grad():
        model(prompt(20), output_hidden_states=True)
    generate(model, prompt(60))
    assert len(tapes) == 1


def test_training_autocast_and_dispatch_modes_are_not_captured(tapes):
    model = patch_qwen(tiny_model("qwen2"))
    ids = prompt(60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, ids)
    with Tape():
        generate(model, ids)
    model.train()
    generate(model, ids)
    assert not tapes


def test_loops_of_the_caller_are_not_captured(tapes):
    model, cache = patch_qwen(tiny_model("qwen2")), LongContextCache(200)
    with torch.no_grad():
        model(prompt(50), use_cache=True, **cache_argument(cache))
        for _ in range(20):
            model(prompt(1), use_cache=True, **cache_argument(cache))
    assert not tapes


def test_peft_is_not_captured_and_adapters_switch(tapes):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        patch_qwen(tiny_model("qwen2")), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    out = generate(model, prompt(60))
    with model.disable_adapter():
        assert not torch.equal(out[1], generate(model, prompt(60))[1])
    assert not tapes


def test_memory_goes_with_the_generate(tapes, monkeypatch):
    """No cycle keeps what was captured, or the cache."""
    model, cache = patch_qwen(tiny_model("qwen2")), LongContextCache(300)
    made = []
    init = graphs._Token.__init__
    monkeypatch.setattr(
        graphs._Token, "__init__", lambda self, *args: (made.append(weakref.ref(self)), init(self, *args))[1]
    )
    gc.collect()
    gc.disable()
    try:
        generate(model, prompt(100), **cache_argument(cache))
        tapes.clear()  # a tape keeps tensors, as no CUDA graph does
        assert made and made[0]() is None
        assert cache.qwen_longctx.graphs is None
    finally:
        gc.enable()


def test_copies_and_pickles_capture_for_themselves():
    state = LongContextCache().qwen_longctx
    state.graphs = graphs.Decoding()
    state.graphs._token = threading.Lock()  # can be neither copied nor pickled
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert twin.graphs._token is None


def test_a_failed_capture_leaves_everything_usable(tapes, monkeypatch, caplog):
    ids = prompt(100)
    model = patch_qwen(tiny_model("qwen2"), cuda_graphs=False)
    wanted = generate(model, ids)
    patch_qwen(model)
    calls = []

    def capture(forward, device):
        calls.append(1)
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(fail)
        try:
            forward()
        finally:
            model.model.layers[1].self_attn.q_proj._forward_pre_hooks.clear()

    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    with caplog.at_level(logging.WARNING):
        out = generate(model, ids)
    assert len(calls) == 1 and [record.message for record in caplog.records if "not permitted" in record.message] != []
    assert sum("CUDA graph" in record.message for record in caplog.records) == 1
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1])


@pytest.mark.parametrize("when", ["before", "after", "within"])
def test_interrupted_in_mid_token(tapes, monkeypatch, when):
    """The cache is as before the token, and a new generate goes on from there."""
    ids = prompt(100)
    model = patch_qwen(tiny_model("qwen2"))
    wanted, _ = generate(model, ids)
    tapes.clear()
    replay, cache = Tape.replay, LongContextCache(400)

    def interrupted(self):
        if self.replays == 20:
            replay(self, {"before": 0, "within": len(self.operations) // 2, "after": None}[when])
            raise KeyboardInterrupt
        replay(self)

    monkeypatch.setattr(Tape, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, **cache_argument(cache))
    held = cache.get_seq_length()
    assert {layer.get_seq_length() for layer in cache.layers} == {held} and 100 < held < 100 + NEW
    assert cache.qwen_longctx.length == held and cache.qwen_longctx.graphs is None
    monkeypatch.setattr(Tape, "replay", replay)
    again = wanted[:, : held + 1]
    out, _ = generate(model, again, max_new_tokens=NEW - (held - 99), min_new_tokens=0, **cache_argument(cache))
    assert torch.equal(out, wanted)


def test_settings_are_those_of_the_generate(tapes):
    model, ids = patch_qwen(tiny_model("qwen2"), original_max_position_embeddings=8), prompt(100)
    one = generate(model, ids)
    patch_qwen(model, attention_temperature=False)
    other = generate(model, ids)
    assert len(tapes) == 2 and not torch.equal(one[1], other[1])
    unpatch_qwen(model)
    stock = generate(model, ids)
    assert len(tapes) == 2 and not torch.equal(stock[1], other[1])


def test_other_threads_keep_it_from_being_captured(tapes):
    model, ids = patch_qwen(tiny_model("qwen2")), prompt(60)
    inside, leave = threading.Event(), threading.Event()

    def wait():
        inside.set()
        leave.wait(60)

    other = threading.Thread(target=meddled, args=(model, ids, wait, 1))
    other.start()
    inside.wait(60)
    try:
        generate(model, ids)
        assert not tapes
    finally:
        leave.set()
        other.join()


@pytest.mark.parametrize("value", [1, None, "auto", "on"])
def test_setting(value):
    with pytest.raises(TypeError, match="cuda_graphs"):
        LongContextConfig(64, 16, 64, cuda_graphs=value)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
def test_cuda(family, how, monkeypatch):
    """Real graphs: captured once, same tokens, memory given back."""
    captured = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: (captured.append(1), capture(*args))[1])
    model = tiny_model(family, head_dim=16).cuda()
    ids = prompt(130, 2).cuda()
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **how}
    outs = []
    for wanted in (False, True):
        torch.manual_seed(3)
        with patched_qwen(model, cuda_graphs=wanted):
            outs.append(model.generate(ids, **arguments))
    assert torch.equal(*outs) and len(captured) == 1
    free = []
    for _ in range(40):  # more than there are streams to capture on
        with patched_qwen(model):
            model.generate(ids, **arguments)
        torch.cuda.empty_cache()
        free.append(torch.cuda.memory_reserved())
    assert free[-1] <= free[4], free


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_cuda_kinds(kind, how, monkeypatch):
    """Real graphs, across a chunk and a step of the blocks kept, with padding: the tokens of without."""
    captured = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: (captured.append(1), capture(*args))[1])
    model = biased(head_dim=16).cuda()
    ids = prompt(345, 2).cuda()
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **how}
    outs = []
    for wanted in (False, True):
        with patched_qwen(model, cuda_graphs=wanted, **kind):
            outs.append(model.generate(ids, **arguments))
    assert torch.equal(*outs) and len(captured) == (2 if "sparse_decode" in kind else 1)


@pytest.mark.gpu
def test_cuda_all_in_8_bits_and_sparse(short, monkeypatch):
    """Linear layers and cache in 8 bits and sparse decode together are captured."""
    captured = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: (captured.append(1), capture(*args))[1])
    model = biased(dtype=torch.bfloat16, head_dim=32, hidden_size=128, intermediate_size=256).cuda()
    ids = prompt(200).cuda()
    with patched_qwen(model, linear="fp8", **KINDS["int8, sparse"]):
        generate(model, ids, **FEW)
    assert captured == [1]


@pytest.mark.gpu
def test_cuda_capture_that_fails(monkeypatch, caplog):
    """A wait for the device in mid-capture: told once, and CUDA, its memory and its random numbers go on."""
    model, ids = patch_qwen(tiny_model("qwen2", head_dim=16).cuda()), prompt(100).cuda()
    wanted, _ = generate(model, ids)
    capture = graphs.capture

    def failing(forward, device):
        def waits():
            forward()
            torch.ones(1, device=device).item()

        return capture(waits, device)

    monkeypatch.setattr(graphs, "capture", failing)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, ids)[0], wanted)
    assert sum("CUDA graph" in record.message for record in caplog.records) == 1
    monkeypatch.undo()
    assert torch.rand(3, device="cuda").isfinite().all()
    assert torch.equal(generate(model, ids)[0], wanted)
    generate(model, ids, do_sample=True)


@pytest.mark.gpu
def test_cuda_threads():
    """Two threads generate at once with one model; sampling draws on the generator that captures touch."""
    model, ids = patch_qwen(tiny_model("qwen2", head_dim=16).cuda()), prompt(100).cuda()
    wanted, _ = generate(model, ids)
    found, errors = [], []

    def work():
        try:
            for _ in range(5):
                found.append(torch.equal(generate(model, ids)[0], wanted))
                generate(model, ids, do_sample=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(found)


@pytest.mark.gpu
def test_cuda_qwen_7b():
    """The shape that the figures are of, in bf16: as near to float32 as without graphs, for tokens that are the same.

    Random weights have ties, and what follows a tie differs; the logits of the tie itself are of the same tokens.
    """
    model = random_model(torch.device("cuda"), tiny=False)
    ids = torch.randint(1, model.config.vocab_size, (1, 4096), device="cuda")
    results = []
    for wanted in (False, True):
        with patched_qwen(model, cuda_graphs=wanted):
            results.append(generate(model, ids, max_new_tokens=24, min_new_tokens=24))
    (tokens, _), (others, _) = results
    same = next((n for n in range(24) if tokens[0, 4096 + n] != others[0, 4096 + n]), 23)
    assert same > 4  # the fifth is the first that runs as a graph does
    with torch.no_grad(), patched_qwen(model.float()):
        exact = model(tokens[:, : 4096 + same], logits_to_keep=same + 1).logits[0]
    plain, graphed = ((logits[: same + 1, 0].float() - exact).square().mean(-1).sqrt() for _, logits in results)
    assert graphed.max() <= 2 * plain.mean() and graphed.mean() <= 1.25 * plain.mean()
