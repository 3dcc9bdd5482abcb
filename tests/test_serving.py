"""`qwen-longctx serve`: the engine on its own, and the server over HTTP with OpenAI's client."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoTokenizer, GenerationConfig

import test_graphs
from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen, serving, settings_of
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.errors import DoesNotFit, InvalidValue, MissingPackage, PatchConflict, Refused
from qwen_longctx.evaluation import passkey
from qwen_longctx.patches import room
from qwen_longctx.prefill import memory
from qwen_longctx.serving import requests
from qwen_longctx.serving.engine import Cancelled, Engine, Turn
from qwen_longctx.serving.stops import CutQueue, Cutter, StopsAt, cut

tapes = test_graphs.tapes
OLD = Version(transformers.__version__) < Version(serving.OLDEST)
over_http = pytest.mark.skipif(
    OLD or find_spec("openai") is None or find_spec("uvicorn") is None,
    reason=f"needs transformers {serving.OLDEST}, whose server answers completions too, and the extra `serve`",
)
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- what is available -------------------------------------------------------------------------------------------


def test_an_older_transformers_is_refused():
    with pytest.raises(MissingPackage, match=r"needs transformers 5.6 or newer.*found 4.57.1: pip install"):
        serving.check_available("4.57.1")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else SimpleNamespace())
    with pytest.raises(MissingPackage, match=r'serving needs uvicorn: pip install "qwen-longctx\[serve\]"'):
        serving.check_available("5.24.0")


def test_continuous_batching_is_refused_by_name(capsys):
    assert main(["serve", str(BUNDLED), "--continuous-batching"]) == 2
    assert "serve many users with vLLM and the plugin" in capsys.readouterr().err


# --- stop strings ------------------------------------------------------------------------------------------------


def test_a_text_ends_before_its_first_stop_string():
    assert cut("a b c", ["c", "b"]) == "a "
    assert cut("a b c", ["x"]) == cut("a b c", []) == "a b c"
    assert cut("xyz", ["xyz", "y"]) == "x"  # which ended the answer
    assert cut("xyz", ["yz", "xyz", "z"]) == ""


texts = st.text("ab\n", max_size=12)


@example(["\nb", "\n"], ["\nb\n", "b"])
@given(st.lists(texts, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_are_cut_as_the_whole_text_is(pieces, stops):
    """Every stop string is found, also where it begins in one piece and ends in another; nothing else is lost."""
    cutter, told = Cutter(stops), ""
    for number, piece in enumerate(pieces):
        told += cutter.feed(piece)
        assert cut("".join(pieces[: number + 1]), stops).startswith(told)
    assert told + cutter.flush() == cut("".join(pieces), stops)


def test_an_answer_ends_with_a_stop_string_in_it_and_not_in_its_prompt():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    stop = StopsAt(["sky is", "€"], tokenizer, len(tokenizer("The sky is").input_ids))
    for text, ends in ((" blue", False), (" sky", False), (" sky is", True), (" sky is blue", True), (" 5 €", True)):
        ids = tokenizer(f"The sky is{text}", return_tensors="pt").input_ids
        assert stop(ids, None).tolist() == [ends]


def test_a_queue_holds_back_what_may_be_a_stop_string():
    async def read():
        inner = asyncio.Queue()
        queue = CutQueue(inner, ["END"])
        for item in ("one E", "N", "two EN", "D three", None):
            inner.put_nowait(item)
        return [await queue.get(), queue.get_nowait(), queue.get_nowait()]

    assert asyncio.run(read()) == ["one ", "ENtwo ", None]


# --- requests ----------------------------------------------------------------------------------------------------

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
REFUSED = [
    ([], "must be a JSON object"),
    ("hello", "must be a JSON object"),
    ({}, "messages must be a list of one message or more, got nothing"),
    ({"messages": []}, "got nothing"),
    ({"messages": "hello"}, "got str 'hello'"),
    ({"messages": ["hello"]}, r"messages\[0\] must be an object with a role"),
    ({"messages": [{"role": "user"}]}, r"the content of messages\[0\] must be a text"),
    ({"messages": [{"role": "user", "content": 3}]}, r"the content of messages\[0\] must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads parts of type text only"),
    ({**HELLO, "n": 2}, "n=2 is not supported"),
    ({**HELLO, "logprobs": True}, "logprobs=True is not supported"),
    ({**HELLO, "presence_penalty": 0.5}, "presence_penalty=0.5 is not supported"),
    ({**HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    ({**HELLO, "surprise": 1}, "surprise=1 is not supported"),
    ({**HELLO, "stream": "yes"}, "stream must be true or false, got 'yes'"),
    ({**HELLO, "stop": [""]}, "none of them empty"),
    ({**HELLO, "stop": 3}, "none of them empty, got 3"),
    ({**HELLO, "seed": 0.5}, "seed must be a whole number of 64 bits, got 0.5"),
    ({**HELLO, "seed": 1 << 64}, "seed must be a whole number of 64 bits"),
    ({**HELLO, "generation_config": {}}, "must be a string that holds JSON"),
    *(({**HELLO, "max_tokens": x}, "max_tokens must be a whole number from 1") for x in (0, -1, 1.5, "3", True)),
    ({**HELLO, "max_tokens": 10**30}, "max_tokens must be a whole number from 1 to 1,000,000,000,000,000"),
    *(({**HELLO, "temperature": x}, "temperature must be a number from 0 to 100") for x in (-1, float("nan"), "hot")),
    ({**HELLO, "top_p": 0}, "top_p must be a number above 0"),
    ({**HELLO, "frequency_penalty": -1}, "frequency_penalty must be a number above -1"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_a_request_that_cannot_be_answered_is_refused(body, message):
    with pytest.raises(Refused, match=message):
        requests.check(body, chat=True)


@pytest.mark.parametrize("prompt", [None, "", 3, ["a", "b"], [1, 2]])
def test_a_completion_takes_one_text(prompt):
    with pytest.raises(InvalidValue, match="prompt must"):
        requests.check({"prompt": prompt}, chat=False)


def test_values_that_ask_for_nothing_are_taken():
    body = {**HELLO, "n": 1, "logprobs": False, "presence_penalty": 0, "stop": None, "user": "me", "temperature": 0}
    requests.check(body, chat=True)
    assert "stop" not in body and requests.stops_of(body) == []
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    requests.check({"messages": [{"role": "user", "content": parts}]}, chat=True)


# --- the engine --------------------------------------------------------------------------------------------------

NEW = 6
GREEDY = GenerationConfig(
    max_new_tokens=NEW, do_sample=False, pad_token_id=0, output_scores=True, return_dict_in_generate=True
)


def engine_of(**settings):
    model = tiny_model()
    return Engine(patch_qwen(model, **{"prefill_chunk_size": 32, **settings}))


def ask(engine, ids, turn=None, config=GREEDY):
    turn = turn or Turn()
    return engine.submit(turn, lambda: engine.generate(turn, input_ids=ids, generation_config=config)).result()


def fresh(engine, ids):
    return engine.model.generate(ids, generation_config=GREEDY)


def agree(found, expected):
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


@pytest.fixture
def ids():
    return torch.randint(1, 97, (1, 200))  # three chunks of 48 and more


def test_an_unpatched_model_is_not_served():
    with pytest.raises(PatchConflict, match="not patched"):
        Engine(tiny_model())


def test_a_conversation_goes_on_where_it_ended(ids):
    """Of a second turn only what is new runs, the last token of the answer included, which no call has taken yet."""
    engine = engine_of()
    first = ask(engine, ids)
    agree(first, fresh(engine, ids))
    longer = torch.cat((first.sequences, torch.randint(1, 97, (1, 60))), 1)
    second = ask(engine, longer)
    assert engine.reused == first.sequences.shape[1] - 1
    agree(second, fresh(engine, longer))
    engine.close()


@pytest.mark.parametrize("at", [199, 150, 110])
def test_an_edited_history_runs_from_the_edit_on(ids, at):
    engine = engine_of()
    ask(engine, ids)
    edited = ids.clone()
    edited[0, at] = (edited[0, at] + 1) % 97
    agree(ask(engine, edited), fresh(engine, edited))
    assert engine.reused == at
    agree(ask(engine, ids), fresh(engine, ids))
    assert engine.reused == at
    engine.close()


def test_the_same_and_shorter_prompts_run_their_last_token(ids):
    engine = engine_of()
    for prompt in (ids, ids, ids[:, :120]):
        found = ask(engine, prompt)
        agree(found, fresh(engine, prompt))
    assert engine.reused == 119
    engine.close()


def test_another_conversation_in_between_costs_the_cache_and_nothing_else(ids):
    engine = engine_of()
    ask(engine, ids)
    other = torch.cat((ids[:, :20], torch.randint(1, 97, (1, 100))), 1)
    agree(ask(engine, other), fresh(engine, other))
    assert engine.reused == 0  # a sixth of the prompt is not worth a cache of another length
    agree(ask(engine, ids), fresh(engine, ids))
    assert engine.reused == 0
    engine.close()


def test_a_temperature_by_the_length_of_the_prompt_is_never_continued(ids):
    engine = engine_of(attention_temperature=True)
    ask(engine, ids)
    longer = torch.cat((ids, ids), 1)
    agree(ask(engine, longer), fresh(engine, longer))
    assert engine.reused == 0
    engine.close()


def test_eight_bits_go_on_as_in_one_cache(ids):
    engine = engine_of(kv_cache="int8")
    first = ask(engine, ids)
    longer = torch.cat((first.sequences, ids[:, :40]), 1)
    second = ask(engine, longer)
    assert engine.reused == first.sequences.shape[1] - 1
    expected = torch.stack(fresh(engine, longer).scores)
    torch.testing.assert_close(torch.stack(second.scores), expected, rtol=0.1, atol=0.1)
    engine.close()


def test_a_cancelled_prompt_stops_at_its_next_chunk(ids):
    """What had run before in the conversation stays, and the next prompt is answered as if nothing had been."""
    engine, turn, chunks = engine_of(), Turn(), []
    ask(engine, ids[:, :150])
    layer = engine.model.model.layers[0]

    def leave(*_):
        chunks.append(1)
        if len(chunks) == 2:
            turn.cancel()

    hook = layer.register_forward_pre_hook(leave)
    long = torch.cat((ids, torch.randint(1, 97, (1, 100))), 1)  # 151 tokens to run: five chunks
    with pytest.raises(Cancelled):
        ask(engine, long, turn)
    hook.remove()
    assert len(chunks) == 2 and isinstance(turn.error, Cancelled)
    assert not layer._forward_pre_hooks
    agree(ask(engine, long), fresh(engine, long))
    assert engine.reused >= 150
    engine.close()


def test_what_waits_is_cancelled_before_it_begins(ids):
    engine, turn = engine_of(), Turn()
    turn.cancel()
    with pytest.raises(Cancelled):
        ask(engine, ids, turn)
    with pytest.raises(Cancelled):
        turn.begun.result()
    engine.close()


def test_a_continuation_that_does_not_fit_begins_anew(ids, monkeypatch):
    engine, real = engine_of(), room.check_room

    def full(base, need, settings, cache=None, *args):
        if need.held:
            raise DoesNotFit("no room to grow")
        return real(base, need, settings, cache, *args)

    ask(engine, ids[:, :150])
    monkeypatch.setattr(room, "check_room", full)
    found = ask(engine, ids)
    assert engine.reused == 0
    monkeypatch.undo()
    agree(found, fresh(engine, ids))
    engine.close()


def test_an_error_keeps_the_conversation(ids):
    engine = engine_of()
    ask(engine, ids[:, :150])
    turn = Turn()
    with pytest.raises(ValueError, match="temperature"):
        ask(engine, ids, turn, GenerationConfig(max_new_tokens=2, do_sample=True, temperature=-1.0))
    with pytest.raises(ValueError, match="temperature"):
        turn.begun.result()
    agree(ask(engine, ids), fresh(engine, ids))
    assert engine.reused >= 150
    engine.close()


def caches():
    """Identities of all caches that are alive."""
    return {id(one) for one in gc.get_objects() if type(one) is LongContextCache}


@pytest.mark.parametrize("held", [0, 150], ids=["new", "continued"])
def test_what_finds_no_memory_lets_go_of_its_own(ids, held, monkeypatch):
    """At once, not when Python happens to look for circles: the next request wants the memory."""
    monkeypatch.setattr(logging.getLogger("qwen_longctx.serving.engine"), "disabled", True)  # pytest keeps records
    gc.collect()
    others = caches()  # of other tests
    engine, turn = engine_of(), Turn()
    if held:
        ask(engine, ids[:, :held])

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    hook = engine.model.model.layers[1].register_forward_pre_hook(full)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            ask(engine, ids, turn)
        assert isinstance(turn.error, torch.OutOfMemoryError)
        assert caches() <= others
    finally:
        gc.enable()
    hook.remove()
    agree(ask(engine, ids), fresh(engine, ids))
    engine.close()


@pytest.mark.parametrize("config", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "drafts"])
def test_new_tokens_are_captured_as_without_a_server(ids, tapes, config):
    """What watches the chunks of a prompt has left before the first new token; drafts are not captured, nor reused."""
    engine = engine_of()
    config = GenerationConfig(max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=96, **config)
    for turn in range(2):
        found = ask(engine, ids, config=config)
        assert len(tapes) == (0 if config.prompt_lookup_num_tokens else turn + 1)
        assert engine.reused == (199 if turn and tapes else 0)
    assert all(tape.replays > 20 for tape in tapes)
    assert found.tolist() == engine.model.generate(ids, generation_config=config).tolist()
    engine.close()


def test_a_seed_is_set_when_its_turn_comes(ids):
    engine = engine_of()
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=2.0, pad_token_id=0)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: ask(engine, ids, Turn(seed), config).tolist(), [5, 6, 5, 6]))
    assert found[0] == found[2] != found[1] == found[3]
    engine.close()


# --- over HTTP ---------------------------------------------------------------------------------------------------


def chat_checkpoint(folder, template):
    shutil.copytree(BUNDLED, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


@contextmanager
def serving_thread(target):
    """The server that `target` starts on this thread's behalf, once it answers."""
    import uvicorn

    started = []
    real = uvicorn.Server.run

    def run(server, sockets=None):
        started.append((server, sockets[0].getsockname()[1]))
        real(server, sockets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", run)
        thread = threading.Thread(target=target)
        thread.start()
        while not (started and started[0][0].started):
            assert thread.is_alive(), "the server has ended before it answered"
            time.sleep(0.01)
    yield started[0][1]
    started[0][0].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of the command itself, on the bundled checkpoint with a chat template that adds nothing."""
    from qwen_longctx.serving import app

    folder = chat_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", PLAIN)
    command = ["serve", str(folder), "--name", "tiny", "--port", "0", "--dtype", "float32"]
    engines, make_app = [], app.make_app

    def noted(engine, *args):
        engines.append(engine)
        return make_app(engine, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "make_app", noted)
        with serving_thread(lambda: main([*command, "--prefill-chunk-size", "512"])) as port:
            yield SimpleNamespace(port=port, engine=engines[0], folder=folder)


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def haystack(tokenizer, key, tokens=4096, depth=0.3):
    return tokenizer.decode(passkey.prompt(tokenizer, tokens, depth, key)[0])


def post(port, path, body):
    """Status and JSON of a request, whose body may be anything."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def of_chat(client, text, stream=False, **options):
    """Text, reason of the end and usage of an answer."""
    messages = [{"role": "user", "content": text}]
    got = client.chat.completions.create(model="tiny", messages=messages, stream=stream, **{"max_tokens": 8, **options})
    if not stream:
        return got.choices[0].message.content, got.choices[0].finish_reason, got.usage
    parts = list(got)
    assert parts[0].choices[0].delta.role == "assistant"
    return "".join(p.choices[0].delta.content or "" for p in parts), parts[-1].choices[0].finish_reason, parts[-1].usage


def of_completion(client, text, stream=False, **options):
    got = client.completions.create(model="tiny", prompt=text, stream=stream, **{"max_tokens": 8, **options})
    parts = list(got) if stream else [got]
    return "".join(p.choices[0].text for p in parts), parts[-1].choices[0].finish_reason, parts[-1].usage


ASK = pytest.mark.parametrize("ask_for", [of_chat, of_completion], ids=["chat", "completion"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@over_http
@ASK
@STREAM
def test_a_passkey_far_beyond_the_trained_length(client, tokenizer, ask_for, stream):
    """16 times as far as the checkpoint was trained, where it fails without the patch."""
    key = {(of_chat, False): "58213", (of_chat, True): "20649"}.get((ask_for, stream), f"7{int(stream)}384")
    text, reason, usage = ask_for(client, haystack(tokenizer, key), stream)
    assert text.strip().startswith(key) and reason == "length"
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4096, 8, 4104)


@over_http
def test_streams_tell_the_same_as_whole_answers_and_end_as_clients_expect(server, client, tokenizer):
    text = haystack(tokenizer, "31415", 600)
    for ask_for in (of_chat, of_completion):
        assert ask_for(client, text, True, max_tokens=30)[0] == ask_for(client, text, False, max_tokens=30)[0]
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": text, "stream": True, "max_tokens": 2}))
    answer = connection.getresponse()
    events = [line for line in answer.read().decode().split("\n\n") if line]
    connection.close()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in events[:-1])


@over_http
def test_a_second_turn_runs_what_is_new(server, client, tokenizer):
    """By chat, from the texts of the messages alone; with the history edited, the passkey of the edit is found."""
    text = haystack(tokenizer, "46810", 4096, 0.9)
    first = of_chat(client, text)[0]
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": first},
        {"role": "user", "content": passkey.QUESTION.format(name=passkey.NAME)},
    ]
    got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert got.choices[0].message.content.strip().startswith("46810")
    assert server.engine.reused >= 4096
    messages[0] = {"role": "user", "content": text.replace("46810", "97531")}
    got = client.chat.completions.create(model="tiny", messages=messages[:1], max_tokens=8)
    assert got.choices[0].message.content.strip().startswith("97531")
    assert 0.8 * 4096 < server.engine.reused < 0.95 * 4096


