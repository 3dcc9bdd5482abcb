"""A file of tasks as a user would write it: passkeys, and their likelihood alone."""

from __future__ import annotations

import random

from qwen_longctx.evaluation import passkey
from qwen_longctx.evaluation.task import Sample, Task


def samples(reader, length, count, seed):
    source = random.Random(seed)
    for _ in range(count):
        key = passkey.random_key(source)
        ids = passkey.prompt(reader.tokenizer, length - 8 - source.randrange(9), source.random(), key)
        yield Sample(tuple(ids[0].tolist()), " " + key, (key,), new_tokens=8)


def score(sample, answer):
    return float(passkey.is_correct(answer, sample.answers[0]))


TASKS = (Task("own_keys", samples, score), Task("own_likelihood", samples))
