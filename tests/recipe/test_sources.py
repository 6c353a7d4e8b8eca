"""Bases and overrides: what wins, and that a fault names the place where the value was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import recipe
from tests.recipe.text import BASE, faults_of


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data files, in which a recipe's relative paths start."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}\n')
    return tmp_path


def test_extends_merges_deeply_and_keeps_origins(work: Path) -> None:
    (work / "bases").mkdir()
    (work / "bases" / "root.yaml").write_text(BASE)
    (work / "bases" / "middle.yaml").write_text("extends: root.yaml\ntrain:\n  seed: 8\n  warmup: 1\n")
    (work / "r.yaml").write_text("extends: bases/middle.yaml\ntrain: {warmup: 0}\nevaluate:\n  metrics: [loss]\n")
    located = recipe.locate(Path("r.yaml"), ["train.keep_last=5", "adapter.target_modules=[q_proj]"])
    read = located.recipe
    assert (read.train.seed, read.train.warmup, read.train.steps, read.train.keep_last) == (8, 0, 12, 5)
    assert (read.evaluate.metrics, read.adapter.fields["target_modules"]) == (["loss"], ["q_proj"])
    assert located.where("train.warmup") == "r.yaml:2:9: train.warmup"
    assert located.where("train.seed") == "bases/middle.yaml:3:3: train.seed"
    assert located.where("train.steps") == "bases/root.yaml:13:3: train.steps"
    assert located.where("train.keep_last") == "--set train.keep_last"
    assert located.where("train.workers") == "r.yaml:2:1: train.workers"


def test_faults_point_into_the_file_that_wrote_the_value(work: Path) -> None:
    (work / "base.yaml").write_text(BASE.replace("seed: 7", "seed: x").replace("nf4", "nf5"))
    found = faults_of("extends: base.yaml\nquantize:\n  weights: nf6\ntrain:\n  epochs: 2\n")
    assert [fault.split(": ")[:2] for fault in found] == [
        ["base.yaml:19:3", "train.seed"],
        ["r.yaml:3:3", "quantize.weights"],
        ["r.yaml:5:3", "train.epochs"],
    ]


def test_null_switches_an_inherited_key_off(work: Path) -> None:
    (work / "base.yaml").write_text(BASE)
    (work / "r.yaml").write_text("extends: base.yaml\ntrain:\n  steps: null\n  epochs: 2\n")
    assert recipe.load(Path("r.yaml")).train.epochs == 2.0


def test_extends_faults(work: Path) -> None:
    (work / "a.yaml").write_text("extends: b.yaml\n")
    (work / "b.yaml").write_text("extends: r.yaml\n")
    assert faults_of("extends: a.yaml\n") == [
        "b.yaml:1:1: extends: the recipes extend each other in a circle; remove one extends"
    ]
    assert "circle" in faults_of("extends: r.yaml\n")[0]
    assert faults_of(f"{BASE}extends: c.yaml\n")[0].startswith("r.yaml:24:1: extends: no such file: c.yaml; did you")
    assert faults_of("extends: [a.yaml]\n")[0].startswith("r.yaml:1:1: extends: must be the path")
    assert faults_of("extends: https://x/y.yaml\n")[0].startswith("r.yaml:1:1: extends: must be the path")
    [only] = faults_of("extend: base.yaml\ntracker: none\n")
    assert only == "r.yaml:1:1: extend: unknown key; did you mean 'extends'?"
    for number in range(9):
        (work / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (work / "9.yaml").write_text(BASE)
    assert "more than 8" in faults_of("extends: 0.yaml\n")[0]


@pytest.mark.usefixtures("work")
def test_overrides_are_read_by_the_rules_of_the_file() -> None:
    Path("r.yaml").write_text(BASE)
    read = recipe.load(Path("r.yaml"), ["train.learning_rate=2e-4", "evaluate.rows=5", "evaluate.metrics=[loss]"])
    assert (read.train.learning_rate, read.evaluate.rows, read.evaluate.metrics) == (2e-4, 5, ["loss"])
    read = recipe.load(Path("r.yaml"), ["adapter.rank_pattern={q_proj: 4}", "train={steps: 3}"][:1])
    assert read.adapter.fields["rank_pattern"] == {"q_proj": 4}


OVERRIDES = {
    "train.seed": "--set train.seed: must look like section.key=value",
    "=3": "--set =3: must look like section.key=value",
    "train..seed=3": "--set train..seed=3: must look like",
    "train.seed=no": "--set train.seed: must be a whole number, at least 0, below 4294967296; found 'no'",
    "train.seed=[": "--set train.seed: not valid YAML",
    "train.seed=&a 3": "--set train.seed: an anchor",
    "train.seed=010": "--set train.seed: a number with leading zeros",
    "train.seed.x=1": "--set train.seed.x: train.seed is not a section",
    "trian.seed=1": "--set trian.seed: trian: unknown key; did you mean 'train'?",
    "extends=x.yaml": "--set extends: extends works in a file only",
    "train.max_length=": "--set train.max_length: must be a whole number, at least 8, at most 1048576; found nothing",
    "adapter={method: lora, r: 4}": "--set adapter: adapter.lora_alpha: missing",
    "output=$HOME": "--set output: ",
}


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_overrides_name_themselves(override: str) -> None:
    found = faults_of(BASE, override)
    assert len(found) == 1, "\n".join(found)
    assert found[0].startswith(OVERRIDES[override])


@pytest.mark.usefixtures("work")
def test_an_override_given_twice_is_refused() -> None:
    assert faults_of(BASE, "train.seed=1", "train.seed=2") == ["--set train.seed: given twice; keep one"]
