"""``qwen-longctx eval``: files of samples and results, continued after a kill, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import kill_when_written
from qwen_longctx.cli import BUNDLED, checkpoint, main
from qwen_longctx.cli import eval as cli_eval
from qwen_longctx.evaluation import modes, results, runner, summary

TASK = Path(__file__).with_name("eval_tasks.py").read_text()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a command, with a file of tasks."""
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("a model was loaded"))


def command(*more, model=BUNDLED, lengths=("256", "300"), modes=("stock", "dense")):
    words = ["eval", "--model", str(model), "--dtype", "float32", "--tasks", "mine.py", "--lengths", *lengths]
    return [*words, "--modes", *modes, "--samples", "2", *more]


def rows_of(path):
    """Rows without what a clock gave."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(Path(path).read_text())["rows"]]


def refused(words, capsys):
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("qwen-longctx eval: ")
    return line


def test_eval(folder, capsys):
    assert main(command("--output", "out.json", "--batch-tokens", "600")) == 0
    content = json.loads(Path("out.json").read_text())
    rows = content["rows"]
    assert [(r["task"], r["length"], r["mode"], r["index"]) for r in rows] == [
        (task, length, mode, index)
        for task in ("own_keys", "own_likelihood")
        for length in (256, 300)
        for mode in ("stock", "dense")
        for index in (0, 1)
    ]
    assert content["model"] == "tiny-qwen2" and content["trained_length"] == 256 and content["seed"] == 0
    assert content["dtype"] == "float32" and content["samples"] == 2 and content["chat"] is False
    assert all(r["score"] == 1.0 for r in rows if (r["task"], r["mode"]) == ("own_keys", "dense"))
    assert all(r["score"] is None and r["nll"] < 0.1 for r in rows if (r["task"], r["mode"])[0] == "own_likelihood")
    out = capsys.readouterr().out
    assert "| own_* | 256 | dense | 4 | " in out and "| own_keys | 300 | stock | 2 | " in out
    assert out.splitlines()[-1] == "written to out.json"
    kept = {path.name for path in folder.iterdir()} - {"__pycache__"}  # Python's own, where it writes bytecode
    assert kept == {"mine.py", "out.json", "out.samples"}
    assert len(list(Path("out.samples").iterdir())) == 4


def test_another_base(folder, capsys):
    assert main(command("--base", "stock", lengths=["256"])) == 0
    assert "score over stock" in capsys.readouterr().out and not list(folder.glob("*.json"))


def test_prepare_builds_samples_that_need_no_packages(folder, capsys, monkeypatch):
    """The second command fails if the task builds anything; the first loads nothing but the tokenizer."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("a model was loaded"))
        patch.setattr(checkpoint, "load_config", lambda *args: pytest.fail("a config was loaded"))
        assert main(command("--prepare", "--samples-in", "kept")) == 0
    assert "samples are in kept" in capsys.readouterr().out and len(list(Path("kept").iterdir())) == 4
    Path("mine.py").write_text(TASK.replace("    source =", "    import no_such_package\n    source ="))
    short = {"lengths": ["256"], "modes": ["dense"]}
    assert main(command("--samples-in", "kept", "--output", "out.json", **short)) == 0
    assert len(rows_of("out.json")) == 4
    Path("mine.py").write_text(TASK)
    assert main(command("--output", "other.json", **short)) == 0
    assert rows_of("other.json") == rows_of("out.json")