@over_http
def test_requests_at_once_wait_for_each_other(client, tokenizer):
    keys = ["11223", "44556", "77889", "90123"]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(of_chat if i % 2 else of_completion, client, haystack(tokenizer, key, 1500), i > 1)
            for i, key in enumerate(keys)
        ]
        assert [job.result()[0].strip()[:5] for job in jobs] == keys


@over_http
@ASK
@STREAM
def test_stop_strings_end_an_answer_and_are_not_in_it(client, tokenizer, ask_for, stream):
    text, reason, _ = ask_for(client, haystack(tokenizer, "52741", 512), stream, stop=["41", "no such"], max_tokens=20)
    assert text.strip() == "527" and reason == "stop"


@over_http
@STREAM
def test_the_end_of_a_text_is_no_part_of_it(server, client, stream):
    """A bias makes the model end at once: a special token counts in the usage, and is not told."""
    text, reason, usage = of_chat(client, "The grass", stream, logit_bias={"0": 1000.0})
    assert (text or "", reason, usage.completion_tokens) == ("", "stop", 1)


@over_http
@STREAM
def test_a_letter_of_several_tokens_comes_whole(client, tokenizer, stream):
    """Three bytes of a letter, each a token of its own, forced one after the other."""
    pieces = tokenizer("€", add_special_tokens=False).input_ids
    assert len(pieces) == 3
    biases = [[pieces[:1], 500.0], [pieces[:2], 1000.0], [pieces[:3], 2000.0]]
    config = json.dumps({"sequence_bias": biases, "max_new_tokens": 3})
    text = of_completion(client, "The grass", stream, extra_body={"generation_config": config}, max_tokens=3)[0]
    assert text == "€"


