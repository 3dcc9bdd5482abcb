"""Everything that generate offers, on prompts that reach all three kinds of segments, prefilled in chunks."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.errors import InvalidValue

CHUNK = 23
NEW = 12


def prompt(tokens, batch=1, seed=5):
    return torch.randint(1, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    return patch_qwen(tiny_model("qwen2", dtype=torch.float64), prefill_chunk_size=CHUNK)


def generate(model, ids, **kwargs):
    arguments = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **kwargs}
    return model.generate(ids, **arguments)


@torch.no_grad()
def by_hand(model, ids, new=NEW):
    """Greedy decoding with a full forward of the prefix cached at the prompt's temperature."""
    cache = LongContextCache()
    logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    for _ in range(new):
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        logits = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family):
    model = patch_qwen(tiny_model(family, dtype=torch.float64), prefill_chunk_size=CHUNK)
    ids = prompt(170)
    assert torch.equal(generate(model, ids), by_hand(model, ids))


def test_the_patch_changes_what_is_generated():
    ids = prompt(250)
    stock = tiny_model("qwen2", dtype=torch.float64)
    assert not torch.equal(generate(stock, ids, max_new_tokens=40), by_hand(patch_qwen(stock), ids, 40))


def test_chunks_do_not_change_the_tokens(model):
    ids = prompt(200)
    chunked = generate(model, ids)
    with patched_qwen(model):
        assert torch.equal(generate(model, ids), chunked)


def test_sampling(model):
    ids = prompt(170)
    outs = []
    for size in (CHUNK, 1000):
        torch.manual_seed(11)
        with patched_qwen(model, prefill_chunk_size=size):
            outs.append(generate(model, ids, do_sample=True, top_k=20))
    assert torch.equal(*outs)


def test_beams(model):
    ids = prompt(170, batch=2)
    outs = []
    for size in (CHUNK, 1000):
        with patched_qwen(model, prefill_chunk_size=size):
            outs.append(generate(model, ids, num_beams=3, num_return_sequences=2))
    assert outs[0].shape[0] == 4 and torch.equal(*outs)
    dynamic = generate(model, ids, num_beams=3, num_return_sequences=2, past_key_values=DynamicCache())
    assert torch.equal(outs[0], dynamic)


@pytest.mark.parametrize("tokens", [40, 170, 230])
def test_prompt_lookup_is_greedy(model, tokens):
    ids = prompt(tokens // 2).repeat(1, 2)
    found = generate(model, ids, prompt_lookup_num_tokens=4, eos_token_id=0)  # old transformers wants an end token
    # transformers 4.57, patched or not, takes candidates beyond max_new_tokens
    assert torch.equal(found[:, : ids.shape[1] + NEW], generate(model, ids, eos_token_id=0))


@pytest.mark.parametrize("assistant_patched", [False, True])
def test_assisted_is_greedy(model, assistant_patched):
    assistant = tiny_model("qwen2", dtype=torch.float64, num_hidden_layers=1)
    if assistant_patched:
        patch_qwen(assistant, prefill_chunk_size=CHUNK)
    ids = prompt(190)
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


def test_inputs_embeds(model):
    ids = prompt(170)
    embeds = model.get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, generate(model, ids)[:, 170:])


