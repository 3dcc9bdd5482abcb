"""A model that judges answers of another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from qwen_longctx.evaluation.task import in_template

_NEW_TOKENS = 512


def checkpoint(name: str) -> Callable[[str], str]:
    """A judge from a folder or hub name of a causal model of transformers, loaded when it judges first.

    It answers greedily, in the chat template of its tokenizer where there is one.
    """

    @cache
    def loaded() -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto").eval()
        return model, AutoTokenizer.from_pretrained(name)

    def judge(prompt: str) -> str:
        import torch

        model, tokenizer = loaded()
        ids = _ids(tokenizer, prompt).to(model.device)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return judge


def _ids(tokenizer: Any, prompt: str) -> Any:
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer(in_template(tokenizer, prompt), add_special_tokens=False, return_tensors="pt").input_ids
