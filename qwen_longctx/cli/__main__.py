"""``python -m qwen_longctx.cli``."""

import sys

from qwen_longctx.cli import main

sys.exit(main())
