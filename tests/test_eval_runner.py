"""Modes, samples and the runner of an evaluation, against plain forwards and plain generate of each row alone."""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import eval_tasks
from helpers import tiny_model
from qwen_longctx import LongContextConfig, patch_qwen, patched_qwen, unpatch_qwen
from qwen_longctx.cli import BUNDLED
from qwen_longctx.errors import InvalidType, InvalidValue, MissingFile, NotFinite, PatchConflict, Unsupported
from qwen_longctx.evaluation import modes, runner, samples, tasks, yarn
from qwen_longctx.evaluation.task import Reader, Sample, Task

EVERYTHING = "block_scores:density=1,kernel=reference,sparse_attention_threshold=64,block_size=32"
SMALL = "chunk_size=64,local_size=32,original_max_position_embeddings=64"


@pytest.fixture(scope="module")
def checkpoint():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BUNDLED)


class Letters:
    """A tokenizer of 97 tokens, a character each."""

    chat_template = None

    def __call__(self, text, add_special_tokens=False, verbose=True):
        return type("Encoded", (), {"input_ids": [ord(letter) % 97 for letter in text]})

    def get_vocab(self):
        return {chr(number): number for number in range(97)}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def random_rows(length, count, seed, spread=0, target=5, vocabulary=97, new_tokens=6):
    """Samples of random tokens, whose prompts and targets differ in length by up to `spread`."""
    source = random.Random(seed)
    for _ in range(count):
        ids = [source.randrange(1, vocabulary) for _ in range(length)]
        wanted = target + source.randrange(spread + 1)
        prompt = ids[: length - max(wanted, new_tokens) - source.randrange(spread + 1)]
        yield Sample(tuple(prompt), tuple(ids[-wanted:]), ("1",), new_tokens=new_tokens)


def noise(spread=0, **options):
    return Task("noise", lambda _, *at: random_rows(*at, spread, **options), lambda sample, text: float("1" in text))


KEYS = Task("keys", eval_tasks.samples, eval_tasks.score)


def alone(model, tokenizer, sample, target, eos=None):
    """Mean NLL of the target and the text of the answer: one forward, one plain generate, without batch or cache."""
    ids = torch.tensor([[*sample.prompt, *target]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(sample.prompt) - 1 : -1].double()
        greedy = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=0, max_new_tokens=sample.new_tokens)
        prompt = ids[:, : len(sample.prompt)]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item()
    answer = tokenizer.decode(out[0, len(sample.prompt) :].tolist(), skip_special_tokens=True)
    return nll, answer, bool((logits.argmax(-1) == torch.tensor(target)).all())


# --- figures against a row alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stock", "yarn", f"dense:{SMALL}", f"{EVERYTHING},{SMALL}", "dense:chunk_size=256"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_rows_of_a_batch_are_those_of_a_row_alone(family, mode):
    model, tokenizer = tiny_model(family, torch.float64), Letters()
    task, read = noise(spread=4), modes.mode_of(mode)
    rows = list(runner.evaluate(model, tokenizer, [task], [200], [mode], count=5, batch_tokens=800))
    found = samples.Samples(Reader(tokenizer), 5, 0).of(task, 200)
    assert [row["index"] for row in rows] == list(range(5)) and len({row["tokens"] for row in rows}) > 1
    for row, sample in zip(rows, found, strict=True):
        with modes.in_mode(model, read, 200):
            nll, answer, correct = alone(model, tokenizer, sample, list(sample.target))
        assert row["nll"] == pytest.approx(nll, abs=2e-5), row
        assert (row["answer"], row["target_correct"]) == (answer, correct), row
        assert row["tokens"] == len(sample.prompt) and row["target_tokens"] == len(sample.target)
        assert row["score"] == float("1" in answer)


