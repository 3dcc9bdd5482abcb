"""Qwen2 and Qwen2.5: which classes are patched."""

from qwen_longctx.patches.family import Family

FAMILY = Family("qwen2", "Qwen2")
