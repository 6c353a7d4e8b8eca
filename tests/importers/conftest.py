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
TRL = """\
model_name_or_path: base
dataset_name: pairs.jsonl
use_peft: true
dtype: bfloat16
lora_target_modules: all-linear
per_device_train_batch_size: 4
max_steps: 2
"""
AXOLOTL = """\
base_model: base
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
learning_rate: 1e-5
micro_batch_size: 4
max_steps: 2
datasets:
  - path: pairs.jsonl
    type: chat_template.argilla_chat
"""
FACTORY = """\
model_name_or_path: base
finetuning_type: lora
lora_target: all
lora_rank: 8
bf16: true
dataset_dir: .
dataset: pairs
cutoff_len: 256
max_steps: 2
"""
SWIFT = """\
model: base
dataset: pairs.jsonl
tuner_type: lora
lora_rank: 8
torch_dtype: bfloat16
max_length: 256
max_steps: 2
"""
LABELS = ("pairs", "labels")


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


@pytest.fixture
def judged(place: Path) -> Path:
    """Twelve pairs and twelve labelled answers, in the columns of each trainer, and LLaMA-Factory's declarations."""
    pairs, labels, declared, swift, asked_by = [], [], [], [], []
    for at in range(12):
        asked = [{"role": "user", "content": f"What comes after {at}?"}]
        good, bad = ({"role": "assistant", "content": text} for text in (f"{at + 1}", f"{at + 2}"))
        pairs.append({"prompt": asked, "chosen": [*asked, good], "rejected": [*asked, bad]})
        labels.append({"prompt": asked, "completion": [good if at % 2 else bad], "label": bool(at % 2)})
        declared.append({"ask": asked[0]["content"], "good": good["content"], "bad": bad["content"], "ok": at % 3 > 0})
        swift.append({"messages": [*asked, good], "rejected_response": bad["content"]})
        plain = {"input": asked[0]["content"], "chosen": good["content"], "rejected": bad["content"]}
        asked_by.append({"system": "You count.", **plain})
    files = {"pairs": pairs, "labels": labels, "declared": declared, "swift": swift, "bradley": asked_by}
    files["margins"] = [{**row, "margin": 0.5} for row in pairs]
    for name, made in files.items():
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made))
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    info = {
        "pairs": {"file_name": "declared.jsonl", "ranking": True, "columns": columns},
        "labels": {"file_name": "declared.jsonl", "columns": {"prompt": "ask", "response": "good", "kto_tag": "ok"}},
    }
    (place / "dataset_info.json").write_text(json.dumps(info))
    return place


def imported(trainer: str, text: str) -> Imported:
    Path("recipe.yaml").unlink(missing_ok=True)
    Path("c.yaml").write_text(text)
    return Imported("c.yaml", "--from", trainer)


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