@pytest.mark.parametrize("mode", ["stock", "dense", EVERYTHING])
def test_answers_of_the_bundled_checkpoint(checkpoint, mode):
    model, tokenizer = checkpoint
    read = modes.mode_of(mode)
    rows = list(runner.evaluate(model, tokenizer, [KEYS], [384], [mode], count=2))
    for row, sample in zip(rows, samples.Samples(Reader(tokenizer), 2, 0).of(KEYS, 384), strict=True):
        target = list(tokenizer(sample.target, add_special_tokens=False).input_ids)
        with modes.in_mode(model, read, 384):
            nll, answer, correct = alone(model, tokenizer, sample, target, eos=0)
        assert row["nll"] == pytest.approx(nll, abs=2e-4)
        assert (row["answer"], row["target_correct"]) == (answer, correct)
    if read.patched:
        assert [row["score"] for row in rows] == [1.0, 1.0] and all(row["target_correct"] for row in rows)


def test_long_targets_in_slices(monkeypatch):
    """More tokens than logits are made at a time, in a mode that prefills them as it would the text."""
    monkeypatch.setattr(runner, "_LOGITS_AT_A_TIME", 7)
    model, task = tiny_model("qwen2", torch.float64), noise(spread=9, target=40, new_tokens=0)
    rows = list(runner.evaluate(model, Letters(), [task], [150], ["dense"], count=3))
    for row, sample in zip(rows, random_rows(150, 3, 0, 9, 40, new_tokens=0), strict=True):
        with patched_qwen(model, sparse="off"), torch.no_grad():
            ids = torch.tensor([[*sample.prompt, *sample.target]])
            logits = model(ids).logits[0, len(sample.prompt) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.target)).item()
        assert row["nll"] == pytest.approx(wanted, abs=2e-5) and row["score"] is row["answer"] is None


def test_a_correct_target_is_the_greedy_answer():
    model = tiny_model("qwen2", torch.float64)
    (sample,) = random_rows(90, 1, 3)
    ids = torch.tensor([sample.prompt])
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[
        0, ids.shape[1] :
    ]
    wrong = [*greedy[:4].tolist(), (int(greedy[4]) + 1) % 97]

    def both(*_):
        for target in (greedy.tolist(), wrong):
            yield Sample(sample.prompt, tuple(target))

    rows = list(runner.evaluate(model, Letters(), [Task("both", both)], [100], ["stock"], count=2))
    assert [row["target_correct"] for row in rows] == [True, False]


def test_answers_end_at_the_end_token_and_checkpoints_do_not_penalise():
    """The second token that a row answers is made its end; sampling settings of the checkpoint change nothing."""
    model, tokenizer, task = tiny_model("qwen2", torch.float64), Letters(), noise(spread=4)
    before = [row["answer"] for row in runner.evaluate(model, tokenizer, [task], [100], ["dense"], count=3)]
    model.generation_config.repetition_penalty = 5.0
    config = model.generation_config
    again = [row["answer"] for row in runner.evaluate(model, tokenizer, [task], [100], ["dense"], count=3)]
    assert again == before and model.generation_config is config
    end = int(before[0].split()[1])
    model.generation_config.eos_token_id = end
    ended = [row["answer"] for row in runner.evaluate(model, tokenizer, [task], [100], ["dense"], count=3)]
    cut = [text.split()[: text.split().index(str(end)) + 1 if str(end) in text.split() else None] for text in before]
    assert [text.split() for text in ended] == cut and len(cut[0]) <= 2


def test_a_likelihood_that_is_no_number_ends_the_run():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NotFinite, match="the likelihood of a target is nan"):
        next(runner.evaluate(model, Letters(), [noise()], [64], ["stock"], count=1))


def test_samples_may_lack_a_target_or_an_answer():
    def either(reader, length, count, seed):
        whole = list(random_rows(length, 2, seed))
        yield Sample(whole[0].prompt, "", ("1",), new_tokens=3)
        yield Sample(whole[1].prompt, whole[1].target)

    task = Task("either", either, lambda sample, answer: 1.0)
    first, second = runner.evaluate(tiny_model(), Letters(), [task], [80], ["stock"], count=2)
    assert first["nll"] is first["target_correct"] is None and first["score"] == 1.0
    assert len(first["answer"].split()) == 3
    assert second["nll"] > 0 and second["score"] is second["answer"] is None


