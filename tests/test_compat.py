"""What existing code does with a model: masks, logits, losses, adapters, quantisation, offload, compile, training."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import modeling_utils

from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen, unpatch_qwen

CHUNK = 23


def prompt(tokens, batch=1):
    return torch.randint(1, 90, (batch, tokens), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model():
    return patch_qwen(tiny_model("qwen2", dtype=torch.float64))


KEEP = [
    *(0, 1, 30, 40, 200, -5, True, slice(0, 3), [1, 2]),
    *(torch.tensor(k) for k in ([0], [5, 3, 30], [5, 5], [-1, -40], [], 5)),
    torch.arange(40) % 7 == 0,
]
if hasattr(modeling_utils, "slice_logits_to_keep"):
    KEEP += [torch.tensor([[1, 2], [30, 5]]), torch.arange(80).view(2, 40) % 3 == 0]


@pytest.mark.parametrize("keep", KEEP, ids=str)
@torch.no_grad()
def test_logits_to_keep(keep):
    """All that the stock forward takes, in its shape: transformers 5.24 reads two dimensions as indices of each row."""
    model = tiny_model("qwen2", dtype=torch.float64)
    keep = keep.long() if isinstance(keep, torch.Tensor) and keep.numel() == 0 else keep
    wanted = model(prompt(40, batch=2), logits_to_keep=keep).logits
    patch_qwen(model, prefill_chunk_size=CHUNK)
    torch.testing.assert_close(model(prompt(40, batch=2), logits_to_keep=keep).logits, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_labels(model):
    ids = prompt(170)
    whole = model(ids, labels=ids)
    patch_qwen(model, prefill_chunk_size=CHUNK)
    chunked = model(ids, labels=ids)
    torch.testing.assert_close(chunked.loss, whole.loss)
    torch.testing.assert_close(chunked.logits, whole.logits)


@torch.no_grad()
def test_tuples_and_no_cache(model):
    ids = prompt(170)
    whole = model(ids).logits
    patch_qwen(model, prefill_chunk_size=CHUNK)
    out = model(ids, return_dict=False)
    assert isinstance(out, tuple)
    torch.testing.assert_close(out[0], whole)
    assert model(ids, use_cache=False).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, LongContextCache)


@torch.no_grad()
def test_hidden_states(model):
    ids = prompt(170)
    patch_qwen(model, prefill_chunk_size=CHUNK)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[-1].shape == (1, 170, 32)


@torch.no_grad()
def test_attention_weights_within_one_chunk():
    model = tiny_model("qwen2", dtype=torch.float64)
    ids = prompt(40)
    model.set_attn_implementation("eager")
    wanted = model(ids, output_attentions=True).attentions
    patch_qwen(model)
    found = model(ids, output_attentions=True).attentions
    assert len(found) == 2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_attention_weights_beyond_are_refused(model):
    with pytest.raises(NotImplementedError, match="output_attentions reaches 170 tokens, beyond the first chunk"):
        model(prompt(170), output_attentions=True)


@torch.no_grad()
def test_position_ids_may_be_given(model):
    ids = prompt(170)
    wanted = model(ids).logits
    patch_qwen(model, prefill_chunk_size=CHUNK)
    torch.testing.assert_close(model(ids, position_ids=torch.arange(170)[None]).logits, wanted)


@torch.no_grad()
def test_packed_and_reordered_positions_are_refused(model):
    packed = torch.cat((torch.arange(60), torch.arange(110)))[None]
    for positions in (packed, torch.arange(170).flip(0)[None], torch.arange(0, 340, 2)[None]):
        with pytest.raises(ValueError, match="position_ids must grow by one from token to token"):
            model(prompt(170), position_ids=positions)


@torch.no_grad()
def test_custom_masks_are_refused(model):
    mask = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(batch, tokens\), got \(1, 1, 40, 40\)"):
        model(prompt(40), attention_mask=mask)


@torch.no_grad()
def test_padding_between_tokens_is_refused(model):
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, 10:15] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens between tokens 0 and 40"):
        model(prompt(40), attention_mask=mask)


@torch.no_grad()
def test_registered_implementation(tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny_model("qwen2")
    source.save_pretrained(tmp_path)
    ids = prompt(170)
    wanted = patch_qwen(source)(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="qwen_dca")
    with pytest.raises(RuntimeError, match='attn_implementation="qwen_dca" needs the patch'):
        loaded(ids)
    torch.testing.assert_close(patch_qwen(loaded)(ids).logits, wanted)
    unpatch_qwen(loaded)
    assert loaded.config._attn_implementation == "qwen_dca"


@torch.no_grad()
def test_the_registered_mask_keeps_padding():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask = torch.ones(2, 5)
    assert ALL_MASK_ATTENTION_FUNCTIONS["qwen_dca"](attention_mask=mask) is mask


@pytest.mark.parametrize("order", ["patch first", "wrap first"])
@torch.no_grad()
def test_peft_lora(order):
    peft = pytest.importorskip("peft")
    ids = prompt(170)
    model = tiny_model("qwen2", dtype=torch.float64)
    if order == "patch first":
        patch_qwen(model, prefill_chunk_size=CHUNK)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config).eval()
    if order == "wrap first":
        patch_qwen(wrapped, prefill_chunk_size=CHUNK)
    with_adapter = wrapped(ids).logits
    out = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, with_adapter)
    again = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(out, again)
    with patched_qwen(merged, attention_temperature=False):
        assert not torch.equal(merged(ids).logits, with_adapter)


@torch.no_grad()
def test_torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model("qwen2", dtype=torch.float32)
    exact = patch_qwen(copy.deepcopy(model))(prompt(170)).logits
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    patch_qwen(model, prefill_chunk_size=CHUNK)
    found = model(prompt(170)).logits
    assert 0 < (found - exact).abs().max() < 0.2 * exact.abs().max()


@torch.no_grad()
def test_device_map_and_cpu_offload():
    """accelerate's own dispatch: weights wait on the CPU and come to the execution device layer by layer."""
    accelerate = pytest.importorskip("accelerate")
    ids = prompt(170)
    model = tiny_model("qwen2", dtype=torch.float64)
    wanted = patch_qwen(copy.deepcopy(model))(ids).logits
    for first in (True, False):
        dispatched = copy.deepcopy(model)
        if first:
            patch_qwen(dispatched, prefill_chunk_size=CHUNK)
        accelerate.cpu_offload(dispatched, execution_device=torch.device("cpu"))
        if not first:
            patch_qwen(dispatched, prefill_chunk_size=CHUNK)
        torch.testing.assert_close(dispatched(ids).logits, wanted)
    blocks = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    mapped = accelerate.dispatch_model(
        copy.deepcopy(model),
        {**blocks, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        main_device="cpu",
        force_hooks=True,
    )
    patch_qwen(mapped, prefill_chunk_size=CHUNK)
    torch.testing.assert_close(mapped(ids).logits, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [(0, 1), ("cpu", 0), (0, "cpu")], ids=str)
@torch.no_grad()
def test_two_devices(devices):
    """Layers on two devices, the cache of each where it runs: two CUDA devices, or one and the CPU."""
    accelerate = pytest.importorskip("accelerate")
    if torch.cuda.device_count() < sum(device != "cpu" for device in devices):
        pytest.skip("needs more CUDA devices")
    model = tiny_model("qwen2", dtype=torch.float32)
    wanted = patch_qwen(copy.deepcopy(model))(prompt(170)).logits
    first, second = devices
    names = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first, "model.layers.1": second}
    device_map = {**names, "model.norm": second, "lm_head": second}
    # the CPU runs its layers itself where it is the main device; else accelerate would offload to it
    mapped = accelerate.dispatch_model(model, device_map, main_device="cpu" if "cpu" in devices else 0)
    patch_qwen(mapped, prefill_chunk_size=CHUNK)
    cache = LongContextCache(170)
    found = mapped(prompt(170).to(first), past_key_values=cache).logits.cpu()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert [layer.keys.device for layer in cache.layers] == [
        torch.device(d if d == "cpu" else f"cuda:{d}") for d in devices
    ]


