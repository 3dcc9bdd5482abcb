"""Qwen2-MoE: which classes are patched. Its attention has one form only since transformers 5.0."""

from qwen_longctx.patches.family import Family

FAMILY = Family("qwen2_moe", "Qwen2Moe", minimum="5.0")
