"""The web application: handlers of transformers' server for chats and completions, around an `Engine`."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from qwen_longctx.errors import DoesNotFit, InvalidValue, MissingFile, Refused, Unsupported
from qwen_longctx.serving import requests
from qwen_longctx.serving.engine import Engine, Turn
from qwen_longctx.serving.stops import CutQueue, StopsAt, cut

logger = logging.getLogger(__name__)

_CLIENT_LEFT = 499  # what web servers note where nobody is there to be answered
_GENERATION_PROMPT = "<|im_start|>assistant"  # of all chat templates of Qwen
_BARE_ERROR = 'data: {"error": '  # as the handlers of transformers tell of an error within a stream


def make_app(engine: Engine, tokenizer: Any, name: str) -> FastAPI:
    """The application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models`` and ``/health``.

    Parameters
    ----------
    engine : Engine
    tokenizer : transformers tokenizer
    name : str
        By which requests know the model.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(HTTPException, _of_transformers)
    served = _Served(engine.model, tokenizer, name)

    async def answer(request: Request, kind: type[Any], chat: bool) -> Response:
        try:
            body = await _body(request)
            requests.check(body, chat)
            if body.setdefault("model", name) != name:
                raise MissingFile(f"there is no model {body['model']!r:.200} here: this server answers for {name!r}")
            if chat and tokenizer.chat_template is None:
                raise Unsupported(f"{name} has no chat template: ask /v1/completions, which takes a prompt as it is")
            turn = Turn(body.pop("seed", None))
            state = _State(_OneTurn(engine, turn, requests.stops_of(body)))
            return await _until_left(request, turn, _reply(kind(served, state), body, turn))
        except Refused as error:
            return _refusal(error)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, _Chat, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, _Completion, chat=False)

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qwen_longctx"}]}

    @app.get("/health")
    def health() -> Any:
        return {"status": "ok"}

    return app


async def _body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"the body is no JSON: {error}") from error


async def _reply(handler: Any, body: dict[str, Any], turn: Turn) -> Response:
    """The answer of a handler; that of a stream once its prompt has begun, so that a refusal has a status of its own.

    Raises
    ------
    Refused
        What is wrong with the request: all that comes up before it is on its way, and what transformers says of its
        values before the prompt begins.
    """
    try:
        response = await handler.handle_request(body, str(uuid.uuid4()))
        if isinstance(response, StreamingResponse):
            await asyncio.wrap_future(turn.begun)
            response.body_iterator = _told(response.body_iterator, turn)
    except HTTPException:
        raise
    except Exception as error:
        under_way = turn.begun.done() and turn.begun.exception() is None
        of_its_values = turn.error is None or isinstance(error, (Refused, ValueError, TypeError))
        if under_way or not of_its_values:
            return JSONResponse(_error(f"{type(error).__name__}: {error}", "server_error"), 500)
        if isinstance(error, Refused):
            raise
        logger.info("a request was refused", exc_info=error)
        raise InvalidValue(f"the request cannot be answered: {type(error).__name__}: {error}") from error
    return response


async def _told(parts: Any, turn: Turn) -> AsyncIterator[str]:
    """The events of a stream, its end as clients expect it, and an error with what they look for in one."""
    try:
        async for part in parts:
            text, bare, _ = part.partition(_BARE_ERROR)
            yield text
            if bare:
                yield f"data: {json.dumps(_error(str(turn.error), 'server_error'))}\n\n"
                return
        yield "data: [DONE]\n\n"
    finally:
        turn.cancel()


async def _until_left(request: Request, turn: Turn, reply: Any) -> Response:
    """The reply, unless the client leaves before."""
    work, left = asyncio.ensure_future(reply), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return Response(status_code=_CLIENT_LEFT)
    finally:
        left.cancel()
        if not work.done():
            turn.cancel()
            work.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _refusal(error: Exception) -> Response:
    if isinstance(error, MissingFile):
        return JSONResponse(_error(str(error), "not_found_error", "model_not_found"), 404)
    code = "context_length_exceeded" if isinstance(error, DoesNotFit) else None
    return JSONResponse(_error(str(error), "invalid_request_error", code), 400)


async def _of_transformers(request: Request, error: Any) -> Response:
    return JSONResponse(_error(str(error.detail), "invalid_request_error"), error.status_code)


class _Served(ModelManager):
    """Tells transformers' handlers of the one model that is served, whatever they ask for."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        # of a chat in another form than Qwen's, the parser of transformers would answer with the whole prompt
        known = _GENERATION_PROMPT in str(tokenizer.chat_template)
        config = SimpleNamespace(model_type=model.config.model_type if known else None)
        model = SimpleNamespace(config=config, device=model.device, generation_config=model.generation_config)
        self._pair, self._name = (model, tokenizer), name

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        """The name of the model, in answers too."""
        return self._name

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        """What the handlers want to know of the model, and its tokenizer."""
        return self._pair


class _State(GenerationState):
    """Hands the handlers the manager of one request."""

    def __init__(self, manager: _OneTurn) -> None:
        super().__init__()
        self._one, self.stops = manager, manager.stops

    def get_manager(self, *args: Any, **kwargs: Any) -> _OneTurn:
        """The manager of the request."""
        return self._one


class _OneTurn(GenerateManager):
    """transformers' way to generate, for one request, on the thread of an `Engine`."""

    def __init__(self, engine: Engine, turn: Turn, stops: list[str]) -> None:
        self._engine, self._turn, self.stops = engine, turn, stops
        self._runner = SimpleNamespace(generate=self._generate)  # what is called of a model

    def _generate(self, **arguments: Any) -> Any:
        if self.stops:
            stop = StopsAt(self.stops, arguments["tokenizer"], arguments["input_ids"].shape[1])
            arguments["stopping_criteria"] = StoppingCriteriaList([stop])
        return self._engine.generate(self._turn, **arguments)

    def submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run on the thread of the engine."""
        return self._engine.submit(self._turn, partial(fn, *args, **kwargs))

    def async_submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run on the thread of the engine."""
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Pieces of text, without stop strings."""
        queue, streamer = super().generate_streaming(self._runner, *args, **kwargs)
        return CutQueue(queue, self.stops) if self.stops else queue, streamer

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The whole text, without stop strings."""
        text, tokens, ids = await super().generate_non_streaming(self._runner, *args, **kwargs)
        return cut(text, self.stops), tokens, ids


class _Sampling:
    """What both kinds of requests share: a temperature asks for sampling, and there is one row."""

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        config.stop_strings = None  # see StopsAt
        if body.get("temperature"):
            config.do_sample = True
        if isinstance(config.sequence_bias, dict):
            config.sequence_bias = {ids: float(bias) for ids, bias in config.sequence_bias.items()}
        requests.check_generation(config)
        return config


class _Chat(_Sampling, ChatCompletionHandler):
    def _build_completion(self, request_id: str, content: Any, *args: Any, **kwargs: Any) -> Any:
        """Without stop strings, also where transformers has parsed the tokens again."""
        if isinstance(content, str):
            content = cut(content, self.generation_state.stops)
        return super()._build_completion(request_id, content, *args, **kwargs)


class _Completion(_Sampling, CompletionHandler):
    pass
