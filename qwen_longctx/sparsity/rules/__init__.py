"""The rules of sparse prefill, a file each: ``select``, a `RULE`, and ``Options``, the settings that it owns.

To add one, write such a file and name it in `config.RULES`, together with its settings.
"""

from __future__ import annotations

from importlib import import_module

from qwen_longctx import config
from qwen_longctx.sparsity.rules.rule import Rule

RULES: dict[str, Rule] = {name: import_module(f"{__name__}.{name}").RULE for name in config.RULES}
