"""Qwen3-MoE: which classes are patched."""

from qwen_longctx.patches.family import Family

FAMILY = Family("qwen3_moe", "Qwen3Moe")