def test_one_prefill_a_batch(monkeypatch):
    """The prompts pass through the model once, for likelihood and answer together."""
    model, seen = tiny_model(), []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    list(runner.evaluate(model, Letters(), [noise()], [100], ["stock"], count=4, batch_tokens=200))
    assert seen == [(2, 93), (2, 5), *[(2, 1)] * 6] * 2


def test_what_runs_alone(monkeypatch):
    """Sparse rows, whose budgets are steered together, and rows of stock whose mask would be large."""
    model = tiny_model()
    assert runner.rows_together(model, modes.mode_of("dense"), 1000, 5000) == 5
    assert runner.rows_together(model, modes.mode_of("dense"), 6000, 5000) == 1
    sparse = modes.mode_of(
        "block_scores:sparse_attention_threshold=500,block_size=32,kernel=reference," + SMALL.replace("16", "32")
    )
    assert runner.rows_together(model, sparse, 500, 5000) == 10
    assert runner.rows_together(model, sparse, 501, 5000) == 1
    assert runner.rows_together(model, modes.mode_of("stock"), 8192, 32768) == 4
    assert runner.rows_together(model, modes.mode_of("stock"), 8193, 32768) == 1


def test_sparse_rows_tell_their_density_and_recall(checkpoint):
    model, tokenizer = checkpoint
    mode = "block_scores:density=0.3,sparse_attention_threshold=256,block_size=32"
    dense, sparse = ([*runner.evaluate(model, tokenizer, [KEYS], [768], [name], count=2)] for name in ("dense", mode))
    assert [(row["density"], row["recall"]) for row in dense] == [(1.0, None)] * 2
    assert all(0.3 < row["density"] < 0.7 and 0 < row["recall"] < 1 for row in sparse)
    (stock,) = runner.evaluate(model, tokenizer, [KEYS], [256], ["stock"], count=1)
    assert stock["density"] is stock["recall"] is None


def test_modes_share_samples_and_done_rows_do_not_run_again(checkpoint):
    model, tokenizer = checkpoint
    store = samples.Samples(Reader(tokenizer), 3, 7)
    both = [modes.mode_of("stock"), modes.mode_of("dense")]
    whole = [row for part in runner.batches(model, [KEYS], [256, 300], both, store) for row in part]
    prints = {mode: [row["fingerprint"] for row in whole if row["mode"] == mode] for mode in ("stock", "dense")}
    assert prints["stock"] == prints["dense"] and len(set(prints["dense"])) == 6
    done = {runner.key_of(row) for row in whole[:7]}
    rest = [row for part in runner.batches(model, [KEYS], [256, 300], both, store, done=done) for row in part]
    assert [runner.key_of(row) for row in rest] == [runner.key_of(row) for row in whole[7:]]
    for one, other in zip(rest, whole[7:], strict=True):  # padding may differ in a batch that lacks rows
        assert one["answer"] == other["answer"] and one["nll"] == pytest.approx(other["nll"], abs=1e-4)


def test_modes_that_are_dense_say_so(caplog):
    model = tiny_model()
    mode = "block_scores:sparse_attention_threshold=90,block_size=32,kernel=reference,local_size=32"
    list(runner.evaluate(model, Letters(), [noise()], [80, 100], [mode], count=1))
    assert f"Mode {mode} is dense at 80 tokens" in caplog.text and "90" in caplog.text
    if not torch.cuda.is_available():
        list(runner.evaluate(model, Letters(), [noise()], [80], ["sparse"], count=1))
        assert "Mode sparse is dense here: no fast kernel runs" in caplog.text


# --- modes --------------------------------------------------------------------------------------------------------


