"""Dual chunk attention in vLLM: a plugin that vLLM loads by itself wherever this package is installed.

vLLM still reads the ``dual_chunk_attention_config`` of a checkpoint and hands it to the rotary embedding and to the
attention backend, but has had no code for it since 0.11. This plugin puts two classes in their place, by the means that
vLLM has for that: `rotary.KeyRotary`, and backends that hand everything else to the ones they are made of. Models
without that section run as without the plugin.

Nothing here is imported by the rest of the package, and vLLM only once it calls `register`.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from qwen_longctx.errors import MissingPackage, PatchConflict

OLDEST = "0.26"
_BACKENDS = {
    "FLASH_ATTN": "qwen_longctx.vllm.flash.DualChunkFlashAttentionBackend",
    "CPU_ATTN": "qwen_longctx.vllm.cpu.DualChunkCPUAttentionBackend",
}
_WAY_OUT = "set VLLM_PLUGINS to the plugins that you want"


def register() -> None:
    """The entry point ``vllm.general_plugins``: called in every process of vLLM, and harmless when called again.

    Raises
    ------
    ImportError
        vLLM is older than 0.26.
    RuntimeError
        Another plugin has replaced the same classes.
    """
    import vllm

    check_version(vllm.__version__)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from qwen_longctx.vllm import rotary

    for name, path in _BACKENDS.items():
        backend = AttentionBackendEnum[name]
        if backend.is_overridden() and backend.get_path() != path:
            raise PatchConflict(f"another plugin has made {backend.get_path()} the backend {name} of vLLM: {_WAY_OUT}")
        register_backend(backend, path)
    rotary.register()


def check_version(version: str) -> None:
    """Refuse a vLLM that is too old.

    Raises
    ------
    ImportError
    """
    try:
        found = Version(version)
    except InvalidVersion:  # built from a checkout without tags
        return
    if found.release < Version(OLDEST).release:
        raise MissingPackage(
            f"the plugin of qwen-longctx needs vLLM {OLDEST} or newer, found {version}: "
            f'pip install "vllm>={OLDEST}", or {_WAY_OUT}'
        )
