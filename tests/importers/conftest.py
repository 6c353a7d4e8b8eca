"""A workplace with somebody else's settings in it: a tiny base, rows, and the settings of each trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import recipe
from tests.importers.facts import FIXTURES
from tests.runs import finetune

OUT = Path("recipe.yaml")


class Imported:
    """What ``finetune import --json`` said, and the recipe that it wrote."""

    def __init__(self, *arguments: str) -> None:
        self.said = finetune("import", *arguments, "--json", "--quiet")
        assert self.said.code == 0, self.said.err
        self.json: dict[str, Any] = json.loads(self.said.out)
        self.recipe = recipe.load(OUT) if not self.json["missing"] else None
        self.values = {one["recipe"]: one["becomes"] for one in self.json["taken"]}

    def about(self, key: str, kind: str = "differs") -> str:
        """All that was said of a key."""
        return " | ".join(one["what"] for one in self.json[kind] if one["key"] == key)


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """25 conversations of one question in ``train.jsonl``, a tiny base, all fixtures."""
    shutil.copytree(tiny_base, tmp_path / "base")
    for file in FIXTURES.iterdir():
        if file.suffix in (".yaml", ".sh", ".json"):
            shutil.copy(file, tmp_path / file.name)
    rows(tmp_path / "train.jsonl", 25)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path: Path, count: int, shape: str = "messages") -> None:
    """So many different rows."""
    made = []
    for at in range(count):
        question, answer = f"What comes after {at}?", f"{at + 1} comes after {at}."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append(
            {
                "messages": {"messages": turns},
                "pairs": {"prompt": question, "completion": answer},
                "text": {"text": f"{question} {answer}"},
                "shop": {"question": question, "reply": answer},
                "conversations": {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns]},
            }[shape]
        )
    text = json.dumps(made) if path.suffix == ".json" else "\n".join(map(json.dumps, made)) + "\n"
    path.write_text(text, encoding="utf-8")


def plan() -> dict[str, Any]:
    """The plan of the imported recipe, which must be whole."""
    said = finetune("plan", str(OUT), "--json")
    assert said.code == 0, said.err
    planned: dict[str, Any] = json.loads(said.out)
    return planned