def test_modes_are_read():
    assert modes.mode_of("stock") == modes.Mode("stock")
    assert modes.mode_of("yarn") == modes.Mode("yarn", yarn=True)
    assert modes.mode_of("yarn:factor=2").factor == 2
    assert modes.mode_of("dense").overrides == {"sparse": "off"}
    assert modes.mode_of("sparse:last_q=32").overrides == {"sparse": "auto", "last_q": 32}
    assert modes.mode_of("vertical_slash").overrides == {"sparse": "vertical_slash"}
    dense = modes.mode_of("dense:attention_temperature=false")
    assert dense.overrides == {"sparse": "off", "attention_temperature": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fast",
            "there is no mode 'fast': name some of stock, yarn, dense, sparse, block_scores, exact_shares",
        ),
        ("auto", "there is no mode 'auto'"),
        ("", "there is no mode ''"),
        ("stock:chunk_size=9", "mode stock takes no settings"),
        ("yarn:factor=0.5", "a factor from 1 on"),
        ("yarn:factor=x", "a factor from 1 on"),
        ("yarn:factor=true", "a factor from 1 on"),
        ("yarn:factor=inf", "a factor from 1 on"),
        ("yarn:scale=2", "a factor from 1 on"),
        ("dense:sparse=auto", "says twice whether it is sparse"),
        ("dense:kernel", "a variant reads"),
    ],
)
def test_modes_that_are_none(text, message):
    with pytest.raises(InvalidValue, match=message):
        modes.mode_of(text)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], InvalidValue, "at least one mode"),
        (["dense", "dense"], InvalidValue, "each once, got dense, dense"),
        (["dense:fast=1"], InvalidType, "unknown setting 'fast'"),
        (["block_scores:density=2"], InvalidValue, "density"),
        (["vertical_slash:sparse_attention_config=nowhere.json,local_size=32"], MissingFile, "nowhere"),
        (["block_scores:kernel=fa4,block_size=32,local_size=32"], (InvalidValue, Unsupported), "fa4"),
    ],
)
def test_modes_that_cannot_run_are_told_first(names, error, message):
    model = tiny_model()
    model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    with pytest.raises(error, match=message):
        next(runner.evaluate(model, Letters(), [noise()], [100], names, count=1))


@pytest.mark.parametrize("of_classes", [True, False])
def test_a_patch_in_place_stays_and_holds(of_classes):
    model = tiny_model("qwen2", torch.float64)
    target = None if of_classes else model
    (wanted,) = runner.evaluate(model, Letters(), [noise()], [300], [f"dense:{SMALL}"], count=1)
    (other,) = runner.evaluate(model, Letters(), [noise()], [300], ["dense:chunk_size=128"], count=1)
    patch_qwen(target, chunk_size=128, sparse_attention_threshold=9, density=0.5)
    try:
        for mode in ("stock", "yarn"):
            with pytest.raises(PatchConflict, match=f"mode {mode} runs transformers as it is"):
                next(runner.evaluate(model, Letters(), [noise()], [300], ["dense", mode], count=1))
        (row,) = runner.evaluate(model, Letters(), [noise()], [300], ["dense"], count=1)
        assert row["nll"] == other["nll"] != wanted["nll"]
    finally:
        unpatch_qwen(target)
    assert list(runner.evaluate(model, Letters(), [noise()], [300], ["stock"], count=1))


# --- YaRN ---------------------------------------------------------------------------------------------------------


def written(factor, trained=64, **rope):
    """A model whose config has YaRN written in it, as the model cards do it."""
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained, **rope}
    return tiny_model("qwen3", rope={"rope_theta": 10000.0, **rope}, max_position_embeddings=int(factor * trained))


@pytest.mark.parametrize("factor", [1.5, 4.0, 7.0])
def test_yarn_is_that_of_a_config(factor):
    plain, ids = tiny_model("qwen3", rope={"rope_type": "default", "rope_theta": 10000.0}), torch.arange(1, 91)[None]
    module, config = plain.model.rotary_emb, copy.deepcopy(plain.config.to_dict())
    with torch.no_grad():
        before = plain(ids).logits
        with yarn.stretched(plain, factor):
            stretched = plain(ids).logits
        assert torch.equal(stretched, written(factor)(ids).logits)
        assert not torch.allclose(stretched, before) and torch.equal(plain(ids).logits, before)
    assert plain.model.rotary_emb is module and plain.config.to_dict() == config
    with pytest.raises(RuntimeError), yarn.stretched(plain, factor):
        raise RuntimeError
    assert plain.model.rotary_emb is module


