"""Recipes: what a file means, and what is wrong with one, told before anything else is done."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_longctx.errors import InvalidType, InvalidValue, MissingFile, Refused
from qwen_longctx.training import stages
from qwen_longctx.training.optimiser import rate
from qwen_longctx.training.stages import Optimiser, Recipe, Stage

STAGE = """
[[stages]]
name = "a"
sequence_length = 64
rope_theta = 10_000
tokens = 640
learning_rate = 1e-3
"""


@pytest.mark.parametrize("path", sorted(stages.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_that_come_along_are_read(path):
    recipe = stages.read(path)
    bases = [stage.rope_theta for stage in recipe.stages]
    assert bases == sorted(bases) and recipe.steps == sum(stage.steps for stage in recipe.stages)
    assert stages.of(stages.as_table(recipe)) == recipe


def test_values_are_those_of_the_file():
    text = 'method = "full"\nseed = 3\n[lora]\nrank = 2\n[data]\npaths = ["x", "y"]\nheld_out = 0\n' + STAGE
    recipe = stages.parse(text, data={"paths": ["z"]}, seed=4)
    assert (recipe.method, recipe.seed, recipe.lora.rank, recipe.data.paths) == ("full", 4, 2, ("z",))
    assert recipe.stages[0] == Stage("a", 64, 10_000.0, 640, 1e-3) and recipe.stages[0].steps == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a recipe needs a [[stages]] table"),
        ("seed = \n" + STAGE, "is no TOML"),
        ("sed = 1\n" + STAGE, "has the unknown name 'sed'"),
        ("[lora]\nranks = 1\n" + STAGE, "[lora] of the recipe has the unknown name 'ranks': it knows rank, alpha"),
        (STAGE + "length = 3\n", "[[stages]] of the recipe has the unknown name 'length'"),
        ("seed = -1\n" + STAGE, "seed must be at least 0, got -1"),
        ("seed = true\n" + STAGE, "seed of the recipe must be a whole number, got True"),
        ('seed = "1"\n' + STAGE, "seed of the recipe must be a whole number, got '1'"),
        ("lora = 3\n" + STAGE, "[lora] of the recipe must be a table, got 3"),
        ("stages = 3\n", "stages of the recipe must be tables headed [[stages]], got 3"),
        ("stages = [3]\n", "[[stages]] of the recipe must be a table, got 3"),
        ("data = 3\n" + STAGE, "data of the recipe must be a table headed [data], got 3"),
        ('[data]\npaths = "x"\n' + STAGE, "paths of [data] of the recipe must be a list, got 'x'"),
        ("[data]\npaths = [3]\n" + STAGE, "an entry of paths of [data] of the recipe must be text, got 3"),
        ('method = "qlora"\n' + STAGE, "method must be one of lora, full, got 'qlora'"),
        ('[optimiser]\nname = "sgd"\n' + STAGE, "name must be one of adamw, adamw_8bit, got 'sgd'"),
        ("[optimiser]\nbeta2 = 1\n" + STAGE, "beta2 must be below 1, got 1"),
        ("[optimiser]\nwarmup = 2\n" + STAGE, "warmup must lie between 0 and 1"),
        ('[lora]\nmodules = ["lm_head"]\n' + STAGE, "modules of [lora] must be some of q_proj, "),
        ("[lora]\nrank = 0\n" + STAGE, "rank must be at least 1, got 0"),
        ("[memory]\nslice_tokens = 0\n" + STAGE, "slice_tokens must be at least 1, got 0"),
        ("local_size = 33\n" + STAGE, "local_size (33) must be at most half of the longest stage (64)"),
        (STAGE + STAGE, "stages must have names of their own, got a, a"),
        (STAGE + "short_length = 65\n", "short_length (65) of stage 'a' is above its sequence_length (64)"),
        (STAGE + "short_share = 1.5\n", "short_share must lie between 0 and 1"),
        (STAGE.replace("1e-3", "nan"), "learning_rate must be a number above 0, got nan"),
        (STAGE.replace("10_000", "0"), "rope_theta must be a number above 0, got 0"),
        (STAGE.replace("64\n", "7\n"), "sequence_length of stage 'a' must be at least 8 tokens, got 7"),
        (STAGE.replace('name = "a"\n', ""), "[[stages]] of the recipe lacks name"),
        (STAGE.replace("tokens = 640", 'tokens = "1M"'), "tokens of [[stages]] of the recipe must be a whole number"),
    ],
)
def test_what_is_wrong_is_told(text, said):
    with pytest.raises((InvalidType, InvalidValue)) as error:
        stages.parse(text)
    assert said in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_files_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MissingFile, match="cannot read the recipe"):
        stages.read(path)


@settings(max_examples=60)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists), st.data())
def test_any_value_is_taken_or_refused(value, data):
    """Never another exception, and never a value of another type."""
    table = {"stages": [{"name": "a", "sequence_length": 64, "rope_theta": 1e4, "tokens": 640, "learning_rate": 1e-3}]}
    where = data.draw(st.sampled_from(["stages", "lora", "optimiser", "memory", "evaluation", "data", ""]))
    names = {"stages": Stage, "": Recipe, "optimiser": Optimiser}.get(where)
    names = names or {"lora": stages.Lora, "memory": stages.Memory, "evaluation": stages.Evaluation}.get(where)
    name = data.draw(st.sampled_from(sorted((names or stages.DataSettings).__dataclass_fields__)))
    part = table["stages"][0] if where == "stages" else table.setdefault(where, {}) if where else table
    part[name] = value
    try:
        recipe = stages.of(table)
    except Refused:
        return
    assert stages.of(stages.as_table(recipe)) == recipe and recipe.steps >= 1


@given(st.integers(8, 300), st.integers(2, 300), st.floats(0, 1), st.integers(1, 40))
def test_mix_of_lengths(length, short, share, count):
    """Every sequence is full, and the shorter ones have their share to the nearest whole sequence."""
    share = 0.0 if share < 1e-9 else share
    stage = Stage("a", length, 1e4, length, 1e-3, short_share=share, short_length=min(short, length))
    sequences = [stage.parts(number) for number in range(count)]
    assert all(sum(parts) == length and min(parts) > 1 for parts in sequences)
    assert stage.texts(count) == Counter(part for parts in sequences for part in parts) + Counter()
    if short + 1 < length:  # a single token more goes to the text before it
        assert abs(sum(len(parts) > 1 or parts[0] != length for parts in sequences) - count * share) <= 0.5 + 1e-6


def test_every_text_is_taken_once():
    """By its number and its length, over all stages: resuming and ranks need nothing else."""
    recipe = stages.parse(
        STAGE + "sequences_per_step = 3\nshort_length = 20\n" + STAGE.replace('"a"', '"b"').replace("64\n", "100\n")
    )
    taken: dict[int, list[int]] = {}
    for stage in recipe.stages:
        for number in range(stage.steps * stage.sequences_per_step):
            for index, length in recipe.numbered(stage, number):
                taken.setdefault(length, []).append(index)
    assert set(taken) == {64, 20, 4, 100, 50}
    assert all(numbers == list(range(len(numbers))) for numbers in taken.values())


@pytest.mark.parametrize("schedule", stages.SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_learning_rates(schedule, warmup):
    stage, settings = Stage("a", 64, 1e4, 64 * 50, 2.0), Optimiser(schedule=schedule, warmup=warmup, final=0.25)
    rates = [rate(stage, settings, step) for step in range(stage.steps)]
    rising = round(50 * warmup)
    assert rates[:rising] == pytest.approx([2.0 * (step + 1) / rising for step in range(rising)])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    if rising < 50:
        assert rates[rising] == 2.0 and rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5, rel=0.02)
