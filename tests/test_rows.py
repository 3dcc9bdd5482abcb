"""Rows of unequal length: each is the row alone, whatever padding stands before or behind it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen2ForSequenceClassification, Qwen2ForTokenClassification, Qwen2Model

from definition import dense_model
from helpers import FAMILIES, GEOMETRY, tiny_model
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.errors import InvalidType, InvalidValue

CHUNK, LOCAL = GEOMETRY["chunk_size"], GEOMETRY["local_size"]
LENGTHS = [200, 100, 1, 64]


def batch(lengths: list[int], side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows without padding, and the padded batch with its mask."""
    torch.manual_seed(0)
    rows = [torch.randint(1, 97, (n,)) for n in lengths]
    width = max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, at], mask[number, at] = row, 1
    return rows, ids, mask


def of_row(values: torch.Tensor, tokens: int, side: str) -> torch.Tensor:
    """The part of a padded row's values, shape (width, ...), that belongs to its tokens."""
    return values[:tokens] if side == "right" else values[len(values) - tokens :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["none", "of generate", "one row for all"])
@pytest.mark.parametrize("size", [1000, 30])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(family, side, positions, size):
    """Temperature, chunk borders and positions come from the mask; logits are those of the definition."""
    settings = {"original_max_position_embeddings": 20, "attention_temperature": True}
    model = patch_qwen(tiny_model(family, dtype=torch.float64), prefill_chunk_size=size, **settings)
    rows, ids, mask = batch(LENGTHS, side)
    given = {}
    if positions == "of generate":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if positions == "one row for all":
        given["position_ids"] = torch.arange(ids.shape[1])[None]
    logits = model(ids, attention_mask=mask, **given).logits
    for number, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(of_row(logits[number], len(row), side), alone)
    heat = max(1.0, 0.1 * torch.tensor(100 / 20).log().item() + 1.0) ** 2
    truth = dense_model(model, rows[1][None], CHUNK, LOCAL, heat)[0]
    torch.testing.assert_close(of_row(logits[1], 100, side), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1000, 30])
@torch.no_grad()
def test_embedding_models_take_the_mask_alone(side, size):
    """A base model called by itself with a mask and no positions, as sentence embeddings do, also in chunks."""
    settings = {"prefill_chunk_size": size, "original_max_position_embeddings": 20, "attention_temperature": True}
    model = patch_qwen(Qwen2Model(tiny_model().config).double().eval(), **settings)
    rows, ids, mask = batch(LENGTHS, side)
    hidden = model(ids, attention_mask=mask).last_hidden_state
    for number, row in enumerate(rows):
        alone = model(row[None]).last_hidden_state[0]
        torch.testing.assert_close(of_row(hidden[number], len(row), side), alone)


@pytest.mark.parametrize("head", [Qwen2ForSequenceClassification, Qwen2ForTokenClassification])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classification_heads_prefill_in_chunks(head, side):
    """Other heads reach the base model, which cuts a long prompt itself: the largest forward is one chunk."""
    model = head(tiny_model(num_labels=3).config).double().eval()
    patch_qwen(model, prefill_chunk_size=1000)
    rows, ids, mask = batch(LENGTHS[:2], side)
    whole = model(ids, attention_mask=mask).logits
    patch_qwen(model, prefill_chunk_size=30)
    widths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[1]))
    chunked = model(ids, attention_mask=mask).logits
    assert widths == [30] * 6 + [20]
    real = slice(None) if head is Qwen2ForSequenceClassification else mask.bool()
    torch.testing.assert_close(chunked[real], whole[real])
    if head is Qwen2ForSequenceClassification:
        torch.testing.assert_close(whole[1:], model(rows[1][None]).logits)


@torch.no_grad()
def test_without_a_mask_every_token_counts():
    model = patch_qwen(tiny_model(dtype=torch.float64), original_max_position_embeddings=20)
    _, ids, mask = batch([150, 90], "left")
    torch.testing.assert_close(model(ids).logits, model(ids, attention_mask=torch.ones_like(mask)).logits)
    assert not torch.allclose(model(ids).logits[1, -1], model(ids, attention_mask=mask).logits[1, -1])


