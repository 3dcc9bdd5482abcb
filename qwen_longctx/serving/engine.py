"""Runs one patched model for many requests: one after the other, on one thread, with the cache of the last one kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from qwen_longctx import settings_of
from qwen_longctx.errors import DoesNotFit, PatchConflict, Refused
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.kv.sequence import sequence_of
from qwen_longctx.kv.store import STEP

logger = logging.getLogger(__name__)


class Cancelled(Exception):
    """The client of a request has left, or the server ends."""


class Turn:
    """One request on its way through an `Engine`.

    Parameters
    ----------
    seed : int, optional
        Of its random numbers, set when its turn comes.

    Attributes
    ----------
    begun : concurrent.futures.Future
        Is done when the first chunk of the prompt begins, after all checks; or holds the error that came before.
    error : BaseException, optional
        What ended it.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.error: BaseException | None = None
        self.begun: Future[None] = Future()
        self.begun.set_running_or_notify_cancel()  # nobody cancels it
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop at the next chunk of the prompt, or at the next new token. Of a turn that has ended nothing changes."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `Cancelled` if it is."""
        if self._cancelled.is_set():
            raise Cancelled("the client has left")

    def begin(self) -> None:
        """Say that the first chunk begins."""
        if not self.begun.done():
            self.begun.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Say what ended it, in the log with where it happened."""
        before = not self.begun.done()
        usual = isinstance(error, (Cancelled, Refused)) or (before and isinstance(error, (ValueError, TypeError)))
        logger.log(logging.INFO if usual else logging.ERROR, "a request ended early: %s", error, exc_info=error)
        _let_go(error)
        self.error = error
        if before:
            self.begun.set_exception(error)


class _Kept(NamedTuple):
    """A cache, and the token ids that it holds, int64 of shape (tokens,) on the CPU."""

    ids: torch.Tensor
    cache: LongContextCache


class Engine:
    """A patched model that answers requests in the order in which they come.

    The cache of the last request is kept. The next prompt runs only from the first token on that differs, if the cache
    holds half of it at least; else the cache is dropped before the prompt begins, so that there is room for a new one.
    Tokens are compared, not texts or messages: what the cache holds is what the model has seen.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A patched causal language model.

    Raises
    ------
    PatchConflict
        The model is not patched.
    """

    def __init__(self, model: Any) -> None:
        if settings_of(model) is None:
            raise PatchConflict("the model is not patched: call patch_qwen(model) before it is served")
        self.model = model
        self.reused = 0
        self._kept: _Kept | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="qwen-longctx")
        self._turns: set[Turn] = set()

    def submit(self, turn: Turn, work: Callable[[], Any]) -> Future[Any]:
        """Do `work` on the thread of the model when the requests before it are done; it is to call `generate`."""
        self._turns.add(turn)
        future = self._worker.submit(work)
        future.add_done_callback(lambda _: self._turns.discard(turn))
        return future

    def generate(self, turn: Turn, **arguments: Any) -> Any:
        """``model.generate`` for one request: `arguments` with its `input_ids`, one row, and `generation_config`.

        Raises
        ------
        Cancelled
            The turn was cancelled. What the prompt has filled of the cache is kept.
        """
        try:
            turn.check()
            if turn.seed is not None:
                torch.manual_seed(turn.seed)
            return self._run(turn, arguments)
        except BaseException as error:
            turn.fail(error)
            raise

    def _run(self, turn: Turn, arguments: dict[str, Any]) -> Any:
        cache = self._matching(arguments["input_ids"][0], arguments["generation_config"])
        if cache is not None:
            try:
                return self._continued(turn, cache, arguments)
            except DoesNotFit as error:  # a new one may be of a kind that takes less, and need not be copied to grow
                _let_go(error)
                cache = self._kept = None
        return self._continued(turn, self._new_cache(arguments), arguments)

    def _matching(self, ids: torch.Tensor, config: Any) -> LongContextCache | None:
        """The kept cache, cropped to what it shares with a prompt; it is no longer kept."""
        kept, self._kept, self.reused = self._kept, None, 0
        settings = settings_of(self.model)
        assert settings is not None
        own_length = settings.attention_temperature is True  # counts that of the prompt that fills the cache
        if kept is None or own_length or config.prompt_lookup_num_tokens:  # drafts pass the whole text again
            return None
        shared = min(_shared(kept.ids, ids.cpu()), len(ids) - 1)  # the last token gives the first new one
        if 2 * shared < len(ids):
            return None
        kept.cache.crop(shared)
        self.reused = shared
        return kept.cache

    def _new_cache(self, arguments: dict[str, Any]) -> LongContextCache:
        settings, tokens = settings_of(self.model), arguments["input_ids"].shape[1]
        assert settings is not None
        self.reused = 0
        new = arguments["generation_config"].max_new_tokens or 0
        return LongContextCache(tokens + min(new, STEP), kv_cache=settings.kv_cache)

    def _continued(self, turn: Turn, cache: LongContextCache, arguments: dict[str, Any]) -> Any:
        """`generate` on a cache, which is kept with the tokens that it holds in the end."""
        prompt = arguments["input_ids"][0]
        chunks = _Chunks(turn, self.model.model.layers[0], len(prompt) - cache.get_seq_length())
        listener = _Listener(turn, prompt, arguments.get("streamer"))
        whole = True
        try:
            return self.model.generate(**{**arguments, "past_key_values": cache, "streamer": listener})
        except torch.OutOfMemoryError:
            whole = False  # what it takes is wanted more than what it holds
            raise
        finally:
            chunks.leave()
            if whole:
                self._keep(listener.ids(), cache)

    def _keep(self, ids: torch.Tensor, cache: LongContextCache) -> None:
        """Keep a cache after a run on `ids`, wherever that ended: a call that fails leaves its cache as it was."""
        cache.crop(min(len(ids), cache.get_seq_length()))  # a token may be on its way that was not told yet
        held = cache.get_seq_length()
        if held and not sequence_of(cache).broken:
            self._kept = _Kept(ids[:held], cache)

    def close(self) -> None:
        """Cancel all requests, and wait for the one that runs to stop."""
        for turn in list(self._turns):
            turn.cancel()
        self._worker.shutdown(cancel_futures=True)
        self._kept = None


def _let_go(error: BaseException | None) -> None:
    """Forget the calls that an error came through, which keep a cache and activations for as long as it is known."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _Chunks:
    """Watches a prompt from a layer: says that it has begun, and ends a cancelled run at the next chunk.

    It leaves the layer with the last chunk: a token that is watched is not captured as a CUDA graph.

    Parameters
    ----------
    turn : Turn
    layer : torch.nn.Module
        The first one.
    tokens : int
        Of the prompt that are to pass.
    """

    def __init__(self, turn: Turn, layer: Any, tokens: int) -> None:
        self._turn, self._left = turn, tokens
        self._hook = layer.register_forward_pre_hook(self)

    def __call__(self, layer: Any, args: Any) -> None:
        self._turn.check()
        self._turn.begin()
        self._left -= args[0].shape[1]
        if self._left <= 0:
            self.leave()

    def leave(self) -> None:
        """Leave the layer."""
        self._hook.remove()


class _Listener:
    """The streamer of a run: notes every token, ends a cancelled run, and hands on to the streamer of the request.

    Parameters
    ----------
    turn : Turn
    prompt : torch.Tensor
        Token ids of shape (tokens,).
    streamer : transformers streamer, optional
    """

    def __init__(self, turn: Turn, prompt: torch.Tensor, streamer: Any) -> None:
        self._turn, self._streamer = turn, streamer
        self._prompt = prompt.to("cpu", torch.int64)
        self._new: list[int] | None = None  # until generate has passed the prompt, as it does first

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then the tokens that follow it."""
        if self._new is None:
            self._new = []
        else:
            self._new += value.reshape(-1).tolist()
        self._turn.check()
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Hand on that no more comes."""
        if self._streamer is not None:
            self._streamer.end()

    def ids(self) -> torch.Tensor:
        """Prompt and new tokens, int64 of shape (tokens,)."""
        return torch.cat((self._prompt, torch.tensor(self._new or [], dtype=torch.int64)))


def _shared(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens two texts begin with alike."""
    both = min(len(a), len(b))
    differ = (a[:both] != b[:both]).nonzero()
    return int(differ[0]) if len(differ) else both