@over_http
def test_the_same_seed_gives_the_same_answer(client):
    def sampled(seed):
        return of_completion(client, "The grass", seed=seed, temperature=3.0, max_tokens=20)[0]

    assert sampled(1) == sampled(1) != sampled(2)


@over_http
def test_models_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert answer.status == 200 and json.loads(answer.read()) == {"status": "ok"}
    connection.close()


@over_http
@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", b"{nonsense", 400, "the body is no JSON"),
        ("/v1/chat/completions", b"\xff\xfe{}", 400, "the body is no JSON"),
        ("/v1/chat/completions", b"[" * 100_000, 400, "the body is no JSON"),
        ("/v1/completions", b"", 400, "the body is no JSON"),
        ("/v1/completions", [], 400, "must be a JSON object"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "there is no model 'gpt' here: this server"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix='b' is not supported"),
        ("/v1/completions", {"prompt": "a", "generation_config": "{"}, 400, "cannot be answered: JSONDecodeError"),
        ("/v1/completions", {"prompt": "a", "generation_config": '{"num_beams": 2}'}, 400, "num_beams=2 is not"),
        ("/v1/completions", {"prompt": "a", "generation_config": '{"cache_implementation": "paged"}'}, 400, "batching"),
        ("/v1/chat/completions", {**HELLO, "logit_bias": {"a": 1}}, 400, "cannot be answered: ValueError"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, 400, "holds no tokens"),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            400,
            "cannot be answered",
        ),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/health", {}, 405, "Method Not Allowed"),
    ],
)
def test_what_is_wrong_is_said(server, path, body, status, message):
    found, told = post(server.port, path, body)
    assert found == status and message in told["error"]["message"]
    assert post(server.port, "/v1/completions", {"prompt": "The", "max_tokens": 1})[0] == 200


