"""Where rows come from: files and folders, mixed by token share, with other column names; a run from each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import manifest, prepare
from finetune.errors import DataError, RecipeError
from tests.runs import OUTPUT, chat, finetune, train, write_rows

LOSS = ("evaluate.metrics=[loss]", "train.steps=4")


def recipe(data: str, name: str = "s.yaml") -> str:
    """The workplace's recipe with another ``data:`` section."""
    text = Path("r.yaml").read_text()
    before, _, after = text.partition("data:\n")
    _, _, rest = after.partition("train:\n")
    Path(name).write_text(f"{before}data:\n{data}train:\n{rest}")
    return name


MIXED = """\
  sources:
    - path: short.jsonl
      share: 0.75
    - path: long.csv
      share: 0.25
      columns: {prompt: question, completion: reply}
  eval_fraction: 0.2
"""


@pytest.fixture
def mixed(work: Path) -> str:
    write_rows(Path("short.jsonl"), [chat(f"{n}", "x") for n in range(40)])
    lines = "".join(f'"{n} {"long " * 9}","y {n}"\n' for n in range(40))
    Path("long.csv").write_text("question,reply\n" + lines)
    return recipe(MIXED)


def test_shares_are_of_tokens_and_what_was_realised_is_said(mixed: str) -> None:
    said = finetune("plan", mixed, "--set", "train.steps=60", *_set(LOSS[0]))
    assert said.code == 0, said.err
    lines = [line for line in said.out.splitlines() if "of the tokens" in line]
    assert len(lines) == 2
    for line, name, share in zip(lines, ("short.jsonl", "long.csv"), (75, 25), strict=True):
        assert f"{name} gives" in line
        assert f"({share}.0% asked)" in line
        assert abs(float(line.split("gives ")[1].split("%")[0]) - share) < 2
    assert "long.csv is read as completion: 'prompt' → user turn, 'completion' → assistant turn" in said.out


