"""What a user can get wrong on the command line is told in one line before any work; results survive a killed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_longctx.cli as cli
from helpers import OLD_TRANSFORMERS, kill_when_written
from qwen_longctx import files, patched_qwen
from qwen_longctx.cli import BUNDLED, checkpoint, main
from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation import modes, passkey, quality
from qwen_longctx.evaluation.environment import write_results

COMMANDS = [module.__name__.rpartition(".")[2] for module in cli._COMMANDS]
PASSKEY = ["passkey", "--lengths", "256", "--depths", "0.5", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def unloaded(monkeypatch):
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture
def copy(tmp_path):
    """A copy of the bundled checkpoint, to break."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "checkpoint"))


def refused(command, capsys):
    """The one line of a command that must be refused."""
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    ours = [line for line in lines if line.startswith(f"qwen-longctx {command[0]}: ")]
    assert len(ours) == 1 and lines[-1] == ours[0], lines
    return ours[0]


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda command: " ".join(command) or "-")
def test_help_is_quick_and_imports_nothing_heavy(command):
    code = (
        "import sys, qwen_longctx.cli as c\n"
        "try: c.main(sys.argv[1:] + ['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):  # the quickest counts: machines that run tests are shared
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "usage: qwen-longctx" in done.stdout and "--help" in done.stdout
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1, seconds


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "qwen_longctx.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)


# --- the boundary -------------------------------------------------------------------------------------------------


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Only errors of ours become one line: a ValueError of anybody else is a defect to be seen."""

    def broken(args):
        raise ValueError("a defect")

    monkeypatch.setattr(cli.doctor, "run", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["doctor"])


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "qwen-longctx doctor: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    """As in ``qwen-longctx doctor | head -0``."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "qwen_longctx.cli", "doctor"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["ü漢字.json", os.fsdecode(b"\xff.json")])
def test_a_terminal_that_lacks_letters_of_a_name(name, tmp_path):
    """The work is done, and its end must not be a traceback."""
    command = [sys.executable, "-m", "qwen_longctx.cli", *PASSKEY, "--model", str(BUNDLED), "--output", name]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written to \\" in done.stdout and json.loads((tmp_path / name).read_text())["records"]


# --- checkpoints --------------------------------------------------------------------------------------------------


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def a_tensor_is_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def another_tokenizer(folder):
    """Of a model with a larger vocabulary: some of its ids have no embedding here."""
    change(folder, vocab_size=300)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "qwen2",')


def a_list_as_config(folder):
    (folder / "config.json").write_text("[1]")


def no_config(folder):
    (folder / "config.json").unlink()


def no_qwen(folder):
    change(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def of_no_known_type(folder):
    change(folder, model_type="qwen99")


def no_activation(folder):
    change(folder, hidden_act="nonsense")


def no_heads(folder):
    change(folder, num_attention_heads=0)


def budgets_of_its_own(folder):
    section = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
    change(folder, dual_chunk_attention_config={**section, "sparse_attention_enabled": True})


def layers_in_words(folder):
    change(folder, num_hidden_layers="four")


WHOLE = "that the checkpoint is whole"
CHECKPOINTS = [
    (cut_short, ("cannot load the weights", WHOLE)),
    (empty_weights, ("cannot load the weights", WHOLE)),
    (no_weights, ("cannot load the weights", "model.safetensors", WHOLE)),
    (a_tensor_is_missing, ("lack 1 tensors, model.layers.1.mlp.up_proj.weight for one", "copy the checkpoint anew")),
    (no_tokenizer, ("tokenizer",)),
    (broken_tokenizer, ("cannot load the tokenizer",)),
    (another_tokenizer, ("outside the model's vocabulary of 300", "use the tokenizer that belongs to the checkpoint")),
    (broken_config, ("cannot load the config",)),
    (a_list_as_config, ("cannot load the config",)),
    (no_config, ("cannot load the config",)),
    (no_qwen, ("is a model of type 'llama': name one of those known, qwen2, qwen2_moe, qwen3, qwen3_moe",)),
    (of_no_known_type, ("cannot load the config", "qwen99")),
    (layers_in_words, ("cannot load the config", "num_hidden_layers")),
    (no_activation, ("cannot load the weights", "nonsense")),
    (no_heads, ("num_attention_heads of the checkpoint's config must be a whole number from 1 on, got 0",)),
]


@pytest.mark.parametrize(("broken", "messages"), CHECKPOINTS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_checkpoints(broken, messages, copy, capsys):
    broken(copy)
    line = refused([*PASSKEY, "--model", str(copy)], capsys)
    assert all(message in line for message in messages), line


@pytest.mark.parametrize("broken", [no_heads, no_activation], ids=lambda value: value.__name__)
def test_plan_of_a_broken_config(broken, copy, capsys):
    """It loads no weights, and must find out by itself."""
    broken(copy)
    assert "correct config.json" in refused(["plan", str(copy), "--tokens", "9"], capsys)


def test_budgets_that_are_not_there_are_told_before_a_model_is_loaded(copy, capsys, unloaded):
    budgets_of_its_own(copy)
    for command in (
        [*PASSKEY, "--sparse", "vertical_slash"],
        ["quality", "--lengths", "512", "--variants", "vertical_slash"],
    ):
        assert "needs the budgets that" in refused([*command, "--model", str(copy)], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex would run there")
def test_a_kernel_that_does_not_run_is_told_before_the_first_row(capsys):
    command = [
        "quality",
        *B,
        "--lengths",
        "512",
        "--packages",
        "qwen_longctx",
        "--variants",
        "block_scores:kernel=flex",
    ]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and 'kernel="flex" needs a CUDA device' in err


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="transformers 4.57 cannot load all weights to disk")
def test_weights_on_disk(tmp_path):
    """Accelerate keeps them away from every device, and the model says that its own is "meta"."""
    model = AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=torch.float32, device_map={"": "disk"}, offload_folder=tmp_path
    )
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = passkey.prompt(tokenizer, 300, 0.5, "12345")
    with patched_qwen(model):
        assert passkey.ask(model, tokenizer, 300, 0.5, "12345").correct
    assert [row["variant"] for row in quality.evaluate(model, tokenizer, ids, [modes.variant("off")])] == [
        "dense",
        "off",
    ]


@pytest.mark.parametrize("name", ["no/such/folder", "no such name", "", "nobody/nothing", "x" * 300])
@pytest.mark.parametrize("command", ["passkey", "quality", "calibrate", "plan"])
def test_no_checkpoint(command, name, tmp_path, capsys, unloaded):
    rest = ["--tokens", "9"] if command == "plan" else ["--lengths", "9000"]
    named = [name] if command == "plan" else ["--model", name]
    rest += ["--output", str(tmp_path / "x.json")] if command == "calibrate" else []
    assert f"cannot load the config of {name!r}" in refused([command, *named, *rest], capsys)


@pytest.mark.parametrize("place", ["banana", "cuda:77", "{", "", "meta"])
def test_no_such_device(place, capsys):
    message = "--device-map meta loads no weights" if place == "meta" else "cannot load the weights"
    assert message in refused([*PASSKEY, "--model", str(BUNDLED), "--device-map", place], capsys)


# --- requests -----------------------------------------------------------------------------------------------------

B = ["--model", str(BUNDLED)]
SHORT = ["quality", *B, "--lengths", "512", "--judged", "9"]
REQUESTS = [
    (["passkey", *B, "--lengths", "20"], "length must be at least"),
    (["passkey", *B, "--lengths", "1000000000000"], "ask for fewer tokens"),
    (["quality", *B, "--lengths", "1"], "a text must have at least 2 tokens, one to judge and one before it, got 1"),
    (
        ["quality", *B, "--lengths", "512", "--judged", "8192"],
        "judged must be between 1 and 511 for a text of 512 tokens, got 8192",
    ),
    (["quality", *B, "--lengths", "900", "512", "--judged", "512"], "judged must be between 1 and 511"),
    (
        [*SHORT, "--packages", "os.path"],
        "package 'os.path' is not installed",
    ),
    ([*SHORT, "--packages", "a.b"], "package 'a.b' is not installed"),
    ([*SHORT, "--packages", ""], "package '' is not installed"),
    (
        [*SHORT, "--variants", "block_scores:density=nan"],
        "density must lie",
    ),
    (
        [*SHORT, "--variants", "block_scores:deep=1"],
        "unknown setting 'deep'",
    ),
    (["quality", *B, "--lengths", "40", "--judged", "9", "--depths", "0.5"], "length must be at least"),
    (["quality", *B, "--lengths", "5000000", "--judged", "9", "--packages", "json"], "name a larger package"),
    (
        [*SHORT, "--variants", "off", "vertical_slash:sparse_attention_config=nowhere.json"],
        "there is no file nowhere.json",
    ),
    (
        [*SHORT, "--variants", "off", "vertical_slash:sparse_attention_config=minference"],
        "needs the package minference",
    ),
    (["calibrate", *B, "--lengths", "900", "191", "--output", "never_written.json"], "at least 192 tokens"),
    (
        ["bench", "stock", "--density", "0.5"],
        "option of bench speed and vllm and pipeline and ranks and tensor-parallel, got bench stock: leave it out",
    ),
    (["bench", "headline", "--whole-up-to", "0"], "--whole-up-to is an option of bench speed"),
    (["bench", "decode", "--memory-limit", "24GB"], "--memory-limit is an option of bench speed and memory"),
    (["bench", "stock", "--shape", "qwen2.5-14b"], "--shape is an option of bench speed and memory and vllm"),
    (
        ["bench", "speed", "--tiny", "--shape", "qwen2.5-0.5b"],
        "--shape of bench speed is one of qwen2.5-7b, qwen2.5-14b",
    ),
    (["bench", "train", "--tiny", "--train-kernel", "fast"], "kernel must be auto or one of fa4"),
]
REQUESTS += [
    (["bench", "simulation"], "give --from-results with files of bench speed"),
    (["bench", "simulation", "--from-results", "nowhere.json"], "cannot read nowhere.json"),
    (["bench", "speed", "--cards", "2"], "--cards is an option of bench pipeline, got bench speed"),
]
if not torch.cuda.is_available():
    REQUESTS += [
        (["bench", "speed", "--tiny", "--lengths", "900", "383"], "at least 384 tokens, got 383"),
        (["bench", "memory", "--tiny", "--lengths", "383"], "bench memory measures prompts of at least 384 tokens"),
        (["bench", "speed", "--tiny", "--memory-limit", "24GB"], "kept by CUDA devices only"),
        (["bench", "stock", "--tiny", "--lengths", "1000000000000000"], "ask for fewer tokens"),
    ]


@pytest.mark.parametrize(("command", "message"), REQUESTS)
def test_requests_are_refused_before_a_model_is_loaded(command, message, capsys, unloaded):
    assert message in refused(command, capsys)


NUMBERS = [
    ("--lengths", "0", "must be at least 1, got 0"),
    ("--lengths", "-5", "must be at least 1, got -5"),
    ("--lengths", "1e3", "must be a whole number, got '1e3'"),
    ("--lengths", "9" * 5000, "must be a whole number"),
    ("--lengths", "9" * 40, "must be at most 1,000,000,000,000,000"),
    ("--depths", "1.5", "must lie between 0 and 1, got 1.5"),
    ("--depths", "nan", "must lie between 0 and 1, got nan"),
    ("--depths", "deep", "must be a number, got 'deep'"),
    ("--repeats", "0", "must be at least 1, got 0"),
    ("--dtype", "int8", "invalid choice: 'int8'"),
    ("--sparse", "fast", "invalid choice: 'fast'"),
]


@pytest.mark.parametrize(("option", "value", "message"), NUMBERS)
def test_numbers(option, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["passkey", *B, "--lengths", "256", option, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--density", "--dense-layers"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "x"])
def test_numbers_of_bench(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "speed", "--tiny", option, value])
    assert stopped.value.code == 2 and f"argument {option}: must be" in capsys.readouterr().err


# --- output -------------------------------------------------------------------------------------------------------


def outputs(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return {
        "folder": tmp_path,
        "below a file": tmp_path / "file" / "x.json",
        "device": "/dev/null",
        "read-only": "/proc/nowhere.json",
        "read-only folder": "/proc/nowhere/x.json",
        "too long": tmp_path / f"{'x' * 300}.json",
        "circle": tmp_path / "circle",
        "empty": "",
    }


@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["passkey", *B, "--lengths", "256"],
        ["quality", *B, "--lengths", "512", "--judged", "9"],
        ["eval", *B, "--lengths", "256", "--tasks", "none"],
        ["calibrate", *B, "--lengths", "600"],
        ["bench", "stock", "--tiny"],
        ["plot", "nothing.json"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc as a folder that nobody can write to")
@pytest.mark.skipif(torch.cuda.is_available(), reason="bench would measure there")
def test_output_that_cannot_be_written_is_told_first(command, tmp_path, capsys, unloaded):
    if command[0] == "plot":
        pytest.importorskip("matplotlib")
    for name, path in outputs(tmp_path).items():
        line = refused([*command, "--output", str(path)], capsys)
        expected = "the name of the output file is empty" if name == "empty" else f"cannot write to {str(path)!s}"
        assert expected in line or repr(str(path)) in line, (name, line)
    assert (tmp_path / "file").read_text() == "kept"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "circle"}


def test_checking_leaves_an_earlier_file_and_no_other(tmp_path):
    path = tmp_path / "new" / "x.json"
    files.check_writable(path)
    assert path.parent.is_dir() and not any(path.parent.iterdir())
    path.write_text("earlier")
    files.check_writable(path)
    assert path.read_text() == "earlier" and list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = write_results(tmp_path / "x.json", {"rows": [1]})
    before = path.read_text()
    with pytest.raises(TypeError):
        write_results(path, {"rows": [object()]})
    with pytest.raises(RuntimeError), files.replacing(path) as fresh:
        fresh.write_text("half a fi")
        raise RuntimeError
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions_and_a_link_stays_one(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target.json")
    write_results(tmp_path / "link", {"rows": []})
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "target.json").read_text())["rows"] == []
    assert (tmp_path / "target.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_passkey_writes_after_every_row(tmp_path, monkeypatch):
    output, seen, ask = tmp_path / "x.json", [], passkey.ask

    def watched(*args):
        seen.append(len(json.loads(output.read_text())["records"]) if output.exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(passkey, "ask", watched)
    assert main([*PASSKEY, *B, "--repeats", "5", "--output", str(output)]) == 130
    assert seen == [0, 1, 2] and len(json.loads(output.read_text())["records"]) == 2


def test_a_killed_run_leaves_its_last_complete_file(tmp_path):
    """Killed without notice while it writes all the time, it leaves a file that can be read."""
    path = tmp_path / "x.json"
    code = (
        "import sys\nfrom qwen_longctx.evaluation import environment as e\n"
        "e.environment = lambda: {}\n"
        "for i in range(10**9): e.write_results(sys.argv[1], {'rows': list(range(20000)), 'number': i})"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(path)])
    kill_when_written(run, path, after=0.2)
    assert json.loads(path.read_text())["rows"] == list(range(20000))


# --- plot ---------------------------------------------------------------------------------------------------------

SPEED = {"tokens": 9, "sparse_seconds": 1.0, "dense_seconds": 2.0}
QUALITY = {"tokens": 9, "variant": "dense", "nll": 1.0, "agreement": 1.0, "density": 1.0}
RESULTS = [
    ("{", "cannot read"),
    ("\x00\xff", "cannot read"),
    ("[" * 100_000, "cannot read"),
    ("[1, 2]", "give files of quality, or of bench speed"),
    ('{"rows": 3}', "give files of quality, or of bench speed"),
    ('{"rows": [3]}', "give files of quality, or of bench speed"),
    ('{"rows": []}', "give files of quality, or of bench speed"),
    ({"rows": [{**SPEED, "tokens": "many"}]}, "tokens of a row must be a number, got 'many'"),
    ({"rows": [{**SPEED, "dense_seconds": None}]}, "dense_seconds of a row must be a number, got None"),
    ({"rows": [{**SPEED, "stock_seconds": float("nan")}]}, "stock_seconds of a row must be a number, got nan"),
    ({"rows": [{**QUALITY, "variant": ["x"]}]}, "variant of a row must be a text, got ['x']"),
    ({"rows": [{"variant": "dense"}]}, "tokens of a row must be a number, got None"),
    ({"rows": [{**QUALITY, "variant": "block_scores"}]}, "has no row of dense beside it"),
]


@pytest.mark.parametrize(("content", "message"), RESULTS)
def test_results_that_cannot_be_drawn(content, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    assert message in refused(["plot", str(path), "--output", str(tmp_path / "x.png")], capsys)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_results_that_are_not_there(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert "cannot read" in refused(["plot", str(tmp_path / name), "--output", str(tmp_path / "x.png")], capsys)


@pytest.mark.parametrize("name", ["picture", "picture.docx"])
def test_a_picture_of_no_known_format(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    line = refused(["plot", "x.json", "--output", str(tmp_path / name)], capsys)
    assert "--output must end in the format of the picture" in line and "png" in line


def test_plots_leave_no_figure_behind(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    before = pyplot.get_fignums()
    assert main(["plot", str(results / "quality.json"), "--output", str(tmp_path / "x.pdf")]) == 0
    assert pyplot.get_fignums() == before and (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


# --- evaluation without the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[5, 1024]]), "token id 1024 is outside the model's vocabulary of 1024"),
        (torch.tensor([[5, -1]]), "token id -1 is outside"),
        (torch.tensor([5, 6]), r"of shape \(1, tokens\), got torch.int64 of shape \(2,\)"),
        (torch.ones(2, 9, dtype=torch.long), r"shape \(2, 9\)"),
        (torch.ones(1, 0, dtype=torch.long), r"shape \(1, 0\)"),
        (torch.ones(1, 9), "torch.float32"),
    ],
)
def test_bad_tokens_are_told_before_the_first_run(ids, message):
    class Model:
        """Anything but its config would be work."""

        config = type("Config", (), {"vocab_size": 1024})

    with pytest.raises(InvalidValue, match=message):
        next(quality.evaluate(Model(), None, ids, [], judged=1))


def test_nothing_to_ask():
    for lengths, depths, repeats in (([], [0.5], 1), ([256], [], 1), ([256], [0.5], 0)):
        with pytest.raises(InvalidValue, match="there is nothing to ask"):
            passkey.check(None, lengths, depths, repeats, 1024)


# --- fuzz ---------------------------------------------------------------------------------------------------------

COUNTS = ["1", "2", "90", "256", "300", "0", "-1", "x", "", "1.5", "99999999999999", "9" * 30]
SHARES = ["0", "0.5", "1", "2", "-1", "nan", "inf", "x", "1e-9"]
VARIANTS = ["off", "auto", "block_scores", "vertical_slash", "fast", "", ":", "block_scores:", "block_scores:=1"]
VARIANTS += ["block_scores:density=0.5", "block_scores:density=5", "block_scores:mass=0.5,score_threshold=0.5"]
VARIANTS += ["block_scores:sparse_attention_threshold=9", "vertical_slash:density=0.1", "block_scores:block_size=33"]
VARIANTS += ["block_scores:chunk_size=64,local_size=32", "auto:kernel=1", "block_scores:last_q=²", "off:sparse=1"]
TASKS = str(Path(__file__).with_name("eval_tasks.py"))
MODELS = [str(BUNDLED)] * 6 + ["no/such/folder", "", str(BUNDLED / "config.json")]
OPTIONS = {
    "passkey": {
        "--model": MODELS,
        "--lengths": COUNTS,
        "--depths": SHARES,
        "--repeats": ["1", "2", "0", "x"],
        "--seed": ["0", "-3", "1.5", "9" * 60],
        "--sparse": ["off", "auto", "block_scores", "vertical_slash", "fast"],
        "--dtype": ["float32", "bfloat16", "float16", "int8"],
        "--device-map": ["auto", "cpu", "moon"],
        "--no-patch": None,
    },
    "quality": {
        "--model": MODELS,
        "--lengths": COUNTS,
        "--variants": VARIANTS,
        "--judged": COUNTS,
        "--depths": SHARES,
        "--packages": ["qwen_longctx", "qwen_longctx", "json", "no_such", "a.b", "", "os"],
        "--dtype": ["float32", "bfloat16", "int8"],
    },
    "eval": {
        "--model": MODELS,
        "--tasks": [TASKS, TASKS, "no_such", "", "nowhere.py"],
        "--lengths": COUNTS,
        "--modes": ["stock", "yarn", "dense", "yarn:factor=x", "stock:x=1", *VARIANTS],
        "--samples": ["1", "2", "0", "x"],
        "--seed": ["0", "-3", "x"],
        "--chat": ["auto", "on", "off", "x"],
        "--batch-tokens": COUNTS,
        "--base": ["stock", "dense", ""],
        "--prepare": None,
        "--dtype": ["float32", "bfloat16", "int8"],
    },
    "calibrate": {
        "--model": MODELS,
        "--lengths": COUNTS,
        "--start": ["minference", "nowhere.json", str(BUNDLED), str(BUNDLED / "config.json"), ""],
        "--threshold": SHARES,
        "--step": COUNTS,
        "--rounds": ["1", "2", "0", "x"],
        "--package": ["qwen_longctx", "no_such"],
        "--dtype": ["float32", "bfloat16"],
    },
    "bench": {
        "--lengths": ["1", "5", "300", "384", "0", "-1", "x", "99999999999999"],
        "--density": SHARES,
        "--dense-layers": ["1", "2", "0", "x"],
        "--whole-up-to": ["0", "200", "-1", "x"],
        "--kv-cache": ["int8", "host", "x"],
        "--shape": ["qwen2.5-14b", "qwen2.5-7b-1m"],
        "--memory-limit": ["24GB", "24", "x"],
    },
    "plan": {
        "--tokens": [*COUNTS, "1M", "512K", "1e3", "nan"],
        "--gpu": ["24GB", "80 GiB", "80", "0GB", "-1GB", "nan", "1e30GB", ""],
        "--gpus": ["1", "3", "0", "x", "9999999"],
        "--batch": COUNTS,
        "--prefill-chunk-size": COUNTS,
        "--mlp-chunk-size": COUNTS,
        "--sparse": ["off", "auto", "block_scores", "vertical_slash", "fast", ""],
        "--block-size": COUNTS,
        "--sparse-attention-threshold": COUNTS,
        "--dtype": ["float32", "bfloat16", "int8"],
        "--json": ["", ".", "plan.json", "no/folder/plan.json"],
    },
    "plot": {"--output": ["", ".", "x.png", "x.docx", "no/folder.png"]},
    "doctor": {},
}


SEVERAL = ("--lengths", "--depths", "--variants", "--packages", "--modes")


def random_command(source, folder):
    """Any arguments of any command: each option as likely left out as not, some of several values."""
    name = source.choice(list(OPTIONS))
    words = [name]
    if name == "bench":
        words += [source.choice(["attention", "stock", "mlp", "headline", "speed", "decode", "memory"]), "--tiny"]
    if name == "plan":
        words += [source.choice(MODELS)]
    if name == "plot":
        words += source.choice([[str(BUNDLED / "config.json")], ["nothing.json"], [str(folder)]])
    for option, values in OPTIONS[name].items():
        needed = option in ("--model", "--lengths", "--tokens", "--tasks")
        if source.random() < (0.97 if needed else 0.35):
            several = (
                option in ("--lengths", "--depths", "--variants", "--packages", "--modes") and source.random() < 0.3
            )
            words += [option, *([] if values is None else source.choices(values, k=2 if several else 1))]
    if name == "calibrate" or (name not in ("plan", "doctor", "plot") and source.random() < 0.3):
        words += ["--output", source.choice([str(folder / "out.json"), str(folder), ""])]
    return words


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench would measure there")
def test_no_arguments_end_with_a_traceback(tmp_path, monkeypatch, capsys):
    """A seeded sample; more by QWEN_LONGCTX_FUZZ=1000."""
    monkeypatch.chdir(tmp_path)
    source = random.Random(9)
    statuses = []
    for _ in range(int(os.environ.get("QWEN_LONGCTX_FUZZ", 120))):
        command = random_command(source, tmp_path)
        try:
            statuses.append(main(command))
        except SystemExit as stopped:  # argparse: bad usage
            statuses.append(stopped.code)
        except BaseException as error:
            raise AssertionError(f"qwen-longctx {' '.join(command)!r} ended with {error!r}") from error
        assert statuses[-1] in (0, 2), command
        capsys.readouterr()
    assert statuses.count(0) > 5 and statuses.count(2) > 5