@over_http
@ASK
@STREAM
def test_a_prompt_that_does_not_fit_is_an_error_of_the_request(client, tokenizer, monkeypatch, ask_for, stream):
    import openai

    text = haystack(tokenizer, "10203", 2000)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 16)
    with pytest.raises(openai.BadRequestError, match="GiB|bytes|MiB") as told:
        ask_for(client, text, stream)
    assert told.value.code == "context_length_exceeded" and "free" in told.value.message
    monkeypatch.undo()
    assert ask_for(client, text, stream)[0].strip().startswith("10203")


@over_http
@ASK
def test_an_error_within_an_answer_is_told(server, client, monkeypatch, ask_for):
    import openai

    real, calls = server.engine.model.generate, []

    def breaks(**arguments):
        put = arguments["streamer"].put

        def once(value):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError('a "quoted" fault')
            put(value)

        arguments["streamer"].put = once
        return real(**arguments)

    monkeypatch.setattr(server.engine.model, "generate", breaks)
    with pytest.raises(openai.APIError, match='a "quoted" fault'):
        ask_for(client, "The grass is", stream=True)
    calls.clear()
    with pytest.raises(openai.InternalServerError, match='a \\"quoted\\" fault|a "quoted" fault'):
        ask_for(client, "The grass is", stream=False)
    monkeypatch.undo()
    assert ask_for(client, "The grass is")[1] == "length"


