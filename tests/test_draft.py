"""A first recipe: of every format that is trained it loads and plans; of what cannot be trained there is none."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from finetune import dataset, draft, hardware, known_models, proposal, recipe, survey
from finetune.base import inspect
from finetune.errors import DataError, EnvironmentFault
from finetune.renderer import Renderer
from finetune.tokenizer import load_tokenizer
from tests import runs
from tests.conftest import ROOT
from tests.runs import finetune

TRAINED = ("alpaca", "chat", "completion", "sharegpt", "text")
OUT = Path("recipe.yaml")


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the samples and a base, on a machine without a card."""
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "data" / "samples")
    shutil.copytree(tiny_base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TRAINED)
def test_every_format_gives_a_recipe_that_plans(name: str, place: Path) -> None:
    file = f"data/samples/{name}.jsonl"
    if name in ("chat", "sharegpt"):  # the tiny template has no tools, and such rows are refused
        rows = [line for line in (place / file).read_text().splitlines() if "tools" not in json.loads(line)]
        (place / file).write_text("\n".join(rows) + "\n")
    said = finetune("init", file, "--model", "base")
    assert (said.code, said.err) == (0, "")
    made = recipe.load(OUT)
    assert (made.data.format, made.data.train_path, made.model) == (name, file, "base")
    planned = finetune("plan", str(OUT), "--json", "--quiet")
    assert (planned.code, planned.err) == (0, "")
    plan = json.loads(planned.out)
    assert plan["steps"] >= 1
    assert "finetune plan recipe.yaml" in said.out.split("next:")[1]
    assert "finetune train recipe.yaml" in said.out.split("next:")[1]
    assert not (place / "runs").exists()
    for line in OUT.read_text().splitlines():  # each key says why
        assert not line.strip() or line.startswith("#") or " # " in line, line


@pytest.mark.parametrize("name", ["csv", "json", "gz"])
def test_other_files(name: str, place: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(30)]
    path = place / f"rows.{'jsonl.gz' if name == 'gz' else name}"
    if name == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif name == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert finetune("init", path.name, "--model", "base").code == 0
    assert finetune("plan", str(OUT)).code == 0
    made = recipe.load(OUT)
    assert made.evaluate.metrics == ["loss", "exact_match"]
    assert made.data.eval_fraction == 0.1


@pytest.mark.parametrize("name", ["preference", "kto"])
def test_rows_that_judge_answers_are_refused(name: str, place: Path) -> None:
    said = finetune("init", f"data/samples/{name}.jsonl", "--model", "base")
    assert said.code == 3
    assert "and this objective trains on every answer; train with objective.method: " in said.err
    assert not OUT.exists()


def test_a_broken_file_is_reported_as_data_check_does(place: Path) -> None:
    shutil.copy(ROOT / "data" / "bad" / "broken-json.jsonl", place / "rows.jsonl")
    said, checked = finetune("init", "rows.jsonl", "--model", "base"), finetune("data", "check", "rows.jsonl")
    assert (said.code, checked.code) == (3, 3)
    assert said.out == checked.out
    assert "cannot be trained" in said.err
    assert "--fix" in said.err
    assert [path.name for path in place.glob("*recipe*")] == []