def test_yarn_replaces_the_factor_that_a_config_names():
    ids = torch.arange(1, 91)[None]
    model = written(2.0)
    with torch.no_grad(), yarn.stretched(model, 4.0):
        assert torch.equal(model(ids).logits, written(4.0)(ids).logits)


def test_the_factor_follows_the_length():
    assert [yarn.default_factor(100, length) for length in (50, 400, 500)] == [4.0, 4.0, 5.0]
    model, read = tiny_model("qwen3"), modes.mode_of("yarn")
    for length, factor in ((64, 4.0), (640, 10.0)):
        with yarn.stretched(model, factor):
            wanted = model.model.rotary_emb.inv_freq
        with modes.in_mode(model, read, length):
            assert torch.equal(model.model.rotary_emb.inv_freq, wanted)
            assert model.model.rotary_emb.attention_scaling == pytest.approx(
                0.1 * torch.tensor(factor).log().item() + 1
            )


def test_yarn_refuses_other_rotary_embeddings():
    model = tiny_model(rope={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(InvalidValue, match="are of type 'linear'"):
        next(runner.evaluate(model, Letters(), [noise()], [64], ["yarn"], count=1))


# --- samples ------------------------------------------------------------------------------------------------------


def test_samples_are_read_back_as_they_were_built(tmp_path, checkpoint):
    reader = Reader(checkpoint[1])
    built = samples.Samples(reader, 3, 5).of(KEYS, 300)
    folder = tmp_path / "deep" / "folder"
    assert samples.Samples(reader, 3, 5, folder).of(KEYS, 300) == built
    broken = Task("keys", lambda *_: pytest.fail("built again"), KEYS.score)
    assert samples.Samples(reader, 3, 5, folder).of(broken, 300) == built
    assert all(isinstance(sample.prompt, tuple) and isinstance(sample.answers, tuple) for sample in built)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.unlink()
    samples.Samples(reader, 3, 5, folder).of(KEYS, 300)
    assert path.read_bytes() == content


def test_a_file_for_each_kind_of_samples(tmp_path, checkpoint):
    reader = Reader(checkpoint[1])
    stores = [samples.Samples(reader, *of, tmp_path) for of in ((1, 0), (2, 0), (1, 1))]
    other = samples.Samples(Reader(Letters()), 1, 0, tmp_path)
    chat = samples.Samples(Reader(checkpoint[1], chat=True), 1, 0, tmp_path)
    paths = [store.path(KEYS, 300) for store in (*stores, other, chat)] + [stores[0].path(KEYS, 301)]
    assert len(set(paths)) == len(paths)
    assert stores[0].path(Task("a/../b", eval_tasks.samples), 9).parent == tmp_path


def test_text_prompts_become_tokens_of_the_template():
    class Chat(Letters):
        chat_template = "some"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
            assert not tokenize and add_generation_prompt and not enable_thinking
            return f"<{messages[0]['content']}>"

    task = Task("text", lambda *_: iter([Sample("ab", "c", prefix="so")]))
    reader = samples.reader_of(Chat())
    assert reader.chat and samples.Samples(reader, 1, 0).of(task, 99)[0].prompt == tuple(ord(c) % 97 for c in "<ab>so")
    plain = samples.reader_of(Chat(), chat=False)
    assert samples.Samples(plain, 1, 0).of(task, 99)[0].prompt == tuple(ord(c) % 97 for c in "ab so")
    assert samples.fingerprint_of(reader) != samples.fingerprint_of(plain)
    with pytest.raises(InvalidValue, match="no chat template"):
        samples.reader_of(Letters(), chat=True)
    assert not samples.reader_of(Letters()).chat


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ([], "built 0 samples, 1 were asked for"),
        ([Sample((1, 2), (3,))] * 2, "built 2 samples, 1 were asked for"),
        ([Sample((1,), (3,))], "sample 0 of task odd at 9 tokens has a prompt of 1 tokens"),
        ([Sample((1,) * 8, (3, 4))], "8 tokens of prompt, 2 of target and 0 to generate"),
        ([Sample((1,) * 8, (3,), new_tokens=2)], "8 tokens of prompt, 1 of target and 2 to generate"),
        ([Sample((1, 2), "", new_tokens=2)], "neither a target nor an answer that is scored"),
        ([Sample((1, 97), (3,))], "token id 97, which is outside the model's vocabulary of 97"),
        ([Sample((1, 2), (-3,))], "token id -3, which is outside"),
    ],
)
def test_samples_that_cannot_run(built, message):
    with pytest.raises(InvalidValue, match=message):
        next(runner.evaluate(tiny_model(), Letters(), [Task("odd", lambda *_: iter(built))], [9], ["stock"], count=1))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", MissingFile, "cannot read"),
        (b"no gzip", MissingFile, "cannot read"),
        (gzip.compress(b"{"), MissingFile, "cannot read"),
        (gzip.compress(b"[1]"), InvalidValue, "holds other samples than its name says"),
        (gzip.compress(json.dumps({"task": "keys", "samples": []}).encode()), InvalidValue, "holds other samples"),
    ],
)
def test_sample_files_that_are_damaged(content, error, message, tmp_path):
    store = samples.Samples(Reader(Letters()), 1, 0, tmp_path)
    store.path(KEYS, 300).write_bytes(content)
    with pytest.raises(error, match=message):
        store.of(KEYS, 300)