@torch.no_grad()
def test_lm_eval():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from qwen_longctx.cli import BUNDLED

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    model = tiny_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=4096)
    patch_qwen(model, prefill_chunk_size=CHUNK)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=400)
    text = " The grass is green." * 40
    requests = [Instance("loglikelihood", {}, (text, " Here we go."), i) for i in range(2)]
    found = [value for value, _ in lm.loglikelihood(requests)]
    ids = tokenizer(text + " Here we go.", return_tensors="pt").input_ids
    ends = len(tokenizer(" Here we go.").input_ids)
    logprobs = model(ids[:, :-1]).logits.log_softmax(-1)[0, -ends:]
    wanted = logprobs.gather(1, ids[0, -ends:, None]).sum().item()
    assert found == pytest.approx([wanted] * 2, rel=1e-4)


@torch.no_grad()
def test_torch_compile(model):
    ids = prompt(100)
    wanted = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, wanted)


@pytest.mark.parametrize("tokens", [40, 60, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_within_the_chunk_size_is_stock(tokens, checkpointing):
    """Below the stride, between stride and chunk size, and at the chunk size: the gradients of plain attention."""
    model = tiny_model("qwen2", dtype=torch.float64).train()
    ids = prompt(tokens, batch=2)
    gradients = []
    for patched in (False, True):
        if patched:
            patch_qwen(model, prefill_chunk_size=7)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_frozen_model_needs_no_no_grad(model):
    model.requires_grad_(False)
    assert model(prompt(170)).logits.shape == (1, 170, 97)


@torch.no_grad()
def test_deepcopy_of_a_used_model(model):
    model(prompt(100))
    torch.testing.assert_close(copy.deepcopy(model)(prompt(100)).logits, model(prompt(100)).logits)


@torch.no_grad()
def test_the_base_model_alone(model):
    """A caller that skips the LM head gets dual chunk attention too."""
    hidden = model.model(prompt(170)).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(prompt(170)).logits)
