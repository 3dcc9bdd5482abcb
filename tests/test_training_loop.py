"""Runs of training from their first step to their result: killed and continued, divided among processes, refused."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_longctx import LongContextConfig, patched_qwen
from qwen_longctx.cli import main
from qwen_longctx.errors import InvalidValue, MissingFile, NotFinite, Refused
from qwen_longctx.files import is_leftover
from qwen_longctx.training import loop, result, stages
from qwen_longctx.training.data import source
from qwen_longctx.training.model import set_rope_theta
from qwen_longctx.training.optimiser import Learner
from qwen_longctx.training.packing import IGNORED
from training_runs import BUNDLED, SAVE_EVERY, model_for, rows, run, table, write_texts

peft = pytest.importorskip("peft")
METHODS = ("lora", "full")
FILES = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
TWO = ("two-lora", "two-full-sharded")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("training") / "texts")


@pytest.fixture(scope="module")
def worker(texts):
    """What `training_runs` found out in a process of its own."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(here / "training_runs.py"), str(texts.parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((texts.parent / "found.json").read_text())


# --- killed, and divided ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(worker, texts, method):
    """SIGKILL at random moments: at most the steps between two saves are lost, and in the end nothing."""
    found = worker[f"killed-{method}"]
    assert found["status"] == 0 and len(found["standing"]) >= 4
    assert all(0 <= done - saved <= SAVE_EVERY for done, saved in found["standing"])
    assert any(saved for _, saved in found["standing"])
    whole, killed = (texts.parent / f"{kind}-{method}" for kind in ("whole", "killed"))
    assert rows(killed) == rows(whole)
    for name in (f"result/{FILES[method]}", "result/config.json", "loss_by_position.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    # files that were being written when the process was killed are removed when they are a minute old
    left = {path.name for path in killed.iterdir() if not is_leftover(path.name, path.suffix)}
    assert left == {path.name for path in whole.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", TWO)
def test_two_processes_are_one(worker, texts, name):
    """With copies of the weights, and with the weights divided (FSDP2): gloo, as accelerate launches them."""
    if "sharded" in name and Version(torch.__version__) < Version("2.7"):
        pytest.skip("FSDP of PyTorch 2.6 takes no CPU")
    assert worker[name] == 0
    method = name.split("-")[1]
    one = texts.parent / f"one-{method}"
    if not one.exists():
        run(stages.of(table(texts, method=method)), one)
    two = texts.parent / name
    for mine, other in zip(rows(two)[1:], rows(one)[1:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    found, wanted = (load_file(folder / "result" / FILES[method]) for folder in (two, one))
    assert found.keys() == wanted.keys()
    for key, true in wanted.items():
        torch.testing.assert_close(found[key], true, rtol=1e-4, atol=1e-5)


# --- what a run does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_is_trained_as_it_says(texts, tmp_path, method):
    """Losses of weights that all but stand still are those of stock transformers at the stage's rotary base."""
    still = table(texts, method=method, dtype="float64")
    for stage in still["stages"]:
        stage["learning_rate"] = 1e-14
    recipe = stages.of(still)
    run(recipe, tmp_path / "run")
    log = rows(tmp_path / "run")
    assert [row["stage"] for row in log[1:]] == ["short"] * 4 + ["long"] * 6
    assert [row["step"] for row in log[1:]] == list(range(10))
    model = model_for(recipe)
    data = source(recipe.data, AutoTokenizer.from_pretrained(BUNDLED), recipe.seed)
    for row in log[1:]:
        stage, within = recipe.at(row["step"])
        set_rope_theta(model, stage.rope_theta)
        losses = []
        for number in range(2 * within, 2 * within + 2):
            for index, length in recipe.numbered(stage, number):
                one = data.sequence(index, length)
                for a, b in zip(one.starts[:-1], one.starts[1:], strict=True):
                    logits = model(one.ids[None, a:b]).logits[0]
                    each = functional.cross_entropy(logits, one.labels[a:b], ignore_index=IGNORED, reduction="none")
                    losses.append(each[one.labels[a:b] != IGNORED].detach())
        wanted = torch.cat(losses)
        assert row["counted"] == len(wanted) and row["loss"] == pytest.approx(float(wanted.mean()), rel=1e-6)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("full", "bfloat16")])
def test_results_load_in_stock_transformers_and_in_ours(texts, tmp_path, method, dtype):
    recipe = stages.of(table(texts, method=method, dtype=dtype))
    model = model_for(recipe)
    model.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(model)
    folder = run(recipe, tmp_path / "run", model=model)
    log = rows(tmp_path / "run")
    assert log[-1]["loss"] < log[1]["loss"] - 0.1
    kind = getattr(torch, dtype)
    if method == "lora":
        loaded = result.merged(folder, str(tmp_path / "base"), kind)
        config = type(loaded.config).from_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config, dtype=kind)
        stock = peft.PeftModel.from_pretrained(stock, folder).eval()
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    else:
        loaded = stock = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
        assert len(AutoTokenizer.from_pretrained(folder)) <= 600
    settings = LongContextConfig.from_model_config(loaded.config)
    assert (settings.chunk_size, settings.local_size, settings.original_max_position_embeddings) == (128, 32, 128)
    assert loaded.config.max_position_embeddings == 128
    rotary = loaded.model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary, 50_000.0 ** -(torch.arange(0, 8, 2) / 8))
    ids = torch.randint(1, 500, (1, 100))
    trained = model.eval() if method == "full" else None
    with torch.no_grad():
        ours = loaded(ids).logits
        close = 1e-4 if dtype == "float32" else 0.05
        assert (stock(ids).logits - ours).norm() <= close * ours.norm()
        assert not torch.allclose(before(ids).logits, ours, atol=0.1)
        if trained is not None:
            torch.testing.assert_close(trained(ids).logits, ours)
        with patched_qwen(loaded):
            assert (loaded(ids).logits - ours).norm() <= close * ours.norm()
            assert loaded(torch.randint(1, 500, (1, 400))).logits.isfinite().all()