@pytest.mark.parametrize("nothing", [{"tasks": []}, {"lengths": []}, {"count": 0}, {"lengths": [0]}])
def test_nothing_to_evaluate(nothing):
    request = {"tasks": [noise()], "lengths": [64], "modes": ["stock"], "count": 1, **nothing}
    with pytest.raises(InvalidValue, match="there is nothing to evaluate"):
        runner.evaluate(tiny_model(), Letters(), **request)


def test_a_task_is_found_by_its_path(tmp_path):
    path = Path(tmp_path / "mine.py")
    path.write_text(
        "from qwen_longctx.evaluation.task import Sample, Task\n"
        "def samples(reader, length, count, seed):\n"
        "    for n in range(count): yield Sample((n + 1,) * (length - 1), (seed,))\n"
        "TASKS = (Task('own', samples),)\n"
    )
    rows = list(runner.evaluate(tiny_model(), Letters(), [str(path), noise()], [64], ["stock"], count=2, seed=3))
    assert [row["task"] for row in rows] == ["own", "own", "noise", "noise"] and rows[0]["tokens"] == 63


def test_settings_of_a_mode_are_those_of_the_patch():
    model = tiny_model()
    settings = modes.mode_of("dense:chunk_size=128").settings(model, model.config)
    assert settings == LongContextConfig.from_model_config(model.config, sparse="off", chunk_size=128)


# --- documents ----------------------------------------------------------------------------------------------------


def test_the_example_of_the_documents_runs(tmp_path, checkpoint):
    model, tokenizer = checkpoint
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "TASKS =" in block)
    path = tmp_path / "last_order.py"
    path.write_text(example)
    rows = list(runner.evaluate(model, tokenizer, [str(path)], [512], ["dense"], count=2))
    assert [row["task"] for row in rows] == ["last_order"] * 2
    assert all(400 < row["tokens"] <= 508 and row["score"] in (0.0, 1.0) and row["nll"] > 0 for row in rows)
    (task,) = tasks.find([str(path)])
    sample = next(task.samples(Reader(tokenizer), 512, 1, 0))
    assert sample.prompt.rindex("Order") == sample.prompt.index(f"Order: paint it {sample.answers[0]}.")
    assert [task.score(sample, word) for word in (sample.target, " none", "red green")] == [1.0, 0.0, 0.0]
    with pytest.raises(InvalidValue, match="length must be at least"):
        next(task.samples(Reader(tokenizer), 60, 1, 0))


def test_the_rows_of_the_documents_are_those_of_a_run():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    section = text.partition("## Rows")[2].partition("## Sample files")[0]
    shown = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    (row,) = runner.evaluate(tiny_model(), Letters(), [noise()], [64], ["stock"], count=1)
    assert shown == list(row)
