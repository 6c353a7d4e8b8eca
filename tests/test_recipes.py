"""Every recipe that we ship loads and plans, with the weights on this disk or without them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune import recipe
from tests.conftest import ROOT
from tests.runs import finetune

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh checkout's working folder after ``make tiny-base``: data and recipes, one base."""
    for name in ("dates", "samples"):
        shutil.copytree(ROOT / "data" / name, tmp_path / "data" / name)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(tiny_base, tmp_path / "data" / "bases" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_plans(path: Path, place: Path) -> None:
    file = f"recipes/{path.name}"
    said = finetune("plan", file)
    assert (said.code, said.err) == (0, "")
    here = Path(recipe.load(Path(file)).model).is_dir()
    assert ("unchecked  the weights, tokenizer and template" in said.out) == (not here)
    assert "steps" in said.out
    assert "predicted peak" in said.out
    assert not (place / "runs").exists()


def test_the_14b_one_says_what_it_could_not_check(place: Path) -> None:
    said = finetune("plan", "recipes/qwen2.5-14b-qlora-24gb.yaml")
    assert said.code == 0
    assert "Qwen/Qwen2.5-14B-Instruct (qwen2, 14,770 M parameters)" in said.out
    assert sum(line.startswith("unchecked  ") for line in said.out.splitlines()) == 2
    assert "q_proj" in said.out
    said = finetune("train", "recipes/qwen2.5-14b-qlora-24gb.yaml")
    assert said.code == 4
    assert said.err.startswith("model: Qwen/Qwen2.5-14B-Instruct: the model is not on this disk; fetch it")


def test_the_tiny_one_goes_the_whole_road(place: Path) -> None:
    said = finetune("train", "recipes/tiny.yaml", "--set", "train.steps=4", "--set", "evaluate.rows=4")
    assert (said.code, said.err) == (0, "")
    assert finetune("merge", "runs/tiny", "--out", "runs/merged").code == 0
