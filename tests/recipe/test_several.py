"""``adapters:``: what each item makes, and every fault of it with file, line and the nearest word."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from finetune import recipe
from finetune.errors import RecipeError
from finetune.recipe import yamlfile
from tests.recipe.text import BASE

ITEMS = """\
adapters:
  - name: second
    adapter:
      r: 4
      rank_pattern:
        q_proj: 2
    train:
      steps: 20
      seed: 5
  - name: first
    data:
      train_path: eval.jsonl
      eval_path: null
      eval_fraction: 0.5
    train:
      learning_rate: 1e-4
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}\n')
    return tmp_path


def locate(text: str, *overrides: str) -> list[recipe.Located]:
    Path("r.yaml").write_text(text)
    return recipe.locate_all(Path("r.yaml"), overrides)


def refused(text: str, *overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        locate(text, *overrides)
    return [(fault.what, fault.where, fault.fix) for fault in caught.value.faults]


def line(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_each_item_is_laid_over_the_recipe() -> None:
    first, second = locate(BASE + ITEMS)
    alone = recipe.load(Path("r.yaml"), ["adapters=first"])
    assert (first.name, second.name) == ("first", "second")
    assert first.recipe == alone
    assert (first.recipe.output, second.recipe.output) == ("runs/tiny/first", "runs/tiny/second")
    assert (first.recipe.train.learning_rate, second.recipe.train.learning_rate) == (1e-4, 2e-3)
    assert (first.recipe.train.steps, second.recipe.train.steps, second.recipe.train.seed) == (12, 20, 5)
    assert (first.recipe.adapter.fields["r"], second.recipe.adapter.fields["r"]) == (8, 4)
    assert second.recipe.adapter.fields["rank_pattern"] == {"q_proj": 2}
    assert (first.recipe.data.train_path, second.recipe.data.train_path) == ("eval.jsonl", "train.jsonl")
    assert str(line(BASE + ITEMS, "learning_rate: 1e-4")) in first.where("train.learning_rate")
    Path("one.yaml").write_text(yamlfile.dump(second.recipe.to_yaml_dict()))
    assert recipe.load(Path("one.yaml")) == second.recipe


def test_the_command_line_wins_in_each() -> None:
    found = locate(BASE + ITEMS, "train.steps=30", "output=elsewhere/")
    assert [one.recipe.train.steps for one in found] == [30, 30]
    assert [one.recipe.output for one in found] == ["elsewhere/first", "elsewhere/second"]
    assert "--set train.steps" in found[1].where("train.steps")


def test_one_of_them_is_an_ordinary_run() -> None:
    (only,) = locate(BASE + ITEMS, "adapters=second", "train.seed=9")
    assert (only.recipe.train.seed, only.recipe.output) == (9, "runs/tiny/second")
    ((what, where, fix),) = refused(BASE + ITEMS, "adapters=frist")
    assert (what, where, fix) == ("no adapter is called 'frist'", "--set adapters", "did you mean 'first'?")
    with pytest.raises(RecipeError, match="asks for one run"):
        recipe.locate(Path("r.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "what", "key", "fix"),
    [
        ("    train:\n      steps: 20", "    quantize:\n      weights: nf4", "is shared by all", "adapters[0].quantize",
         "move 'quantize:' to the left margin"),
        ("      seed: 5", "      save_every: 5", "is shared by all", "adapters[0].train.save_every",
         "move it under the recipe's 'train:'"),
        ("    data:\n", "    dta:\n", "unknown key", "adapters[1].dta", "did you mean 'data'?"),
        ("      seed: 5", "      sede: 5", "unknown key (adapter second)", "train.sede", "did you mean 'seed'?"),
        ("learning_rate: 1e-4", "learning_rate: fast", "must be a number, above 0", "train.learning_rate", ""),
        ("      r: 4", "      r: 0", "must be from 1 to", "adapter.r", ""),
        ("name: second", "name: ../x", "must be a word", "adapters[0].name", "letters, digits"),
        ("name: second", "name: 12", "must be a word", "adapters[0].name", "letters, digits"),
        ("name: second", "name: FIRST", "is the name of adapter 1 too", "adapters[1].name", "call one"),
        ("name: second", "name: trackers", "is a folder of a tracker", "adapters[0].name", "otherwise"),
        ("  - name: second\n    adapter", "  - adapter", "missing: each adapter", "adapters[0].name", "name"),
        ("      steps: 20", "      epochs: 2", "cannot be given together with steps", "train.epochs", "keep one"),
        ("      train_path: eval.jsonl", "      train_path: evil.jsonl", "no such file", "data.train_path", "eval"),
    ],
)  # fmt: skip
def test_a_fault_has_its_place_and_its_mend(old: str, new: str, what: str, key: str, fix: str) -> None:
    text = BASE + ITEMS.replace(old, new)
    ((said, where, mend),) = refused(text)
    assert what in said
    assert where.startswith("r.yaml:")
    assert where.endswith(f": {key}")
    assert fix in mend
    assert int(where.split(":")[1]) > line(text, "adapters:")


def test_a_fault_of_all_is_told_once_and_one_of_some_says_whose() -> None:
    text = BASE.replace("learning_rate: 2e-3", "lerning_rate: 2e-3") + ITEMS
    found = refused(text)
    assert [what for what, _, _ in found] == ["unknown key"]
    text = BASE.replace("  learning_rate: 2e-3\n", "") + ITEMS
    ((what, _, _),) = refused(text)
    assert what == "missing (adapter second)"


@pytest.mark.parametrize("items", ["adapters: []\n", "adapters: x\n", "adapters:\n  - name: one\n", "adapters: null\n"])
def test_the_list_holds_at_least_two(items: str) -> None:
    ((what, where, _),) = refused(BASE + items)
    assert what.startswith("must be a list of at least two adapters")
    assert ": adapters" in where


def test_a_recipe_without_a_list_has_no_adapter_to_take() -> None:
    ((what, _, fix),) = refused(BASE, "adapters=one")
    assert (what, fix) == ("this recipe has no adapters:", "remove it")


def test_the_schema_knows_the_list() -> None:
    validator = jsonschema.Draft202012Validator(recipe.schema())
    assert validator.is_valid(yamlfile.parse(BASE + ITEMS, "f").value)
    for old, new in (("name: second", "nmae: second"), ("seed: 5", "save_every: 5"), ("r: 4", "r: x")):
        assert not validator.is_valid(yamlfile.parse(BASE + ITEMS.replace(old, new), "f").value)
