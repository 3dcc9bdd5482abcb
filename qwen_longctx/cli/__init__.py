"""The command ``qwen-longctx``."""

from qwen_longctx.cli.main import BUNDLED, main

__all__ = ["BUNDLED", "main"]
