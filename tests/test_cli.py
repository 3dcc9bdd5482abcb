"""The commands, run in process on the bundled checkpoint and toy shapes."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qwen_longctx import cli
from qwen_longctx.bench import simulation
from qwen_longctx.bench.breakdown import Breakdown
from qwen_longctx.bench.limit import limit_memory
from qwen_longctx.bench.shapes import NAMES, TRAINED, model_config, random_model
from qwen_longctx.cli import BUNDLED, main
from qwen_longctx.cli import bench as cli_bench
from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.environment import environment, write_results
from qwen_longctx.memory import plan
from qwen_longctx.ops import fp8
from qwen_longctx.prefill.memory import free_bytes


def test_demo(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.demo, "CELLS", ((1, 2), (4, 2)))
    assert main(["demo", "--output", str(tmp_path / "demo.json")]) == 0
    table = capsys.readouterr().out
    assert "trained to 256 tokens" in table
    assert [line.split()[:3] for line in table.splitlines()[-2:]] == [["256", "1x", "2"], ["1,024", "4x", "2"]]
    assert [line.split()[-1] for line in table.splitlines()[-2:]] == ["100%", "100%"]
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [(row["tokens"], row["prompts"], row["patched"]) for row in rows] == [(256, 2, 1.0), (1024, 2, 1.0)]


def test_passkey(tmp_path, capsys):
    output = tmp_path / "deep" / "passkey.json"
    command = ["passkey", "--model", str(BUNDLED), "--lengths", "512", "256", "--depths", "0.5", "--repeats", "2"]
    assert main([*command, "--dtype", "float32", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [r["length"] for r in found["records"]] == [256, 256, 512, 512]
    assert all(r["correct"] == (r["key"] in r["answer"]) for r in found["records"])
    assert found["patched"] and found["trained_length"] == 256 and found["environment"]["packages"]["torch"]
    assert "256 tokens: 100% of 2 keys found" in capsys.readouterr().out


def test_passkey_without_the_patch(capsys):
    command = ["passkey", "--model", str(BUNDLED), "--lengths", "256", "--depths", "0.5", "--dtype", "float32"]
    assert main([*command, "--no-patch"]) == 0


def test_passkey_with_settings_of_the_patch(tmp_path, capsys):
    output = tmp_path / "passkey.json"
    command = ["passkey", "--model", str(BUNDLED), "--lengths", "512", "--depths", "0.5", "--kv-cache", "int8"]
    assert main([*command, "--sparse-decode", "0.5", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["kv_cache"], found["sparse_decode"], found["sparse"]) == ("int8", 0.5, "auto")
    assert main([*command, "--no-patch"]) == 2
    assert "--no-patch runs stock transformers, which has no kv_cache" in capsys.readouterr().err


def test_passkey_refuses_a_depth(capsys):
    with pytest.raises(SystemExit):
        main(["passkey", "--model", str(BUNDLED), "--lengths", "256", "--depths", "2"])
    assert "argument --depths: must lie between 0 and 1, got 2" in capsys.readouterr().err


def test_plan(capsys):
    assert main(["plan", str(BUNDLED), "--tokens", "1000000"]) == 0
    assert "KV cache" in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {version('torch')}" in out and "can be patched" in out and "prefill runs on cpu" in out
    if not torch.cuda.is_available():
        assert (
            "sparse prefill runs on request only, on reference (fa4 needs a CUDA device; flex needs a CUDA device)"
            in out
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
@pytest.mark.parametrize("what", ["attention", "stock", "headline", "speed", "decode"])
def test_bench(what, tmp_path, capsys):
    output = tmp_path / "bench.json"
    tokens = 1000 if what == "speed" else 300
    assert main(["bench", what, "--tiny", "--lengths", str(tokens), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    (row,) = found["rows"]
    assert row["tokens"] == tokens and found["shape"] == "tiny"
    if what == "decode":
        assert row["kv_bytes"] == 300 * 2 * 2 * 2 * 16 * 2
        assert min(row[f"{name}_ms"] for name in ("patched", "stock", "attention_pass", "attention_segments")) > 0
        assert len(row["seconds"]["patched"]) == 3 * 31
    if what == "headline":
        assert row["new_tokens"] == 32 and row["kv_cache_bytes"] == 332 * 2 * 2 * 2 * 16 * 2
    if what == "speed":
        parts = row["sparse_breakdown_seconds"]
        stages = {"selection", "attention", "merge", "recall"}
        assert set(parts) == {"linear", "norm", "rotation", "rest", "total"} | stages
        assert sum(parts.values()) == pytest.approx(2 * parts["total"], abs=1e-2) and min(parts.values()) >= 0
        assert min(row["stock_seconds"], row["dense_seconds"], row["sparse_seconds"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_decode_counts_the_bytes_of_8_bits(tmp_path):
    output = tmp_path / "bench.json"
    assert main(["bench", "decode", "--tiny", "--lengths", "90", "--kv-cache", "int8", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["kv_cache"] == "int8" and row["kv_bytes"] == 90 * 2 * 2 * 2 * (16 + 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_memory(tmp_path, capsys):
    """Several runs of a length, or the one that is asked for; each beside its own plan."""
    output = tmp_path / "bench.json"
    assert main(["bench", "memory", "--tiny", "--lengths", "400", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    asked = [(row.get("kv_cache"), row["sparse"], row["rows"], row["tokens"]) for row in rows]
    assert len(rows) == 7 and {("int8", "off", 2, 200), ("fp8", "off", 1, 400), ("int8", "block_scores", 1, 400)} < set(
        asked
    )
    one_chunk = [row for row in rows if row["sparse"] == "off" and row["rows"] == 1]
    for row in rows:
        settings = {**row["settings"], "kv_cache": row.get("kv_cache", "device")}
        wanted = plan(model_config(tiny=True), row["tokens"] + 1, batch=row["rows"], **settings).memory
        assert row["plan_bytes"] == wanted.total == sum(row["plan"].values())
        assert row["seconds"] > 0 and row["peak"] == "counted on CUDA devices only" and "peak_bytes" not in row
    assert one_chunk[0]["plan"]["kv_cache"] == 401 * 2 * 2 * 2 * 16 * 2
    assert one_chunk[1]["plan"]["kv_cache"] == 401 * 2 * (2 * 2 * (16 + 4) + 4)
    assert "plan_bytes" in capsys.readouterr().out
    command = ["bench", "memory", "--tiny", "--shape", "qwen2.5-14b", "--kv-cache", "fp8"]
    assert main([*command, "--lengths", "400", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["kv_cache"] == "fp8" and row["sparse"] == "block_scores"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bench_train(method, tmp_path):
    """Steps of the Trainer and ours, with and without activations on the host."""
    pytest.importorskip("peft")
    output = tmp_path / "bench.json"
    command = ["bench", "train", "--tiny", "--lengths", "96", "--stock-lengths", "64", "--method", method]
    assert main([*command, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["by"], row["tokens"], row.get("offload")) for row in rows] == [
        ("ours", 96, False),
        ("ours", 96, True),
        ("Trainer", 64, None),
    ]
    assert all(row["tokens_per_second"] > 0 and row["tflops_per_second"] > 0 for row in rows)


def test_shapes_of_the_benches():
    """What the command line names is what the benches know, with the sizes of the published checkpoints."""
    assert cli_bench.SHAPES == NAMES and cli_bench.TRAINED == TRAINED
    config = model_config(shape="qwen2.5-14b")
    sizes = config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    assert (*sizes, config.intermediate_size) == (5120, 48, 40, 8, 13824)
    assert model_config().hidden_size == 3584 and config.dual_chunk_attention_config["chunk_size"] == 262_144


@pytest.mark.gpu
def test_a_limit_of_memory():
    device = torch.device("cuda")
    _, total = torch.cuda.mem_get_info(device)
    with pytest.raises(InvalidValue, match="give a smaller limit"):
        limit_memory(total + 1, device)
    try:
        limit_memory(1 << 30, device)
        assert free_bytes(torch.device("cuda", 0)) <= 1 << 30
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 30, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_ranks(tmp_path):
    """Every way to cut chunks says the same, and a rank that is killed ends the other."""
    output = tmp_path / "bench.json"
    command = ["bench", "ranks", "--tiny", "--lengths", "900", "--prefill-chunk-size", "200"]
    assert main([*command, "--output", str(output)]) == 0
    *rows, killed = json.loads(output.read_text())["rows"]
    assert [row["pipeline"] for row in rows] == ["auto", "equal", "measured", "off"]
    assert all(row["seconds"] > 0 and row["ranks"] == 2 and row["difference"] < 0.02 for row in rows)
    assert killed["killed_rank"] == 1 and killed["all_ended"] and killed["seconds_until_the_error"] < 30
    assert "rank 1" in killed["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_tensor_parallel(tmp_path):
    """One process, then two, which say the same; dense up to a length."""
    output = tmp_path / "bench.json"
    command = ["bench", "tensor-parallel", "--tiny", "--lengths", "300", "500", "--whole-up-to", "400"]
    assert main([*command, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    asked = [(300, "off"), (300, "block_scores"), (500, "block_scores")]
    assert [(row["tokens"], row["attention"]) for row in rows] == 2 * asked
    assert [row["processes"] for row in rows] == [1, 1, 1, 2, 2, 2]
    for row in rows[3:]:
        assert row["same_tokens"] >= 1  # later ones may part where rounding decides
        assert row["difference"] < 0.02 and min(row["times_as_fast"], row["times_as_fast_decode"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_start(tmp_path):
    """Three processes, of which the third is warmed up; the user's own cache folders are left alone."""
    output = tmp_path / "bench.json"
    assert main(["bench", "start", "--tiny", "--lengths", "400", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["process"] for row in rows] == ["first", "second", "warmed up"]
    assert [("warm_up_seconds" in row) for row in rows] == [False, False, True]
    assert all(min(row["first_seconds"], row["again_seconds"]) > 0 for row in rows)


def test_bench_projects_dense(tmp_path):
    output = tmp_path / "bench.json"
    command = ["bench", "speed", "--tiny", "--lengths", "400", "--density", "0.5", "--dense-layers", "1"]
    assert main([*command, "--whole-up-to", "300", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["dense_is"] == "projected from 1 and 2 layers at full length" and row["density_asked"] == 0.5


def test_the_breakdown_leaves_the_model_as_it_was():
    model = random_model(torch.device("cpu"), tiny=True, layers=1)
    ids = torch.ones(1, 5, dtype=torch.long)
    linear, cast = torch.nn.functional.linear, fp8.cast_rows
    with Breakdown(torch.device("cpu")) as clock:
        with clock.stage("merge"):
            time.sleep(0.01)
        model(ids)
    calls = len(clock.marks["linear"])
    model(ids)
    assert not clock.marks.keys() - {"linear", "merge"}  # an unpatched model runs none of the others
    assert calls == len(clock.marks["linear"]) == sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert torch.nn.functional.linear is linear and fp8.cast_rows is cast
    parts = clock.seconds(1.0)
    assert parts["merge"] >= 0.01 and parts["rest"] == pytest.approx(1 - parts["linear"] - parts["merge"], abs=1e-3)


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a toy on the CPU")
def test_bench_pipeline(tmp_path, capsys):
    """Cards that are not there are stood in for; the same token comes out, and a picture can be drawn."""
    output = tmp_path / "bench.json"
    command = ["bench", "pipeline", "--tiny", "--lengths", "520", "--timeline", "--sparse-only"]
    assert main([*command, "--ways", "one", "auto", "--output", str(output)]) == 0
    one, auto = json.loads(output.read_text())["rows"]
    assert (one["stages"], auto["stages"]) == (1, 2) and auto["same_token"] and auto["chunks"] >= 5
    assert auto["largest_difference"] <= 0.1 * auto["largest_logit"]
    assert set(one["simulated_seconds"]) == {"equal", "auto"} and all(a < b for a, b in auto["busy"]["0"])
    assert min(one["simulated_seconds"].values()) > one["seconds"] / 2
    if find_spec("matplotlib"):
        assert main(["plot", str(output), "--output", str(tmp_path / "busy.png")]) == 0
    assert main([*command, "--cards", "1"]) == 2 and "2 cards or more" in capsys.readouterr().err


def test_bench_simulation(tmp_path):
    """The file that is there is what the command writes, and one card takes what was measured."""
    output = tmp_path / "bench.json"
    sources = [str(RESULTS / name) for name in ("speed_h200.json", "speed_balanced_1000000.json")]
    assert main(["bench", "simulation", "--from-results", *sources, "--output", str(output)]) == 0
    found, kept = (json.loads(path.read_text())["rows"] for path in (output, RESULTS / "pipeline_simulation.json"))
    assert found == kept
    measured = [row for row in found if "measured_seconds" in row]
    assert len(measured) == 3
    for row in measured:
        assert row["simulated_seconds"] == pytest.approx(row["measured_seconds"], rel=1e-3)
    for row in found:
        assert row["times_as_fast"] <= row["cards"] * 1.01 and (row["pipeline"] != "off" or row["times_as_fast"] <= 1)
    wrong = tmp_path / "wrong.json"
    for text in ("[]", "{}", json.dumps({"rows": [{"tokens": 9}], "shape": "Qwen2.5-7B", "environment": {"gpus": []}})):
        wrong.write_text(text)
        assert main(["bench", "simulation", "--from-results", str(wrong)]) == 2
    assert main(["bench", "simulation", "--from-results", sources[0], "--lengths", "77"]) == 2


@pytest.mark.parametrize("tokens", [131072, 262144, 524288])
def test_costs_of_a_layer_hold_at_other_lengths(tokens):
    """Dense seconds of a million tokens say those of shorter prompts, which were measured whole up to 262,144."""
    rows = {row["tokens"]: row for row in json.loads((RESULTS / "speed_h200.json").read_text())["rows"]}
    dense, _ = simulation.layer_costs(rows[1_000_000], 28)
    assert 28 * dense.seconds(0, tokens) == pytest.approx(rows[tokens]["dense_seconds"], rel=0.05)


def test_plot_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.png"
    assert main(["plot", str(RESULTS / "speed.json"), "--output", str(picture)]) == 0
    both = [str(RESULTS / name) for name in ("decode_h200.json", "decode_int8_h200.json")]
    assert main(["plot", *both, "--output", str(picture)]) == 0
    assert main(["plot", str(RESULTS / "pipeline_simulation.json"), "--output", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    for names in (["speed.json", "quality.json"], ["passkey_1000000.json"]):
        assert main(["plot", *(str(RESULTS / name) for name in names), "--output", str(picture)]) == 2
        assert "give files of quality, or of bench speed" in capsys.readouterr().err


def test_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr("qwen_longctx.cli.plot.find_spec", lambda name: None)
    assert main(["plot", "any.json", "--output", "any.png"]) == 2
    assert "plot needs matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


def test_environment(tmp_path):
    path = write_results(tmp_path / "x.json", {"rows": []})
    assert json.loads(path.read_text())["environment"] == environment()
    assert str(tmp_path) not in path.read_text()
