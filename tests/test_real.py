"""The quickstart's promises on the real 135M model. Run by ``make test-real``: minutes, and the fetched base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune import base as bases
from finetune import loading
from finetune.cli import main_in_process
from tests.conftest import load_script

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.real, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def quickstart(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and merged quickstart: the one in runs/ where it is whole, else a fresh one."""
    made = ROOT / "runs" / "quickstart"
    if (made / "merged" / "finetune.json").is_file():
        return made
    run = tmp_path_factory.mktemp("runs") / "quickstart"
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    assert main_in_process(["train", recipe, f"--set=output={run}", "--set=tracker=none"]) == 0
    assert main_in_process(["merge", str(run), "--out", str(run / "merged")]) == 0
    return run


def test_it_learned_and_the_merge_kept_it(quickstart: Path) -> None:
    scores = json.loads((quickstart / "scores.json").read_text())
    assert all(scores[name]["rows"] == 200 for name in ("before", "after", "merged"))
    assert scores["before"]["exact_match"] <= 0.10
    assert scores["after"]["exact_match"] >= 0.90
    assert abs(scores["merged"]["exact_match"] - scores["after"]["exact_match"]) * 200 <= 1.001
    low, high = scores["after"]["confidence_interval"]
    assert low < scores["after"]["exact_match"] < high


def test_proof_holds(quickstart: Path) -> None:
    proof = json.loads((quickstart / "merged" / "finetune.json").read_text())["proof"]
    assert proof["holds"]
    assert proof["mean_kl"] <= 1e-3


@pytest.fixture(scope="module")
def re_expressed(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the layout of the original Qwen, with their own tokenizer."""
    return load_script("data/make_qwen1_base.py").build(real_base, tmp_path_factory.mktemp("qwen1") / "base")  # type: ignore[no-any-return]


def test_in_the_original_qwen_layout_it_is_the_same_model(real_base: Path, re_expressed: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    form = loading.BaseForm(weights="fp32", double=False, compute="fp32", device="cpu")
    ids = torch.randint(0, 49152, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32)(ids).logits
        found = loading.load(bases.inspect(re_expressed), form)(ids).logits
    assert float((found - wanted).abs().max()) <= 1e-5


def test_the_original_qwen_layout_goes_the_whole_road(re_expressed: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", str(ROOT / "recipes" / "quickstart.yaml")
    # Every head has its own keys and values here, so the same steps train other matrices: 70 end one row short.
    settings = [f"--set=model={re_expressed}", f"--set=output={run}", "--set=tracker=none", "--set=train.steps=90"]
    assert main_in_process(["train", recipe, *settings]) == 0
    assert main_in_process(["merge", str(run), "--out", str(tmp_path / "merged"), "--layout", "original"]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "qwen"
    scores = json.loads((run / "scores.json").read_text())
    assert scores["after"]["exact_match"] >= 0.90
    assert abs(scores["merged"]["exact_match"] - scores["after"]["exact_match"]) * 200 <= 1.001


def test_published_weights_are_the_wrong_base(quickstart: Path, tmp_path: Path) -> None:
    """The usual merge moves the model: the replayed base is worth the trouble."""
    copy = tmp_path / "run"
    shutil.copytree(quickstart, copy, ignore=shutil.ignore_patterns("merged", "checkpoints"))
    (copy / "scores.json").write_text("{}")
    assert main_in_process(["merge", str(copy), "--out", str(tmp_path / "original"), "--base", "original"]) == 0
    original = json.loads((tmp_path / "original" / "finetune.json").read_text())["proof"]
    replayed = json.loads((quickstart / "merged" / "finetune.json").read_text())["proof"]
    assert original["mean_kl"] > 10 * replayed["mean_kl"]
