"""docs/qwen14b.md: every command on the page, word for word, over a small base of the same format."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import qwen1
from tests.conftest import ROOT
from tests.runs import finetune

Build = Callable[..., Path]
PAGE = (ROOT / "docs" / "qwen14b.md").read_text(encoding="utf-8")
SMALL = [
    "tracker=none", "train.epochs=null", "train.steps=2", "train.tokens_per_step=2048", "evaluate.rows=32",
    "train.save_every=1", "train.warmup=0",
    "quantize.compute=fp32",  # a tiny random model's bf16 noise is as large as the proof's bound
]  # fmt: skip
COMMIT = "c" * 40


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line.removeprefix(".venv/bin/finetune ")) for line in lines if line]


def test_every_command_of_the_page_runs(tmp_path: Path, build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    shutil.copytree(ROOT / "data" / "dates", "data/dates")
    # The download, as a folder and as the hub's cache has it.
    source = qwen1.build(tmp_path / "Qwen-14B", build_tiny)
    cache = tmp_path / "cache" / "models--Qwen--Qwen-14B"
    shutil.copytree(source, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    found = commands()
    assert [words[0] for words in found] == ["plan", "train", "eval", "merge", "merge", "convert", "convert", "convert"]
    for words in found:
        extra = [part for one in SMALL for part in ("--set", one)] if words[0] in ("plan", "train") else []
        said = finetune(*words, *extra)
        assert said.code == 0, f"{words}: {said.err}"
        if words[0] == "plan":
            assert "Qwen/Qwen-14B" in said.out
    again = {path.name: path.read_bytes() for path in Path("qwen-14b-again").iterdir()}
    assert again == {path.name: path.read_bytes() for path in source.iterdir()}


def test_the_tables_figures_are_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    rows = re.findall(r"\| `(recipes/[^`]+)` \| (\d+) GB \| ([\d.]+) GB \(fills what is free\) \| ([\d.]+) GB \|", PAGE)
    assert len(rows) == 3
    for recipe, card, peak, weights in rows:
        said = finetune("plan", recipe, "--card", card)
        assert said.code == 0, said.err
        assert f"memory     {peak} GB predicted peak" in said.out
        assert f"weights {weights} GB" in said.out
