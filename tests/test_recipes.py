"""Every recipe that we ship loads and plans, with the weights on this disk or without them."""

from __future__ import annotations

import json
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
    for name in ("dates", "preferences", "samples"):
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
    here = Path(recipe.locate_all(Path(file))[0].recipe.model).is_dir()
    assert ("unchecked  the weights, tokenizer and template" in said.out) == (not here)
    assert "steps" in said.out
    assert "predicted peak" in said.out
    assert not (place / "runs").exists()


CARDS = {"16gb": 16, "24gb": 24, "80gb": 80}


@pytest.mark.parametrize("path", [path for path in RECIPES if "14b" in path.stem], ids=lambda path: path.stem)
def test_a_14b_one_fits_the_card_that_it_is_named_after(path: Path, place: Path) -> None:
    """Against the published numbers of the models; the components that are there at the peak."""
    size = CARDS[path.stem.rpartition("-")[2]]
    said = finetune("plan", f"recipes/{path.name}", "--card", str(size), "--json")
    assert said.code == 0, said.err
    plan = json.loads(said.out)
    assert plan["memory"] < size * 1e9
    # Where layers are recomputed, the peak is within one of them, when the head's logits are gone.
    there = {"weights", "adapter", "activations"} | (set() if plan["recomputed_layers"] else {"head"})
    assert {key for key, value in plan["budget"].items() if value} >= there
    parameters = {"qwen14b": 14_167_290_880, "qwen2.5": 14_770_033_664, "qwen3": 14_768_307_200}
    assert plan["parameters"] == parameters[path.stem.partition("-")[0]]
    if plan["weights"] == "nf4":
        assert 9.5e9 < plan["budget"]["weights"] < 10.0e9
    small = finetune("plan", f"recipes/{path.name}", "--card", str(size // 3 + 1))
    assert small.code == 5
    assert "needs about" in small.err


def test_the_14b_one_says_what_it_could_not_check(place: Path) -> None:
    said = finetune("plan", "recipes/qwen2.5-14b-qlora-24gb.yaml")
    assert said.code == 0
    assert "Qwen/Qwen2.5-14B-Instruct (qwen2, 14,770.0 M parameters)" in said.out
    assert sum(line.startswith("unchecked  ") for line in said.out.splitlines()) == 3
    assert "q_proj" in said.out
    said = finetune("train", "recipes/qwen2.5-14b-qlora-24gb.yaml")
    assert said.code == 5  # the tests are offline
    assert "offline, and Qwen/Qwen2.5-14B-Instruct is not whole in the cache" in said.err
    assert not (place / "runs").exists()


def test_the_tiny_one_goes_the_whole_road(place: Path) -> None:
    said = finetune("train", "recipes/tiny.yaml", "--set", "train.steps=4", "--set", "evaluate.rows=4")
    assert (said.code, said.err) == (0, "")
    assert finetune("merge", "runs/tiny", "--out", "runs/merged").code == 0