def test_an_interrupted_run_is_continued(folder, monkeypatch):
    """Nothing runs twice, and the rows are those of a run at one go."""
    again = {"lengths": ["256"]}
    assert main(command("--output", "whole.json", **again)) == 0
    calls, run = [], runner.run

    def interrupted(*args):
        calls.append(args[2:4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(runner, "run", interrupted)
    assert main(command("--output", "out.json", **again)) == 130
    assert len(rows_of("out.json")) == 4
    assert main(command("--output", "out.json", **again)) == 0
    assert rows_of("out.json") == rows_of("whole.json") and len(calls) == 3 + 2
    assert main(command("--output", "out.json", modes=["stock", "dense", "yarn"], **again)) == 0 and len(calls) == 7
    added = rows_of("out.json")[8:]
    assert len(added) == 4 and all(row["mode"] == "yarn" for row in added)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_killed_run_is_continued(folder):
    """Killed without notice in the middle, it goes on from its last batch."""
    again = {"lengths": ["256"]}
    assert main(command("--output", "whole.json", **again)) == 0
    code = "import sys, time\nfrom qwen_longctx.evaluation import runner\nfrom qwen_longctx.cli import main\n"
    code += (
        "run = runner.run\nrunner.run = lambda *args: (time.sleep(0.3), run(*args))[1]\nsys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, *command("--output", "out.json", "--batch-tokens", "300", **again)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when_written(process, Path("out.json"), after=0.4)
    before = rows_of("out.json")
    assert 0 < len(before) < 8
    assert main(command("--output", "out.json", "--batch-tokens", "300", **again)) == 0
    after, whole = rows_of("out.json"), rows_of("whole.json")
    assert after[: len(before)] == before
    for one, other in zip(after, whole, strict=True):  # rows of other batches, which may round otherwise
        assert one == {**other, "nll": pytest.approx(other["nll"], abs=1e-4)}


def other_weights(folder):
    path = Path(shutil.copytree(BUNDLED, folder / "tiny-qwen2")) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.self_attn.q_proj.weight"][0, 3] += 1
    save_file(tensors, path, {"format": "pt"})
    return path.parent


def test_a_file_of_another_run_is_not_continued(folder, capsys):
    assert main(command("--output", "out.json", lengths=["256"], modes=["dense"])) == 0
    before = Path("out.json").read_bytes()

    def again(*more, **other):
        line = refused(
            command("--output", "out.json", *more, **{"lengths": ["256"], "modes": ["dense"], **other}), capsys
        )
        assert Path("out.json").read_bytes() == before
        return line

    assert "was made with seed 0, this run has 1" in again("--seed", "1")
    assert "was made with samples 2, this run has 3" in again("--samples", "3")
    assert "was made with dtype 'float32', this run has 'bfloat16'" in again("--dtype", "bfloat16")
    named = shutil.copytree(BUNDLED, folder / "named")
    assert "was made with model 'tiny-qwen2', this run has 'named'" in again(model=named)
    assert "was made with weights" in again(model=other_weights(folder))
    shutil.rmtree("out.samples")
    Path("mine.py").write_text(TASK.replace("random.Random(seed)", "random.Random(seed + 1)"))
    assert "out.json has results of other samples of own_keys at 256 tokens" in again()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read out.json"),
        ("[]", "holds no results of eval"),
        ('{"rows": [{"tokens": 3}]}', "holds no results"),
    ],
)
def test_a_file_that_is_no_result(content, message, folder, capsys, unloaded):
    Path("out.json").write_text(content)
    assert message in refused(command("--output", "out.json"), capsys)
    assert Path("out.json").read_text() == content


def test_weights_are_told_apart_by_any_tensor():
    from helpers import tiny_model

    model = tiny_model()
    before = results.weights_of(model)
    assert before == results.weights_of(tiny_model())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert results.weights_of(model) != before != results.weights_of(tiny_model(dtype=torch.bfloat16))


# a command, with what replaces its options; None takes one away
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--tasks": ["no_such"]}, "there is no task 'no_such'"),
        ({"--tasks": ["nowhere.py"]}, "there is no file nowhere.py"),
        ({"--tasks": ["empty.py"]}, "empty.py defines no tasks"),
        ({"--modes": ["fast"]}, "there is no mode 'fast'"),
        ({"--modes": ["dense:speed=3"]}, "unknown setting 'speed'"),
        ({"--modes": ["block_scores:density=7"]}, "density"),
        ({"--modes": ["dense", "dense"]}, "each once"),
        ({"--base": ["yarn"]}, "--base yarn is none of the modes stock, dense"),
        ({"--lengths": ["9"]}, "length must be at least"),
        ({"--lengths": ["900000000000"]}, "GiB"),
        ({"--chat": ["on"]}, "no chat template"),
        ({"--model": ["nowhere"]}, "nowhere"),
        ({"--output": ["."]}, "it is a folder"),
        ({"--samples-in": ["mine.py"]}, "cannot write to mine.py"),
        ({"--prepare": []}, "say where with --samples-in"),
    ],
)
def test_requests_that_are_refused_before_weights_load(change, message, folder, capsys, unloaded):
    Path("empty.py").write_text("TASKS = ()\n")
    options = {
        "--model": [str(BUNDLED)],
        "--tasks": ["mine.py"],
        "--lengths": ["256"],
        "--modes": ["stock", "dense"],
        "--samples": ["1"],
        **change,
    }
    words = [word for option, values in options.items() for word in (option, *values)]
    assert message in refused(["eval", *words], capsys)


@pytest.mark.parametrize(
    ("option", "value"), [("--samples", "0"), ("--lengths", "0"), ("--batch-tokens", "-1"), ("--chat", "maybe")]
)
def test_numbers_that_are_none(option, value, folder, capsys, unloaded):
    with pytest.raises(SystemExit):
        main(command(option, value))
    assert f"argument {option}" in capsys.readouterr().err


def test_plot_draws_and_prints_results(folder, capsys):
    pytest.importorskip("matplotlib")
    assert main(command("--output", "out.json", lengths=["256"])) == 0
    shown = capsys.readouterr().out.rpartition("written")[0]
    assert main(["plot", "out.json", "--output", "out.png"]) == 0
    assert Path("out.png").stat().st_size > 1000 and shown in capsys.readouterr().out
    speed = Path(__file__).parents[1] / "benchmarks" / "results" / "speed.json"
    assert main(["plot", "out.json", str(speed), "--output", "out.png"]) == 2
    assert "of one of them only" in capsys.readouterr().err
    assert main(["plot", "out.json", "out.json", "--output", "out.png"]) == 2
    assert "two rows are of sample 0" in capsys.readouterr().err


def test_defaults_are_those_of_the_library():
    """They are written down twice, so that help need not import the library."""
    parser = argparse.ArgumentParser()
    cli_eval.add_arguments(parser)
    found = parser.parse_args(["--model", "m", "--tasks", "t", "--lengths", "1"])
    assert tuple(found.modes) == modes.DEFAULT_MODES and found.base == summary.BASE
    assert (found.samples, found.batch_tokens) == (runner.COUNT, runner.BATCH_TOKENS)