def test_loss_by_position(texts, tmp_path):
    """Before and after, of the same texts that were held out; the plot is drawn where matplotlib is installed."""
    recipe = stages.of(table(texts))
    model = model_for(recipe)
    data = source(recipe.data, AutoTokenizer.from_pretrained(BUNDLED), recipe.seed)
    text = data.held_out_sequence(0, 128)
    logits = [model(text.ids[None, a:b]).logits[0] for a, b in zip(text.starts[:-1], text.starts[1:], strict=True)]
    losses = functional.cross_entropy(torch.cat(logits), text.labels, ignore_index=IGNORED, reduction="none")
    counted = text.labels != IGNORED
    run(recipe, tmp_path / "run", model=model)
    lines = json.loads((tmp_path / "run" / "loss_by_position.json").read_text())
    for when in ("before", "after"):
        assert sum(row["tokens"] for row in lines[when]) == int(counted.sum())
    for row in lines["before"]:
        at = (text.positions >= row["first"]) & (text.positions <= row["last"]) & counted
        assert row["tokens"] == int(at.sum()) and row["loss"] == pytest.approx(
            float(losses[at].detach().mean()), abs=1e-4
        )
    mean = {w: sum(row["loss"] * row["tokens"] for row in line) for w, line in lines.items()}
    assert mean["after"] < mean["before"]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (tmp_path / "run" / "loss_by_position.png").exists()
    else:
        assert (tmp_path / "run" / "loss_by_position.png").read_bytes()[:4] == b"\x89PNG"


