"""Preference training of patched models through TRL: the example of docs/training.md, and without an adapter."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_longctx import unpatch_qwen

pytest.importorskip("trl", reason="needs TRL: .ci/trl")
pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "training.md"


def run(example: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """Run the example; the rows that it logged of its steps."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(example, names)
    model = names["trainer"].model.get_base_model() if "peft_config=" in example else names["trainer"].model
    longest = max(len(names["tokenizer"](pair["prompt"]).input_ids) for pair in names["pairs"])
    assert longest >= 2 * model.config.max_position_embeddings
    return [row for row in names["trainer"].state.log_history if "loss" in row]


@pytest.fixture
def example() -> str:
    return re.search(r"<!-- test: dpo -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]


def test_the_example_learns(example, tmp_path, monkeypatch):
    rows = run(example, monkeypatch, tmp_path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # model and reference are the same at first
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05 and rows[-1]["rewards/accuracies"] == 1


@pytest.mark.parametrize("classes", [True, False])
def test_the_reference_is_patched_by_class(example, tmp_path, monkeypatch, classes):
    """Without an adapter TRL loads the reference itself: unpatched it disagrees with the model on long prompts."""
    example = re.sub(r" *peft_config=.*\n", "", example).replace("max_steps=3", "max_steps=1")
    if classes:
        example = example.replace("patch_qwen(AutoModelForCausalLM.from_pretrained(BUNDLED))", "").replace(
            "model = ", "patch_qwen()\nmodel = AutoModelForCausalLM.from_pretrained(BUNDLED)", 1
        )
    try:
        (row,) = run(example, monkeypatch, tmp_path)
    finally:
        unpatch_qwen()
    assert (row["loss"] == pytest.approx(math.log(2), abs=1e-4)) == classes