@pytest.mark.parametrize("padding", [1, 30, 100, 150])
def test_left_padded_rows_are_the_rows_alone(model, padding):
    """Padding of less and of more than a chunk; the long row keeps its own positions."""
    ids = prompt(200, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    out = generate(model, ids, attention_mask=mask)
    assert torch.equal(out[:1, 200:], generate(model, ids[:1, padding:])[:, 200 - padding :])
    assert torch.equal(out[1:], generate(model, ids[1:]))


def test_streamer_and_pipeline(model, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    from tokenizers import pre_tokenizers

    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0")
    ids = prompt(170)
    text = " ".join(f"w{i}" for i in ids[0].tolist())
    wanted = generate(model, ids)[0, 170:].tolist()
    generate(model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    streamed = capsys.readouterr().out.split()
    assert streamed == [f"w{i}" for i in wanted]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipe(text, max_new_tokens=NEW, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert found.split() == [f"w{i}" for i in wanted]


def test_a_filled_cache_is_continued(model):
    """Two turns of a chat: the second prefill starts from the first one's cache."""
    with patched_qwen(model, attention_temperature=False, prefill_chunk_size=CHUNK):
        first = generate(model, prompt(90), return_dict_in_generate=True)
        turn = torch.cat((first.sequences, prompt(70, seed=6)), 1)
        out = generate(model, turn, past_key_values=first.past_key_values)
        assert torch.equal(out, generate(model, turn))


@pytest.mark.parametrize("cache", [DynamicCache, LongContextCache, lambda: LongContextCache(3)])
def test_any_dynamic_cache(model, cache):
    ids = prompt(170)
    assert torch.equal(generate(model, ids, past_key_values=cache()), generate(model, ids))


def test_without_a_cache(model):
    ids = prompt(120)
    with patched_qwen(model, attention_temperature=False, prefill_chunk_size=CHUNK):
        assert torch.equal(
            generate(model, ids, use_cache=False, max_new_tokens=4), generate(model, ids, max_new_tokens=4)
        )


def test_static_cache_within_one_chunk(model):
    ids = prompt(30)
    stock = generate(model, ids)
    assert torch.equal(generate(model, ids, cache_implementation="static"), stock)


def test_static_cache_beyond_one_chunk_is_refused(model):
    with pytest.raises(NotImplementedError, match="cache_implementation='static' holds one chunk of 48 tokens"):
        generate(model, prompt(100), cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=200)
    with pytest.raises(NotImplementedError, match="a static cache holds one chunk of 48 tokens at most"):
        generate(model, prompt(100), past_key_values=cache)


def test_paged_cache_is_refused(model):
    class PagedAttentionCache:
        """Stands for the class of transformers' continuous batching."""

    with pytest.raises(NotImplementedError, match="PagedAttentionCache, the cache of generate_batch"):
        generate(model, prompt(100), past_key_values=PagedAttentionCache())
    with pytest.raises(NotImplementedError, match=r"cache_implementation='paged' \(continuous batching\)"):
        generate(model, prompt(100), cache_implementation="paged")


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_of_the_whole_text_beside_a_filled_cache(model, make, masked):
    """As in stock transformers the embeddings are those of the cached tokens too; others are refused."""
    ids, cache = prompt(170), make()
    embeddings = model.get_input_embeddings()(ids)
    wanted = generate(model, ids)[:, 170:]
    given = {"max_new_tokens": NEW, "do_sample": False, "past_key_values": cache}
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
    with pytest.raises(InvalidValue, match="inputs_embeds hold 70 tokens, the cache 100: .* of the whole text"):
        model.generate(inputs_embeds=embeddings[:, 100:], **mask, **given)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **mask, **given), wanted)


@pytest.mark.parametrize("make", [lambda: None, DynamicCache, LongContextCache])
def test_prefill_chunks_of_transformers(model, make):
    """The option `prefill_chunk_size` of generate cuts the prompt outside of the model."""
    ids = prompt(170, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :90] = 0
    wanted = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=31, past_key_values=make()), wanted)


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
def test_loops_of_others(model, make):
    """What a custom generation loop does with a cache: rows repeated and selected, the last token taken back."""
    ids, candidates, last = prompt(170), prompt(4, seed=8).T, prompt(1, seed=9)

    def contrast(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache = make()
        model(input_ids, past_key_values=cache)
        cache.batch_repeat_interleave(4)
        tried = model(candidates, past_key_values=cache).logits
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([2]))
        return tried, model(last, past_key_values=cache).logits

    tried, found = model.generate(ids, custom_generate=contrast, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        texts = torch.cat((ids.expand(4, -1), candidates), 1)
        torch.testing.assert_close(tried, model(texts).logits[:, -1:])
        torch.testing.assert_close(found, model(torch.cat((ids, last), 1)).logits[:, -1:])


@pytest.mark.parametrize("limit", [{"max_length": 10**6}, {"max_new_tokens": 10**6}])
def test_a_static_cache_is_judged_by_the_whole_run(limit):
    """By all tokens that may come, not by those for which a cache that grows takes room at first."""
    geometry = {"chunk_size": 1 << 18, "local_size": 1 << 13}
    model = patch_qwen(tiny_model("qwen2"), **geometry)
    with pytest.raises(NotImplementedError, match="holds one chunk of 253952 tokens at most, this run has 1000"):
        model.generate(prompt(30), cache_implementation="static", **limit)


@torch.no_grad()
def test_a_static_cache_that_is_too_small_is_refused(model):
    ran: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: ran.append(1))
    with pytest.raises(InvalidValue, match="the static cache has room for 30 tokens, this run has 40"):
        model(prompt(40), past_key_values=StaticCache(config=model.config, max_cache_len=30))
    assert not ran


def test_report(model):
    out = generate(model, prompt(170), return_dict_in_generate=True)
    report = out.past_key_values.report()
    assert report["tokens"] == 170 and report["prefill_seconds"] > 0 and report["peak_memory_bytes"] == 0