def test_half_precision_learns_by_masters():
    """Steps far below a rounding of bfloat16 add up; without masters the weight would stand still."""
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    learner = Learner({"w": weight}, stages.Optimiser(weight_decay=0.0))
    for _ in range(40):
        (weight.sum() * 1e-3).backward()
        (weight.sum() * 1e-3).backward()
        assert weight.grad is None
        assert learner.step(1e-3) == pytest.approx(4 * 2e-3, rel=0.01)
    assert float(learner.masters["w"].detach().mean()) == pytest.approx(1 - 40e-3, rel=1e-3)
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 40e-3, rel=1e-2)


def test_eight_bit_optimiser():
    """torchao's, whose steps are compiled elsewhere: its state is saved, and goes on to the same bits."""
    pytest.importorskip("torchao")

    def steps(numbers, state=None):
        torch.manual_seed(0)
        weights = {name: torch.nn.Parameter(torch.randn(64, 128).bfloat16()) for name in "ab"}
        learner = Learner(weights, stages.Optimiser(name="adamw_8bit"))
        if state is not None:
            learner.load_state(state)
        for number in numbers:
            torch.manual_seed(number)  # of the rounding
            sum(weight.float().square().sum() for weight in weights.values()).backward()
            learner.step(1e-3 * (number + 1))
        return learner

    with torch.compiler.set_stance("force_eager"):
        whole = steps(range(4)).masters
        file = io.BytesIO()
        torch.save(steps(range(2)).state(), file)
        file.seek(0)
        gone_on = steps((2, 3), torch.load(file, weights_only=True)).masters
    first = steps(()).masters
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)
    assert all((whole[name].abs().mean() < first[name].abs().mean()) for name in whole)


def test_gradients_that_are_no_numbers_stop_the_run(texts, tmp_path):
    recipe = stages.of(table(texts))
    model = model_for(recipe)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="the gradients have a norm of nan: lower learning_rate"):
        run(recipe, tmp_path / "run", model=model)
    assert not (tmp_path / "run" / "result").exists()


# --- what is refused, before the first step -----------------------------------------------------------------------


def prepared(texts, output, model=None, **changed):
    recipe = stages.of(table(texts, **changed))
    return loop.prepare(model_for(recipe).config, AutoTokenizer.from_pretrained(BUNDLED), recipe, output)


def test_folders_that_cannot_be_taken(texts, tmp_path):
    other, file, busy = tmp_path / "other", tmp_path / "file", tmp_path / "busy"
    file.write_text("x")
    busy.mkdir()
    (busy / "thesis.txt").write_text("x")
    prepared(texts, other)
    for folder, said in (
        (file, "is a file: name a folder for the output"),
        (file / "run", "cannot write to"),
        (busy, "holds files of something else (thesis.txt)"),
        ("", "the output folder has no name"),
    ):
        with pytest.raises(InvalidValue) as error:
            prepared(texts, folder)
        assert said in str(error.value)
    with pytest.raises(InvalidValue, match="holds another run: recipe.seed was 0 and is 1; .* Name another folder"):
        prepared(texts, other, seed=1)
    with pytest.raises(InvalidValue, match=r"holds another run: .*learning_rate|stages"):
        prepared(texts, other, stages=table(texts)["stages"][:1])
    kept = prepared(texts, other)
    with pytest.raises(InvalidValue, match="another process works in"):
        prepared(texts, other)
    assert not kept.folder.finished
    assert [path.name for path in busy.iterdir()] == ["thesis.txt"] and file.read_text() == "x"