@over_http
@STREAM
@pytest.mark.parametrize("late", [False, True], ids=["prompt", "answer"])
def test_a_client_that_leaves_stops_its_run(server, tokenizer, stream, late):
    """In the middle of the prompt, or of an answer of a million tokens; the next one is answered."""
    layer, seen = server.engine.model.model.layers[0], threading.Event()
    hook = layer.register_forward_pre_hook(lambda *_: (seen.set(), time.sleep(0.05))[0]) if not late else None
    text = haystack(tokenizer, "86420", 4000) if not late else "The grass"
    body = {"prompt": text, "stream": stream, "max_tokens": 10**6}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body))
    if late:
        time.sleep(0.3)
    else:
        assert seen.wait(30)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    begin = time.perf_counter()
    assert post(server.port, "/v1/completions", {"prompt": "The", "max_tokens": 1})[0] == 200
    assert time.perf_counter() - begin < 20
    if hook is not None:
        hook.remove()


@over_http
def test_a_chat_in_the_form_of_qwen(server, client, tokenizer, tmp_path):
    """What the client is told is the answer alone, neither prompt nor marks; without a template chats are refused."""
    import uvicorn

    from qwen_longctx.serving.app import make_app

    ours = AutoTokenizer.from_pretrained(chat_checkpoint(tmp_path / "tiny", CHATML))
    engine = Engine(server.engine.model)
    for one, status in ((ours, 200), (tokenizer, 400)):
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(engine, one, "tiny"), log_level="error")
        with serving_thread(lambda config=config, at=listener: uvicorn.Server(config).run([at])) as port:
            found, told = post(port, "/v1/chat/completions", {**HELLO, "max_tokens": 5})
            assert found == status
        if status == 200:
            ids = ours.apply_chat_template(HELLO["messages"], add_generation_prompt=True, return_tensors="pt")
            ids = ids["input_ids"]
            answer = server.engine.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert told["choices"][0]["message"]["content"].strip() == ours.decode(answer[0, ids.shape[1] :]).strip()
            engine = Engine(server.engine.model)
        else:
            assert "tiny has no chat template: ask /v1/completions" in told["error"]["message"]


