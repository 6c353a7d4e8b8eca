"""``finetune prove A B``: the same model says so, another one is told from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import MERGED, OUTPUT, awake, finetune, merge_run


def test_the_merged_model_is_the_run_and_the_base_is_not(finished: Path) -> None:
    awake(OUTPUT / "adapter")
    assert merge_run().code == 0
    said = finetune("prove", str(OUTPUT), str(MERGED))
    assert (said.code, said.err) == (0, "")
    assert "an adapter on its base in nf4, computed in fp32" in said.out
    made = json.loads((MERGED / "finetune.json").read_text())
    said = finetune("prove", str(OUTPUT), str(MERGED), "--json")
    found = json.loads(said.out)
    assert found["mean_kl"] == pytest.approx(made["proof"]["mean_kl"], rel=1e-2)
    assert found["positions"] == made["proof"]["positions"]

    said = finetune("prove", str(OUTPUT), "base")
    assert said.code == 1
    assert "they are not the same model" in said.err
    assert finetune("prove", str(OUTPUT), "base", "--bound", "1000").code == 0
    assert finetune("prove", "base", str(MERGED)).code == 1  # two models alone, asked the probes
    assert finetune("prove", "base", "base", "--rows", "eval.jsonl", "--bound", "0").code == 0


def test_an_adapter_alone_is_its_run(finished: Path) -> None:
    awake(OUTPUT / "adapter")
    shutil.copytree(OUTPUT / "adapter", "bare")
    said = finetune("prove", "bare", str(OUTPUT), "--json")
    assert json.loads(said.out)["mean_kl"] == 0.0


def test_what_cannot_be_compared_is_refused(finished: Path, build_tiny: Callable[..., Path]) -> None:
    tokenizer = Path("other") / "tokenizer.json"
    shutil.copytree("base", "other")
    stored = json.loads(tokenizer.read_text())
    vocabulary = stored["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.write_text(json.dumps(stored))
    said = finetune("prove", "base", "other")
    assert said.code == 4
    assert "its vocabulary is not that of the other one" in said.err
    assert finetune("prove", "base", "nowhere").code == 4
    said = finetune("prove", "base", "none.gguf")
    assert said.code in (4, 5)
    assert not said.err.startswith("Traceback")


def test_a_planted_difference_is_found(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself must be able to fail: one layer's weight off by a tenth."""
    from safetensors.torch import load_file, save_file

    shutil.copytree("base", "other")
    weights = load_file("other/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    said = finetune("prove", "base", "other", "--json")
    assert said.code == 1
