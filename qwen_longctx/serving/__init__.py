"""One user, one command: the handlers of transformers' own server around one patched model.

`engine` runs the model, a request after the other, and keeps the cache of the last conversation. `requests` says what
a request may ask for. `stops` cuts texts at stop strings. `app` joins them with the handlers of transformers, the only
module that imports these. Only ``qwen-longctx serve`` needs any of it.
"""

from __future__ import annotations

from importlib.util import find_spec

import transformers
from packaging.version import Version

from qwen_longctx.errors import MissingPackage

OLDEST = "5.6"  # the first release whose server has handlers of its own, and one for /v1/completions
_NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")


def check_available(version: str = transformers.__version__) -> None:
    """Refuse to serve where transformers has no such server, or where what it needs is not installed.

    Parameters
    ----------
    version : str
        Of transformers.

    Raises
    ------
    MissingPackage
    """
    if Version(version).release < Version(OLDEST).release:
        raise MissingPackage(
            f"serving needs transformers {OLDEST} or newer, whose server answers chats and completions, found "
            f'{version}: pip install "transformers>={OLDEST}"'
        )
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingPackage(f'serving needs {", ".join(missing)}: pip install "qwen-longctx[serve]"')