@over_http
def test_the_settings_of_the_command_are_those_of_the_patch(server):
    assert settings_of(server.engine.model).prefill_chunk_size == 512


@over_http
def test_a_port_in_use_is_said_before_anything_is_loaded(server, capsys):
    assert main(["serve", str(server.folder), "--port", str(server.port)]) == 2
    told = capsys.readouterr().err
    assert f"cannot listen on port {server.port} of 127.0.0.1: Address already in use. Give another --port" in told


@over_http
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "cannot load the config of '/no/such/folder'"),
        ([str(BUNDLED), "--chunk-size", "10", "--local-size", "20"], "local_size (20) must be smaller"),
        ([str(BUNDLED), "--sparse", "everything"], "sparse must be one of"),
        ([str(BUNDLED), "--host", "no.such.host.invalid"], "cannot listen on port"),
    ],
)
def test_a_command_that_cannot_serve_says_why(capsys, arguments, message):
    assert main(["serve", *arguments, *([] if "--host" in arguments else ["--port", "0"])]) == 2
    assert message in capsys.readouterr().err


@over_http
def test_another_model_is_not_served(tmp_path, capsys):
    shutil.copytree(BUNDLED, tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    assert main(["serve", str(tmp_path / "llama"), "--port", "0"]) == 2
    assert "is a model of type 'llama'" in capsys.readouterr().err


@over_http
def test_the_client_of_the_documentation(server, tokenizer, tmp_path, monkeypatch, capsys):
    """Copied and pasted, but for the port, the name and the number of tokens."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text()
    code = page.partition("<!-- tested: one user -->\n```python\n")[2].partition("```")[0]
    for shown, ours in (
        ("localhost:8000", f"127.0.0.1:{server.port}"),
        ("Qwen/Qwen2.5-7B-Instruct-1M", "tiny"),
        ("stream=True", "stream=True, max_tokens=8"),
        ("\\n\\nSummarise this text.", "\\nWhat is the pass key? The pass key is"),
    ):
        assert shown in code
        code = code.replace(shown, ours)
    (tmp_path / "a_very_long_file.txt").write_text(haystack(tokenizer, "60512", 2048).partition("\nWhat")[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "serving.md", "exec"), {})
    assert capsys.readouterr().out.strip().startswith("60512")
    assert server.engine.reused > 2048
