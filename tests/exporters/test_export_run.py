"""``finetune export --to gguf`` and ``--to ollama``: from a finished run to a file that answers as the run does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import gguf_file
from tests.runs import MERGED, OUTPUT, awake, finetune, merge_run

FILE = Path("model.gguf")


def left() -> set[str]:
    return {path.name for path in Path().iterdir() if "gguf" in path.name or "ollama" in path.name}


def test_the_file_answers_as_the_run(finished: Path, knows: Callable[..., None], runtime: str) -> None:
    awake(OUTPUT / "adapter")
    said = finetune("export", str(OUTPUT), "--to", "gguf", "--quantize", "f32", "--out", str(FILE))
    assert (said.code, said.err) == (0, "")
    assert left() == {"model.gguf"}
    assert gguf_file.read(FILE).values["general.name"] == OUTPUT.name
    if runtime:
        assert runtime in said.out
        assert finetune("prove", str(OUTPUT), str(FILE)).code == 5
        return
    assert "llama.cpp answers as transformers does: 32 greedy tokens" in said.out
    said = finetune("prove", str(OUTPUT), str(FILE), "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["mean_kl"] < 1e-3
    assert finetune("prove", str(FILE), "base").code == 1
    assert finetune("prove", str(FILE), str(FILE)).code == 4


def test_a_merged_folder_is_exported_as_it_is(finished: Path, knows: Callable[..., None], runtime: str) -> None:
    assert merge_run().code == 0
    assert finetune("export", str(MERGED), "--to", "gguf", "--out", str(FILE)).code == 0
    stored = json.loads((MERGED / "finetune.json").read_text())
    (MERGED / "finetune.json").write_text(json.dumps(stored | {"layout": "original"}))
    said = finetune("export", str(MERGED), "--to", "gguf", "--out", "other.gguf")
    assert said.code == 4
    assert left() == {"model.gguf"}


def test_a_release_is_exported_as_its_card_says(finished: Path, knows: Callable[..., None], runtime: str) -> None:
    options = ("--data-licence", "cc0-1.0", "--allow-unknown-licence")
    assert finetune("release", str(OUTPUT), "--out", "published", *options).code == 0
    said = finetune("export", "published", "--to", "ollama", "--out", "for-ollama")
    assert (said.code, said.err) == (0, "")
    assert finetune("verify", "published").code == 0
    (Path("published") / "NOTICE").write_text("other")
    said = finetune("export", "published", "--to", "ollama", "--out", "again")
    assert said.code == 4
    assert "NOTICE" in said.err


def test_the_adapter_alone(finished: Path, knows: Callable[..., None], runtime: str) -> None:
    awake(OUTPUT / "adapter")
    said = finetune("export", str(OUTPUT), "--to", "gguf", "--adapter-only", "--out", str(FILE))
    assert (said.code, said.err) == (0, "")
    assert gguf_file.read(FILE).values["general.type"] == "adapter"
    assert left() == {"model.gguf"}


def test_a_folder_for_ollama(finished: Path, knows: Callable[..., None], runtime: str) -> None:
    options = () if runtime else ("--quantize", "q8_0")
    said = finetune("export", str(OUTPUT), "--to", "ollama", "--out", "for-ollama", *options)
    assert (said.code, said.err) == (0, "")
    assert {path.name for path in Path("for-ollama").iterdir()} == {"model.gguf", "Modelfile"}
    text = Path("for-ollama/Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "FROM ./model.gguf" in text
    assert "ollama create" in said.out
    assert left() == {"for-ollama"}


def test_what_cannot_be_is_said_before_anything_is_merged(
    finished: Path, knows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = finetune("export", str(OUTPUT), "--to", "gguf", "--quantize", "q9", "--out", str(FILE))
    assert said.code == 4
    assert "folding" not in said.out
    assert finetune("export", str(OUTPUT), "--to", "adapter", "--quantize", "q8_0", "--out", "x").code == 2
    assert finetune("export", str(OUTPUT), "--to", "gguf", "--target", "vllm", "--out", "x").code == 2
    said = finetune("export", str(OUTPUT), "--to", "gguf", "--adapter-only", "--quantize", "f16", "--out", str(FILE))
    assert said.code == 4
    FILE.write_text("mine")
    assert finetune("export", str(OUTPUT), "--to", "gguf", "--out", str(FILE)).code == 5
    assert FILE.read_text() == "mine"