def test_other_texts_and_other_weights_are_another_run(texts, tmp_path):
    mine = write_texts(tmp_path / "texts")
    recipe = stages.of(table(mine))
    stopped = tmp_path / "run"
    ready = loop.prepare(model_for(recipe).config, AutoTokenizer.from_pretrained(BUNDLED), recipe, stopped)
    of = loop._Run(model_for(recipe), ready)
    of.step = 2
    of._save()
    weights = model_for(recipe)
    weights.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(InvalidValue, match="holds a run on other weights"):
        loop.train(weights, ready)
    (stopped / "state.pt").write_bytes(b"nothing")
    with pytest.raises(MissingFile, match=r"cannot read the state of the run, .*state.pt"):
        loop.train(model_for(recipe), ready)
    for path in mine.iterdir():
        path.write_text(path.read_text().upper())
    with pytest.raises(InvalidValue, match=r"holds another run: texts"):
        loop.prepare(model_for(recipe).config, AutoTokenizer.from_pretrained(BUNDLED), recipe, stopped)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": {"paths": []}}, ""),
        ({"data": {"paths": ["/nowhere"]}}, "/nowhere"),
        (
            {"stages": [{**table(Path("x"))["stages"][0], "sequence_length": 1 << 16}]},
            "fewer than one sequence of 65536",
        ),
        ({"lora": {"rank": 4, "largest_mib": 0.001}}, "an adapter of rank 4 takes 0.0 MiB and largest_mib is 0.001"),
        ({"memory": {"kernel": "fa4"}}, "kernel 'fa4' cannot be taken: it needs a CUDA device"),
        ({"memory": {"kernel": "quick"}}, "kernel must be auto or one of"),
    ],
)
def test_recipes_that_cannot_be_run(texts, tmp_path, changed, said):
    with pytest.raises(Refused) as error:
        run(stages.of(table(texts, **changed)), tmp_path / "run")
    assert said in str(error.value)
    log = tmp_path / "run" / "log.jsonl"
    assert not log.exists() or not any("step" in row for row in rows(tmp_path / "run"))


def test_a_tokenizer_of_another_model(texts, tmp_path):
    recipe = stages.of(table(texts))
    config = model_for(recipe).config
    config.vocab_size = 50
    with pytest.raises(InvalidValue, match=r"the tokenizer makes token \d+, and the model has 50"):
        loop.prepare(config, AutoTokenizer.from_pretrained(BUNDLED), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_command(texts, tmp_path, capsys):
    """A recipe is printed, run, found finished, and its adapter merged."""
    assert main(["train", "--show-recipe"]) == 0
    assert stages.parse(capsys.readouterr().out) == stages.read(stages.DEFAULT)
    text = "[evaluation]\ntexts = 0\n[lora]\nrank = 2\n[[stages]]\nname = 'a'\nsequence_length = 64\nrope_theta = 2e4\n"
    (tmp_path / "recipe.toml").write_text(text + "tokens = 128\nlearning_rate = 1e-3\n")
    given = ["train", "--model", str(BUNDLED), "--data", str(texts), "--recipe", str(tmp_path / "recipe.toml")]
    given += ["--output", str(tmp_path / "run"), "--base-name", "Qwen/tiny", "--device", "cpu"]
    assert main(given) == 0 and "written to" in capsys.readouterr().out
    assert result.base_of(tmp_path / "run" / "result") == "Qwen/tiny"
    assert main(given) == 0 and "has come to its end" in capsys.readouterr().out
    merge = ["train", "--merge", str(tmp_path / "run" / "result"), "--model", str(BUNDLED)]
    assert main([*merge, "--output", str(tmp_path / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.config.dual_chunk_attention_config["chunk_size"] == 64
    capsys.readouterr()
    assert main([*merge, "--output", str(tmp_path / "whole")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--model is missing"),
        (["--model", "x"], "--output is missing"),
        (["--recipe", "longest", "--show-recipe"], "there is no recipe longest: name a TOML file, or one that"),
        (["--model", str(BUNDLED), "--output", "out"], ""),
        (["--model", "nowhere", "--output", "out", "--data", "."], "cannot load the config of 'nowhere'"),
        (["--merge", "nowhere", "--output", "out"], "nowhere holds no adapter_config.json"),
    ],
)
def test_commands_that_are_refused(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qwen-longctx train: ") and said in error and not list(tmp_path.iterdir())
