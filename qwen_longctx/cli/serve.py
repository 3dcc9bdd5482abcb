"""OpenAI's API for one user: the server of transformers with the patch in place, chats and completions."""

from __future__ import annotations

import argparse
import socket
from typing import Any

from qwen_longctx.cli.options import add_placement, add_settings, settings_given
from qwen_longctx.errors import InvalidValue, Unsupported

_SETTINGS = (
    "chunk_size",
    "local_size",
    "original_max_position_embeddings",
    "attention_temperature",
    "prefill_chunk_size",
    "mlp_chunk_size",
    "sparse",
    "sparse_attention_threshold",
    "fidelity",
    "sparse_decode",
    "sparse_decode_threshold",
    "kernel",
    "kv_cache",
    "linear",
    "cuda_graphs",
)
_SECONDS_TO_END = 1  # for answers that are under way when the server is stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx serve``."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    add_placement(parser)
    parser.add_argument("--name", help="by which requests know the model, MODEL by default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, this machine alone by default")
    parser.add_argument("--port", type=_port, default=8000, help="8000 by default; 0 is any free one")
    parser.add_argument("--continuous-batching", action="store_true", help="refused: serve many users with vLLM")
    add_settings(parser, _SETTINGS)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from qwen_longctx import LongContextConfig, patch_qwen, serving
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.sparsity import check_budgets

    if args.continuous_batching:
        raise Unsupported(
            "continuous batching takes keys and values out of the cache that a patched model needs: serve many users "
            'with vLLM and the plugin of this package, pip install "qwen-longctx[vllm]"; see docs/serving.md'
        )
    serving.check_available()
    with _listening(args.host, args.port) as listener:
        config = checkpoint.load_config(args.model, revision=args.revision)
        settings = settings_given(args, _SETTINGS)
        check_budgets(LongContextConfig.from_model_config(config, **settings), config)
        tokenizer = checkpoint.load_tokenizer(args.model, revision=args.revision)
        model = patch_qwen(checkpoint.load_model(args, revision=args.revision), **settings)
        _serve(model, tokenizer, args.name or args.model, listener)


def _serve(model: Any, tokenizer: Any, name: str, listener: socket.socket) -> None:
    import uvicorn

    from qwen_longctx.serving.app import make_app
    from qwen_longctx.serving.engine import Engine

    app = make_app(Engine(model), tokenizer, name)
    host, port = listener.getsockname()[:2]
    print(f"{name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=_SECONDS_TO_END)
    uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket of our own, taken before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InvalidValue(
            f"cannot listen on port {port} of {host}: {error.strerror or error}. Give another --port or --host"
        ) from error
    return listener


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return port
