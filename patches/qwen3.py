"""Qwen3: which classes are patched."""

from qwen_longctx.patches.family import Family

FAMILY = Family("qwen3", "Qwen3")