def test_nothing_is_overwritten(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OUT.write_text("mine")
    said = finetune("init", "data/samples/completion.jsonl", "--model", "base")
    assert (said.code, OUT.read_text()) == (5, "mine")
    assert "something is there already" in said.err
    monkeypatch.setattr(draft, "refuse_existing", lambda out: None)  # one that came while the data were read
    finetune("init", "data/samples/completion.jsonl", "--model", "base")
    assert OUT.read_text() == "mine"
    assert not list(place.glob(".recipe*"))


CARDS = [(16, "nf4"), (24, "nf4"), (80, "bf16")]


@pytest.mark.parametrize(("gigabytes", "weights"), CARDS)
def test_a_card_gets_what_fits_it(gigabytes: int, weights: str, place: Path) -> None:
    rows = [runs.chat("word " * (200 + n), "answer " * 400) for n in range(40)]
    runs.write_rows(Path("rows.jsonl"), rows)
    said = finetune("init", "rows.jsonl", "--card", str(gigabytes))
    assert (said.code, said.err) == (0, "")
    made = recipe.load(OUT)
    assert (made.model, made.quantize.weights) == ("Qwen/Qwen-14B-Chat", weights)
    assert finetune("plan", str(OUT), "--card", str(gigabytes)).code == 0


def test_no_card_is_small_enough(place: Path) -> None:
    said = finetune("init", "data/samples/completion.jsonl", "--card", "6")
    assert said.code == 5
    assert "needs about" in said.err
    assert not OUT.exists()


def test_plain_text_takes_the_base_model(place: Path) -> None:
    assert finetune("init", "data/samples/text.jsonl", "--card", "24").code == 0
    assert recipe.load(OUT).model == "Qwen/Qwen-14B"


def test_without_a_card_and_a_small_model_it_asks_for_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = finetune("init", "data/samples/completion.jsonl")
    assert said.code == 4
    assert "--model FOLDER" in said.err
    shutil.copytree(place / "base", place / "data" / "bases" / "smollm2-135m-instruct")
    assert finetune("init", "data/samples/completion.jsonl").code == 0
    assert recipe.load(OUT).model == "data/bases/smollm2-135m-instruct"
    assert known_models.find(recipe.load(OUT).model) is not None


def test_json_is_one_object(place: Path) -> None:
    said = finetune("init", "data/samples/completion.jsonl", "--model", "base", "--json")
    made = json.loads(said.out)
    assert (said.code, made["recipe"], made["model"]) == (0, "recipe.yaml", "base")
    assert made["plan"]["steps"] >= 1


def _model(place: Path) -> proposal.Model:
    return proposal.choose(str(place / "base"), "chat", hardware.detect().device)


def _rows(lengths: list[int], answer: int = 5) -> survey.Survey:
    return survey.Survey(
        format="chat", mapping="chat: …", lengths=lengths, answer=answer, thinking=False, measured=True
    )  # fmt: skip


def test_the_numbers(place: Path) -> None:
    model = _model(place)
    found = proposal.derive(_rows([60] * 5_000), model)
    assert (found.max_length, found.cut, found.epochs, found.held) == (64, 0, 2, 200)
    assert found.fraction == pytest.approx(0.04)
    assert found.steps * found.tokens_per_step == pytest.approx(60 * 4_800 * 2, rel=0.05)
    assert found.steps >= 50
    assert found.exact
    assert found.max_new_tokens >= 5
    assert not proposal.derive(_rows([60] * 50, answer=100), model).exact
    assert not proposal.derive(_rows([60] * 50, answer=0), model).exact
    alone = proposal.derive(_rows([60]), model)
    assert (alone.fraction, alone.exact) == (0.0, False)
    long = proposal.derive(_rows([60, 5_000]), model)
    assert (long.max_length, long.cut, long.fraction) == (model.positions, 1, 0.0)  # one row cannot be both


@pytest.mark.parametrize("rows", [[60, 60, 5_000], [5_000] * 8 + [60] * 2])
def test_a_row_that_fits_is_held_out_and_another_trained(place: Path, rows: list[int]) -> None:
    found = proposal.derive(_rows(rows), _model(place))
    held = dataset.draw(len(rows), found.fraction, found.seed, "")
    assert {rows[number - 1] for number in held} >= {60}
    assert any(length == 60 for number, length in enumerate(rows, 1) if number not in held)


def test_rows_that_all_are_too_long_are_refused(place: Path) -> None:
    with pytest.raises(DataError, match="no row fits"):
        proposal.derive(_rows([5_000]), _model(place))


def test_rows_beyond_the_window_are_dropped_by_name(place: Path) -> None:
    rows = [runs.chat("Say it.", "it " * n) for n in (3, 5, 4, 2_000)]
    runs.write_rows(Path("rows.jsonl"), rows)
    assert finetune("init", "rows.jsonl", "--model", "base").code == 0
    made = recipe.load(OUT)
    assert made.data.over_length == "drop"
    assert "1 rows are longer" in OUT.read_text()
    assert "are left out (data.over_length)" in finetune("plan", str(OUT)).out


def test_lengths_are_the_models_own(place: Path, samples: Path) -> None:
    path = str(samples / "completion.jsonl")
    measured = survey.measure(path, inspect(place / "base"), lambda *_: None)
    estimated = survey.measure(path, None, lambda *_: None)
    assert (measured.measured, estimated.measured) == (True, False)
    assert measured.rows == estimated.rows == 3
    made = Renderer(load_tokenizer(place / "base"), "<|im_end|>")
    rows = runs.read_rows(Path(path))
    assert list(measured.lengths) == [len(made.examples(row)[0].ids) for row in rows]


def test_a_hostile_name_stays_a_name(place: Path) -> None:
    name = 'ro"ws: # x.jsonl'
    shutil.copy(place / "data" / "samples" / "completion.jsonl", place / name)
    assert finetune("init", name, "--model", "base").code == 0
    made = recipe.load(OUT)
    assert made.data.train_path == name
    assert made.output == "runs/ro-ws----x"


def test_hostile_columns_do_not_leave_their_comment(place: Path) -> None:
    row = {"prompt": "a", "completion": "b", "x\noutput: /etc #": 1}
    runs.write_rows(Path("rows.jsonl"), [row] + [{**row, "prompt": f"{n}"} for n in range(5)])
    assert finetune("init", "rows.jsonl", "--model", "base").code == 0
    assert recipe.load(OUT).output == "runs/rows"


def test_a_folder_that_is_not_there_is_named_with_the_recipe(place: Path) -> None:
    said = finetune("init", "data/samples/completion.jsonl", "--model", "base", "--out", "nowhere/r.yaml")
    assert (said.code, ".tmp-" in said.err) == (5, False), said.err
    assert "nowhere/r.yaml: there is no folder nowhere" in said.err


def test_a_run_folder_that_is_there_is_left_alone(place: Path) -> None:
    (place / "runs" / "completion").mkdir(parents=True)
    assert finetune("init", "data/samples/completion.jsonl", "--model", "base").code == 0
    assert recipe.load(OUT).output == "runs/completion-2"


def test_a_failed_plan_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise EnvironmentFault("disk full", "runs", "free some")

    monkeypatch.setattr(draft.prepare, "prepare", full)
    assert finetune("init", "data/samples/completion.jsonl", "--model", "base").code == 5
    assert not OUT.exists()
