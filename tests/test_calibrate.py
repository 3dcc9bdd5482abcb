"""Calibration of budgets: it improves recall, and goes on exactly where it was stopped, wherever that was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import qwen_longctx.evaluation.calibrate as module
from helpers import tiny_model
from qwen_longctx import LongContextCache, files, patched_qwen
from qwen_longctx.checkpoint import Shape
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.errors import InvalidType, InvalidValue, Refused, Unsupported
from qwen_longctx.evaluation.calibrate import Steps, calibrate, check
from qwen_longctx.sparsity import budgets

GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
SETTINGS = {"sparse_attention_threshold": 200, "block_size": 32}
FEW = budgets.HeadBudgets([[31] * 4] * 2, [[101] * 4] * 2, [[0.0] * 4] * 2)
HOW = {"threshold": 0.95, "step": 4, "rounds": 3, **SETTINGS}


def long_model(seed=0):
    model = tiny_model(dtype=torch.float64, dual_chunk_attention_config=dict(GEOMETRY), max_position_embeddings=256)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.01 * seed)
    return model


def text(tokens, seed=2):
    return torch.randint(1, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


class Stopped(BaseException):
    """As an interrupt or a kill would."""


@pytest.fixture
def runs(monkeypatch):
    """The prefills of calibration, as (fingerprint of the text, budgets); `stop_at` ends the one of that number."""

    class Runs(list):
        stop_at = None

    measured, seen = module._recall, Runs()

    def recall(model, ids, held, overrides):
        if len(seen) == seen.stop_at:
            seen.stop_at = None
            raise Stopped
        seen.append((module.corpus.fingerprint(ids), json.dumps(budgets.dump(held))))
        return measured(model, ids, held, overrides)

    monkeypatch.setattr(module, "_recall", recall)
    return seen


def note_of(path):
    return path.with_name(path.name + ".progress")


def test_it_improves_recall_and_loads_back(tmp_path):
    model, path = long_model(), tmp_path / "new" / budgets.FILE_NAME
    how = {"threshold": 0.9, "step": 64, "rounds": 8, **SETTINGS}
    done = calibrate(model, [text(400), text(700)], FEW, path, **how)
    assert done[0].lowest_recall < 0.9 <= done[-1].lowest_recall and done[-1].raised == 0
    assert list(path.parent.iterdir()) == [path]
    recall = []
    for source in (budgets.dump(FEW), str(path)):
        cache = LongContextCache()
        with patched_qwen(model, sparse="vertical_slash", sparse_attention_config=source, **SETTINGS), torch.no_grad():
            model(text(700), past_key_values=cache)
        recall.append(min(x["lowest_recall"] for x in cache.report()["layers"]))
    assert recall[1] > recall[0] and recall[1] >= 0.9
    for row, slashes in zip(budgets.load(path, 2, 4).verticals, budgets.load(path, 2, 4).slashes, strict=True):
        assert all((v - 31) % 64 == 0 and v - 31 == s - 101 for v, s in zip(row, slashes, strict=True))


def test_texts_of_equal_length_are_texts_of_their_own(tmp_path, runs):
    texts = [text(400, 2), text(400, 3)]
    done = calibrate(long_model(), texts, FEW, tmp_path / "x.json", **HOW)
    assert [(one.text, one.number) for one in done] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [ids for ids, _ in runs] == [module.corpus.fingerprint(texts[i]) for i in (0, 0, 0, 1, 1, 1)]


@pytest.mark.parametrize("stop_at", range(6))
def test_it_goes_on_where_it_was_stopped(stop_at, tmp_path, runs):
    """In any prefill of either of two texts of equal length; no prefill is done twice."""
    model, texts = long_model(), [text(400, 2), text(400, 3)]
    whole = calibrate(model, texts, FEW, tmp_path / "whole.json", **HOW)
    wanted = list(runs)
    runs.clear()
    runs.stop_at = stop_at
    with pytest.raises(Stopped):
        calibrate(model, texts, FEW, tmp_path / "cut.json", **HOW)
    assert calibrate(model, texts, FEW, tmp_path / "cut.json", **HOW) == whole
    assert runs == wanted
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"cut.json", "whole.json"}


WRITES = [(number, place) for number in range(6) for place in ("before", "half", "after")]


@pytest.mark.parametrize(("number", "place"), WRITES)
def test_it_goes_on_after_a_stop_in_any_write(number, place, tmp_path, runs, monkeypatch):
    """Each round writes a note and the file. Stopped before, within or after any of them, nothing is lost or doubled
    but for a prefill whose note was not there yet."""
    model, texts, path = long_model(), [text(400, 2), text(400, 3)], tmp_path / "cut.json"
    how = {**HOW, "rounds": 2}
    whole = calibrate(model, texts, FEW, tmp_path / "whole.json", **how)
    wanted = list(runs)
    runs.clear()
    writes = []

    def stopping(target):
        writes.append(target)
        if len(writes) == number + 1 and place == "before":
            raise Stopped
        return replacing(target)

    replacing = files.replacing

    class Cut:
        """The write of one file, stopped at its place."""

        def __init__(self, target):
            self.context, self.now = stopping(target), len(writes) == number + 1

        def __enter__(self):
            fresh = self.context.__enter__()
            if self.now and place == "half":
                fresh.write_text("half a fi")
                self.context.__exit__(Stopped, Stopped(), None)
                raise Stopped
            return fresh

        def __exit__(self, *error):
            self.context.__exit__(*error)
            if self.now and place == "after":
                raise Stopped

    monkeypatch.setattr(module, "replacing", Cut)
    with pytest.raises(Stopped):
        calibrate(model, texts, FEW, path, **how)
    monkeypatch.setattr(module, "replacing", replacing)
    noted = len(json.loads(note_of(path).read_text())["rounds"]) if note_of(path).exists() else 0
    assert noted == number // 2 + (number % 2 == 1 or place == "after")
    before = len(runs)
    assert calibrate(model, texts, FEW, path, **how) == whole
    assert runs[:noted] + runs[before:] == wanted
    assert path.read_text() == (tmp_path / "whole.json").read_text() and not note_of(path).exists()


def stopped_after(rounds, path, runs, model=None, texts=None, start=FEW, **how):
    runs.clear()
    runs.stop_at = rounds
    with pytest.raises(Stopped):
        calibrate(model or long_model(), texts or [text(400)], start, path, **{**HOW, **how})


OTHERS = [
    ({"texts": [text(400, 3)]}, "texts"),
    ({"texts": [text(401)]}, "texts"),
    ({"texts": [text(400), text(400, 3)]}, "texts, settings"),
    ({"model": long_model(1)}, "model"),
    ({"start": FEW._replace(slashes=[[102] * 4] * 2)}, "start"),
    ({"threshold": 0.8}, "steps"),
    ({"step": 5}, "steps"),
    ({"rounds": 4}, "steps"),
    ({"last_q": 32}, "settings"),
    ({"attention_temperature": False}, "settings"),
]


@pytest.mark.parametrize(("other", "named"), OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_progress_of_another_call_is_refused_and_kept(other, named, tmp_path, runs):
    path = tmp_path / "x.json"
    stopped_after(2, path, runs)
    before = path.read_text(), note_of(path).read_text()
    arguments = {"model": long_model(), "texts": [text(400)], "start": FEW, **HOW, **other}
    with pytest.raises(InvalidValue, match=rf"notes the progress of another call \({named} differ\): finish that call"):
        calibrate(output=path, **arguments)
    assert len(runs) == 2 and (path.read_text(), note_of(path).read_text()) == before


def test_a_moved_checkpoint_and_a_text_of_another_dtype_are_the_same(tmp_path, runs):
    path, model = tmp_path / "x.json", long_model()
    stopped_after(2, path, runs, model)
    model.config.name_or_path = "elsewhere"
    assert len(calibrate(model, [text(400).int()], FEW, path, **HOW)) == 3 and len(runs) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"request": 3}', '{"request": {"threshold": 0.9}, "rounds": []}']
)
def test_what_is_no_note(content, tmp_path, runs):
    path = tmp_path / "x.json"
    note_of(path).write_text(content)
    with pytest.raises(InvalidValue, match="is no note of progress that calibrate can read: delete it"):
        calibrate(long_model(), [text(400)], FEW, path, **HOW)
    assert not runs and not path.exists()


def test_a_narrow_budget_is_read_as_a_file_is(tmp_path, runs):
    """Qwen reads 30 columns as 130; a call that goes on must not read them otherwise than the one that was stopped."""
    narrow = FEW._replace(verticals=[[30] * 4] * 2)
    whole = calibrate(long_model(), [text(400)], narrow, tmp_path / "whole.json", **HOW)
    stopped_after(1, tmp_path / "cut.json", runs, start=narrow)
    assert calibrate(long_model(), [text(400)], narrow, tmp_path / "cut.json", **HOW) == whole
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = [
    ({"threshold": 1.0}, InvalidValue, "threshold must lie between 0 and 1, got 1.0"),
    ({"threshold": float("nan")}, InvalidValue, "threshold must lie between 0 and 1, got nan"),
    ({"threshold": "high"}, InvalidType, "threshold must be a number, got 'high'"),
    ({"step": 0}, InvalidValue, "step must be at least 1, got 0"),
    ({"step": -2048}, InvalidValue, "step must be at least 1, got -2048"),
    ({"rounds": 1.5}, InvalidType, "rounds must be a whole number, got 1.5"),
    ({"rounds": True}, InvalidType, "rounds must be a whole number, got True"),
    ({"texts": []}, InvalidValue, "there is no text to calibrate on"),
    ({"texts": [text(400)[0]]}, InvalidValue, r"shape \(1, tokens\), got torch.int64 of shape \(400,\)"),
    ({"texts": [text(400), text(400).float()]}, InvalidValue, "torch.float32"),
    ({"texts": [text(400) > 3]}, InvalidValue, "torch.bool"),
    ({"texts": [[1, 2, 3]]}, InvalidType, "a text must be a tensor of token ids, got list"),
    ({"texts": [text(400) + 90]}, InvalidValue, "outside the model's vocabulary of 97"),
    ({"texts": [text(200)]}, InvalidValue, "at least 201 tokens for this checkpoint and these settings, got 200"),
    ({"texts": [text(95)], "sparse_attention_threshold": 1}, InvalidValue, "at least 96 tokens"),
    ({"prefill_chunk_size": 31}, InvalidValue, "prefill_chunk_size is 31, shorter than a block of 32 tokens"),
    ({"start": budgets.uniform(3, 4)}, InvalidValue, "must list 2 layers, got 3"),
    ({"start": budgets.uniform(2, 5)}, InvalidValue, "names head '4' of layer 0: the model has 4"),
    ({"density": 0.5}, InvalidValue, "density is a setting of block_scores"),
    ({"sparse": "off"}, InvalidValue, "sparse is 'off', and calibrate gives it itself"),
    ({"recall_target": 0.9}, InvalidValue, "recall_target is 0.9, and calibrate gives it itself"),
    ({"deep": 1}, InvalidType, "unknown setting 'deep'"),
    ({"output": "/proc/nowhere/x.json"}, InvalidValue, "cannot write to /proc/nowhere/x.json"),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED)
def test_what_is_refused(values, error, message, tmp_path, runs):
    arguments = {"texts": [text(400)], "start": FEW, "output": tmp_path / "x.json", **SETTINGS, **values}
    with pytest.raises(error, match=message):
        calibrate(long_model(), **arguments)
    assert not runs and not any(tmp_path.iterdir())


def test_numbers_of_numpy(tmp_path):
    assert Steps(np.float32(0.5), np.int64(4), np.uint8(2)) == Steps(0.5, 4, 2)
    assert [type(x) for x in (Steps(step=np.int64(4)).step, replace(Steps(), threshold=np.float64(0.5)).threshold)] == [
        int,
        float,
    ]


def test_a_part_of_the_heads_is_refused(tmp_path, monkeypatch):
    """Each process would raise the budgets of its own heads, and write them as those of the first."""
    monkeypatch.setattr(module, "local_shape", lambda model: Shape.of(model.config, 2))
    with pytest.raises(Unsupported, match="calibrate needs all heads and layers in one process"):
        calibrate(long_model(), [text(400)], FEW, tmp_path / "x.json", **HOW)


def test_check_needs_a_config_only():
    check(long_model().config, [400], FEW, SETTINGS)
    with pytest.raises(Refused):
        check(long_model().config, [40], FEW)


# --- the command --------------------------------------------------------------------------------------------------

COMMAND = ["calibrate", "--package", "qwen_longctx", "--dtype", "float32", "--rounds", "1"]


def test_the_command(tmp_path, capsys):
    """A length that is given twice is one text."""
    output = tmp_path / "x.json"
    assert main([*COMMAND, "--model", str(BUNDLED), "--lengths", "600", "600", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert out.count("600 tokens, round 1: recall 1.0000") == 1
    config = AutoModelForCausalLM.from_pretrained(BUNDLED).config
    budgets.load(output, config.num_hidden_layers, config.num_attention_heads)


def test_the_command_refuses_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qwen_longctx.cli.checkpoint.load_model", lambda *args: pytest.fail("a model was loaded"))
    base = [*COMMAND, "--model", str(BUNDLED), "--lengths", "600", "--output", str(tmp_path / "x.json")]
    for words, message in (
        (["--threshold", "1"], "threshold must lie between 0 and 1, got 1.0"),
        (["--start", ""], "there is no file"),
        (["--start", str(tmp_path)], "there is no file"),
        (["--lengths", "100"], "a text must have at least"),
    ):
        assert main([*base, *words]) == 2
        assert message in capsys.readouterr().err


def test_budgets_that_the_checkpoint_has_and_that_are_not_there(tmp_path, capsys):
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": 256,
        "local_size": 64,
        "original_max_position_embeddings": 256,
        "sparse_attention_enabled": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [*COMMAND, "--model", str(folder), "--lengths", "600", "--output", str(tmp_path / "x.json")]
    assert main(command) == 2
    assert "vertical_slash needs the budgets that" in capsys.readouterr().err


KILLED = """
import os, sys
import qwen_longctx.evaluation.calibrate as module
from qwen_longctx.cli import main
from qwen_longctx.sparsity import budgets
budgets.DEFAULT = (31, 101)
writes, replacing = [], module.replacing
def killing(target):
    writes.append(target)
    if len(writes) == 4:
        os._exit(9)
    return replacing(target)
module.replacing = killing
main(sys.argv[1:])
"""


def test_a_command_that_writes_into_the_checkpoint_and_is_killed_goes_on(tmp_path, monkeypatch, capsys):
    """The file that it writes is then where budgets are looked for: the start is that of the first call."""
    monkeypatch.setattr(budgets, "DEFAULT", (31, 101))
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "checkpoint"))
    output, whole = folder / budgets.FILE_NAME, tmp_path / "whole.json"
    command = ["calibrate", "--model", str(folder), "--lengths", "600", "--package", "qwen_longctx"]
    command += ["--dtype", "float32", "--rounds", "3", "--step", "8", "--threshold", "0.99", "--output"]
    assert main([*command, str(whole)]) == 0
    wanted = capsys.readouterr().out
    assert wanted.count("round") == 3
    killed = subprocess.run([sys.executable, "-c", KILLED, *command, str(output)])
    assert killed.returncode == 9  # between the note and the file of the second round
    assert output.exists() and len(json.loads(note_of(output).read_text())["rounds"]) == 2
    assert main([*command, str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == wanted.splitlines()[:-1]
    assert output.read_text() == whole.read_text() and not note_of(output).exists()