def _set(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def test_a_mixture_trains_resumes_and_is_judged_by_source(mixed: str) -> None:
    said = finetune("train", mixed, *_set(*LOSS))
    assert said.code == 0, said.err
    scores = json.loads((OUTPUT / "scores.json").read_text())["after"]
    assert set(scores["loss_by_source"]) == {"short.jsonl", "long.csv"}
    assert scores["rows"] == 16
    assert "long.csv" in said.out
    write_rows(Path("short.jsonl"), [chat("other", "x")] * 3)
    changed = finetune("train", mixed, *_set(*LOSS))
    assert changed.code == 3
    assert "short.jsonl: this file is not the one that the run began with" in changed.err


def test_a_mixture_goes_on_with_the_same_samples_and_any_number_of_workers(mixed: str) -> None:
    """S21: interrupted after two steps, and taken up by two loader processes: the bits of an unbroken run."""

    def adapter(*changes: str, options: tuple[str, ...] = ()) -> str:
        said = finetune("train", mixed, *_set("evaluate.metrics=[loss]", *changes), *options)
        assert said.code == 0, said.err
        return manifest.digest(OUTPUT / "adapter" / "adapter_model.safetensors")

    whole = adapter("train.steps=5")
    shutil.rmtree(OUTPUT)
    assert adapter("train.steps=2") != whole
    assert adapter("train.steps=5", "train.workers=2", options=("--extend",)) == whole


def test_rows_are_held_out_of_each_source(mixed: str) -> None:
    prepared = prepare.prepare(Path(mixed), LOSS)
    assert prepared.held_out is not None
    assert prepared.samples is not None
    held = [example.where for example in prepared.held_out.examples]
    assert [sum(name in place for place in held) for name in ("short.jsonl", "long.csv")] == [8, 8]
    assert not set(held) & {example.where for example in prepared.samples}


def test_a_folder_is_read_by_split(work: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        (Path("set") / split).mkdir(parents=True)
        write_rows(Path("set") / split / "a.jsonl", [chat(f"{split} {n}", "x") for n in range(count)])
        write_rows(Path("set") / split / "b.jsonl", [chat(f"{split} b{n}", "x") for n in range(count)])
    assert train("data.train_path=set", "data.eval_path=set", *LOSS).code == 0
    prepared = prepare.prepare(Path("r.yaml"), ("data.train_path=set", "data.eval_path=set", *LOSS))
    assert prepared.samples is not None
    places = [example.where for example in prepared.samples]
    assert places == [f"set/train/{name}.jsonl:{n}" for name in "ab" for n in range(1, 7)]
    with pytest.raises(DataError, match="split"):
        prepare.prepare(Path("r.yaml"), ("data.train_path=set", "data.eval_path=set", "data.eval_split=dev", *LOSS))


def test_a_saved_data_set_is_read(work: Path) -> None:
    import datasets

    rows = [chat(f"{n}", "x") for n in range(6)]
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    said = finetune("data", "check", "saved", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["sources"][0]["summary"]["trainable"] == 6
    assert train("data.train_path=saved", *LOSS).code == 0


FAULTS: dict[str, tuple[str, str]] = {
    "neither": ("  format: auto\n", "train_path or sources must be given"),
    "both": ("  train_path: train.jsonl\n  sources: [{path: train.jsonl}]\n", "cannot be given together"),
    "shares": (
        "  sources: [{path: train.jsonl, share: 0.5}, {path: eval.jsonl, share: 0.4}]\n",
        "add to 0.9, not to 1",
    ),
    "one share": ("  sources: [{path: train.jsonl, share: 0.5}, {path: eval.jsonl}]\n", "the other sources have one"),
    "misspelt": ("  sources: [{pth: train.jsonl}]\n", "did you mean 'path'"),
    "missing file": ("  sources: [{path: trian.jsonl}]\n", "no such file"),
    "a hub id that is a file": ("  train_path: base/train.jsonl\n", "no such file"),
    "format beside sources": ("  format: chat\n  sources: [{path: train.jsonl}]\n", "has no meaning beside sources"),
    "judged on itself": (
        "  sources: [{path: train.jsonl}]\n  eval_path: train.jsonl\n",
        "is the file that is trained on",
    ),
}


@pytest.mark.parametrize(("data", "what"), FAULTS.values(), ids=FAULTS)
def test_faults_of_sources_are_faults_of_the_recipe(data: str, what: str, work: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare.prepare(Path(recipe(data)), LOSS)
    assert what in str(caught.value)
    assert all(fault.where.startswith("s.yaml:") for fault in caught.value.faults)


def test_a_column_that_is_not_there_is_named(work: Path) -> None:
    said = train("data.columns={messages: dialog}", *LOSS)
    assert said.code == 3
    assert "dialog: is missing (found 'messages')" in said.err


def test_columns_lead_to_a_format(work: Path) -> None:
    rows: list[dict[str, Any]] = [{"dialog": chat(f"{n}", "x")["messages"], "text": "y"} for n in range(5)]
    write_rows(Path("train.jsonl"), rows)
    said = train("data.columns={messages: dialog}", "data.eval_path=null", *LOSS)
    assert said.code == 3  # messages or text?
    assert "fit several formats" in said.err
    said = train("data.columns={messages: dialog}", "data.format=chat", "data.eval_path=null", *LOSS)
    assert said.code == 0, said.err
    assert "read as chat: 'messages' → turns; not read: 'text'" in said.out


def test_faults_of_all_sources_come_at_once(mixed: str) -> None:
    write_rows(Path("short.jsonl"), [chat("a", " ")])
    Path("long.csv").write_text("question,reply\nq,\n")
    said = finetune("plan", mixed, *_set(*LOSS))
    assert said.code == 3
    assert [line.split(": ")[1] for line in said.err.splitlines()] == ["short.jsonl:1", "long.csv:2"]


def test_messages_in_a_cell_are_json(work: Path) -> None:
    cells = "".join('"' + json.dumps(chat(f"{n}", "x")["messages"]).replace('"', '""') + '"\n' for n in range(5))
    Path("train.csv").write_text("messages\n" + cells + '"[{]"\n')
    said = finetune("data", "check", "train.csv", "--json")
    (told,) = json.loads(said.out)["sources"]
    assert (told["summary"]["trainable"], told["summary"]["codes"]) == (5, {"broken_json": 1})
