"""The program that makes the bundled checkpoint: a run of a few steps writes one that loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "tiny_qwen2"))
import make  # noqa: E402
import recall  # noqa: E402


def test_a_short_run_writes_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "EVALUATED", (1,))
    make.main(["--output", str(tmp_path), "--device", "cpu", "--steps-scale", "0.0005", "--keys", "2"])
    make.main(["--output", str(tmp_path), "--device", "cpu", "--keys", "2", "--evaluate-only"])
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert [row["step"] for row in log["steps"]] == [1, 2, 5]
    assert [measured["keys"] for measured in log["retrieval"]] == [2, 2]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.dual_chunk_attention_config["chunk_size"] == 256
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_texts_answer_their_questions():
    """The marked tokens are digits of keys that the text has given before."""
    import random

    tokenizer = recall.train_tokenizer(random.Random(1))
    for (ids, mask), _ in zip(recall.Recall(tokenizer, 256, seed=3), range(50), strict=False):
        assert ids.shape == mask.shape == (256,)
        first = mask.argmax()
        for key in tokenizer.decode(ids[mask]).replace(".", " ").split():
            assert len(key) == 5 and key in tokenizer.decode(ids[:first])
