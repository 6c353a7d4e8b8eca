"""What a run is: what may never change while it goes on, and what is only said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from finetune import identity
from finetune.errors import DataError, EnvironmentFault, FinetuneError, ModelError, RecipeError
from finetune.identity import Identity

ONE = Identity(
    recipe={"train.steps": 5, "train.seed": 1, "adapter.r": 8},
    data={"train.jsonl": "aa", "eval.jsonl": "bb"},
    base={"config.json": "cc", "model.safetensors": "dd"},
    resolved={"compute": "bf16"},
    environment={"torch": "2.0", "threads": 2},
)


def _changed(**parts: dict[str, Any]) -> Identity:
    return dataclasses.replace(ONE, **{name: getattr(ONE, name) | value for name, value in parts.items()})


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    ONE.write(tmp_path / "identity.json")
    assert identity.read(tmp_path / "identity.json") == ONE
    assert identity.read(tmp_path / "none.json") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"recipe": {}}', "null", '{"recipe": {}, "more": 1}'])
def test_a_damaged_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(EnvironmentFault, match="identity cannot be read"):
        identity.read(tmp_path / "identity.json")


def test_the_same_run_says_nothing() -> None:
    assert identity.compare(ONE, ONE, Path("run"), extend=False) == []


@pytest.mark.parametrize(
    ("new", "kind", "named"),
    [
        (_changed(recipe={"adapter.r": 9}), RecipeError, ["run: adapter.r"]),
        (_changed(recipe={"adapter.r": 9, "new.key": 1}), RecipeError, ["run: adapter.r", "run: new.key"]),
        (_changed(recipe={"train.steps": 6}), RecipeError, ["run: train.steps"]),
        (_changed(data={"eval.jsonl": "xx"}), DataError, ["eval.jsonl"]),
        (_changed(data={"more.jsonl": "xx"}), DataError, ["more.jsonl"]),
        (
            _changed(base={"config.json": "xx", "model.safetensors": "yy"}),
            ModelError,
            ["config.json", "model.safetensors"],
        ),
    ],
)
def test_what_differs_is_refused_by_name(new: Identity, kind: type[FinetuneError], named: list[str]) -> None:
    with pytest.raises(kind) as caught:
        identity.compare(ONE, new, Path("run"), extend=False)
    assert [fault.where for fault in caught.value.faults] == named
    with pytest.raises(kind):
        identity.compare(new, ONE, Path("run"), extend=False)  # a key or file that is gone differs, too


def test_only_the_length_may_be_extended() -> None:
    longer = _changed(recipe={"train.steps": 6})
    assert identity.compare(ONE, longer, Path("run"), extend=True) == []
    with pytest.raises(RecipeError, match=r"train\.seed") as caught:
        identity.compare(ONE, _changed(recipe={"train.steps": 6, "train.seed": 2}), Path("run"), extend=True)
    assert len(caught.value.faults) == 1
    with pytest.raises(RecipeError, match="add --extend"):
        identity.compare(ONE, longer, Path("run"), extend=False)


def test_another_machine_is_said() -> None:
    said = identity.compare(ONE, _changed(environment={"torch": "3.0", "threads": 9}), Path("run"), extend=False)
    assert said == [
        "torch was 2.0 and is 3.0 now: the run goes on, but its bits will differ from an unbroken one"
    ]  # threads are put back