@torch.no_grad()
def test_a_row_of_padding_alone_disturbs_nobody():
    model = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=30)
    rows, ids, mask = batch([150, 90], "left")
    padded = torch.cat((torch.zeros(1, 150, dtype=torch.long), ids))
    logits = model(padded, attention_mask=torch.cat((torch.zeros_like(mask[:1]), mask))).logits
    torch.testing.assert_close(logits[1:][mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@torch.no_grad()
def test_rows_padded_on_the_right_are_continued_as_themselves():
    """Further tokens behind right padding would stand apart from their row: refused, and the cache stays usable."""
    model = patch_qwen(tiny_model(dtype=torch.float64))
    _, ids, mask = batch([50, 30], "right")
    cache = LongContextCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(InvalidValue, match="hides tokens"):
        model(ids[:, :1], attention_mask=torch.cat((mask, torch.ones(2, 1).long()), 1), past_key_values=cache)
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("mask", [None, "all ones", "shifted"])
@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
@pytest.mark.parametrize("rows", [[0, 1], [1, 1], [1, 0]])
@torch.no_grad()
def test_a_padded_cache_is_continued_with_its_own_mask_only(mask, make, rows):
    """Without the mask the padding in the cache would count as text; with another one rows would begin elsewhere."""
    model = patch_qwen(tiny_model(dtype=torch.float64))
    texts, ids, first = batch([50, 30], "left")
    cache = make()
    model(ids, attention_mask=first, past_key_values=cache)
    cache.reorder_cache(torch.tensor(rows))
    first = first[rows]
    new = torch.randint(1, 97, (2, 4))
    own = torch.cat((first, torch.ones(2, 4).long()), 1)
    given = {
        None: None,
        "all ones": torch.ones_like(own),
        "shifted": own.roll(-2, 1).index_fill(1, torch.arange(50, 54), 1),
    }
    with pytest.raises(InvalidValue, match="of the cache begins at token"):
        model(new, attention_mask=given[mask], past_key_values=cache)
    with pytest.raises(InvalidValue, match="of the cache begins at token"):
        model.generate(new, attention_mask=given[mask], past_key_values=cache, max_new_tokens=2)
    logits = model(new, attention_mask=own, past_key_values=cache).logits
    for number, row in enumerate(rows):
        alone = make()
        model(texts[row][None], past_key_values=alone)
        torch.testing.assert_close(logits[number], model(new[number][None], past_key_values=alone).logits[0])


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
@torch.no_grad()
def test_a_row_of_padding_alone_begins_later(make):
    """The position ids of generate count such a row's first token as its second; every start is as good."""
    model = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=30)
    rows, ids, mask = batch([150, 90], "left")
    padded = torch.cat((torch.zeros(1, 150, dtype=torch.long), ids))
    three = torch.cat((torch.zeros_like(mask[:1]), mask))
    out = model.generate(padded, attention_mask=three, past_key_values=make(), max_new_tokens=5, do_sample=False)
    for number, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=5, do_sample=False)
        assert torch.equal(out[number + 1, 150:], alone[0, len(row) :])
    cache, new = make(), torch.randint(1, 97, (3, 70))
    model(padded, attention_mask=three, past_key_values=cache)
    logits = model(new, attention_mask=torch.cat((three, torch.ones_like(new)), 1), past_key_values=cache).logits
    torch.testing.assert_close(logits[0], model(new[:1]).logits[0])


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
@torch.no_grad()
def test_a_row_that_is_cropped_into_its_padding_begins_anew(make):
    model = patch_qwen(tiny_model(dtype=torch.float64), attention_temperature=False)
    rows, ids, mask = batch([90, 20], "left")
    cache, new = make(), torch.randint(1, 97, (2, 60))
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-40)
    own = torch.cat((mask[:, :50], torch.ones_like(new)), 1)
    logits = model(new, attention_mask=own, past_key_values=cache).logits
    torch.testing.assert_close(logits[0], model(torch.cat((rows[0][:50], new[0]))[None]).logits[0, 50:])
    torch.testing.assert_close(logits[1], model(new[1:]).logits[0])


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan"), float("-inf")])
@torch.no_grad()
def test_masks_of_other_values_are_refused(value):
    """Also where all values are alike, so that nothing looks like padding."""
    model = patch_qwen(tiny_model())
    with pytest.raises(InvalidValue, match="attention_mask must be 1 at tokens and 0 at padding"):
        model(torch.ones(2, 40, dtype=torch.long), attention_mask=torch.full((2, 40), value))


@pytest.mark.parametrize("mask", [[[1] * 40], torch.tensor(1), "mask"], ids=str)
def test_what_is_no_mask_is_refused(mask):
    model = patch_qwen(tiny_model())
    ids = torch.ones(1, 40, dtype=torch.long)
    for call in (model, model.model, model.generate):
        with pytest.raises((InvalidType, InvalidValue), match="attention_mask must"):
            call(ids, attention_mask=mask)


@torch.no_grad()
def test_a_block_diagonal_mask_is_not_taken_for_padding():
    """Seen from its last row, a packed mask of 4 dimensions looks like one with padding on the left."""
    model = patch_qwen(tiny_model(dtype=torch.float64))
    ids = torch.randint(1, 97, (1, 40))
    causal = torch.ones(40, 40).tril().bool()
    packed = causal.clone()
    packed[20:, :20] = False
    with pytest.raises(InvalidValue, match="takes no custom masks"):
        model(ids, attention_mask=packed[None, None])
    real = torch.arange(40) >= 20
    for blank in (False, True):  # where a query is padding, some kernels want it to see everything
        padded = (causal & real).masked_fill(~real[:, None], blank)
        found = model(ids, attention_mask=padded[None, None]).logits[:, 20:]
        torch.testing.assert_close(found, model(ids[:, 20:]).logits)
