"""``finetune eval``: who is judged, on what, what is kept by digest, and what is refused before a model loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import loading
from tests import runs
from tests.runs import OUTPUT, Said, finetune

MERGED = OUTPUT / "merged"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The folders that weights are read from; nothing was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, read = loading.load, list[str]()

    def counted(base: Any, *arguments: Any, **more: Any) -> Any:
        read.append(base.folder.name)
        return real(base, *arguments, **more)

    monkeypatch.setattr(loading, "load", counted)
    return read


def judged(*arguments: str) -> dict[str, Any]:
    said = finetune("eval", *arguments, "--json", "--quiet")
    assert (said.code, said.err) == (0, ""), said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def refused(said: Said, code: int, *words: str) -> None:
    assert said.code == code, said.out + said.err
    assert said.err.count("\n") <= 4
    assert all(word in said.err for word in words), said.err


def test_a_run_is_judged_with_its_base_and_its_merge(finished: Path, loads: list[str]) -> None:
    found = judged(str(OUTPUT))
    assert list(found["scores"]) == ["base", "adapter"]
    stored = json.loads((OUTPUT / "scores.json").read_text())
    assert found["scores"]["base"]["loss"] == pytest.approx(stored["before"]["loss"], abs=1e-9)
    assert found["scores"]["adapter"]["loss"] == pytest.approx(stored["after"]["loss"], abs=1e-9)
    assert loads == ["base"]  # once for both
    assert runs.merge_run(out=MERGED).code == 0
    loads.clear()
    with_merge = judged(str(OUTPUT))
    assert list(with_merge["scores"]) == ["base", "adapter", "merged"]
    assert with_merge["known"] == ["base", "adapter"]
    assert loads == ["merged"]
    stored = json.loads((OUTPUT / "scores.json").read_text())
    assert with_merge["scores"]["merged"]["loss"] == pytest.approx(stored["merged"]["loss"], abs=1e-9)
    kept = json.loads((OUTPUT / "evaluation.json").read_text())
    assert kept["scores"] == with_merge["scores"]
    page = (OUTPUT / "report.html").read_text()
    assert "<h2>Evaluation</h2>" in page
    assert f"{kept['scores']['merged']['loss']:.4f}" in page.split("<h2>Evaluation</h2>")[1]


def test_the_same_question_is_answered_at_once_and_says_so(finished: Path, loads: list[str]) -> None:
    first = judged(str(OUTPUT))
    loads.clear()
    said = finetune("eval", str(OUTPUT))
    assert said.code == 0
    assert "measured before, of the same files and settings: base, adapter; --fresh measures anew" in said.out
    assert loads == []
    assert json.loads((OUTPUT / "evaluation.json").read_text())["scores"] == first["scores"]
    again = judged(str(OUTPUT), "--fresh")
    assert loads == ["base"]
    assert again == first


def test_whatever_a_number_hangs_on_is_another_question(finished: Path, loads: list[str]) -> None:
    judged(str(OUTPUT))
    runs.awake(OUTPUT / "adapter")
    other = judged(str(OUTPUT))
    assert other["known"] == ["base"]  # the adapter is another one
    loads.clear()
    assert judged(str(OUTPUT), "--set", "evaluate.max_new_tokens=3")["known"] == []
    shorter = judged(str(OUTPUT), "--set", "evaluate.rows=2")
    assert shorter["known"] == []
    assert shorter["scores"]["base"]["rows"] == 2
    runs.write_rows(Path("more.jsonl"), [runs.chat("What is 5 and 5?", "10")])
    given = judged(str(OUTPUT), "--data", "more.jsonl")
    assert (given["known"], given["scores"]["adapter"]["rows"]) == ([], 1)
    assert judged(str(OUTPUT), "--data", "more.jsonl")["known"] == ["base", "adapter"]
    runs.write_rows(Path("more.jsonl"), [runs.chat("What is 5 and 5?", "11")])
    assert judged(str(OUTPUT), "--data", "more.jsonl")["known"] == []


def test_a_command_is_another_one_when_its_script_is_changed(finished: Path, loads: list[str]) -> None:
    judge = ["--set", "evaluate.metrics=[command]", "--set", "evaluate.command=[python3, judge.py]"]
    Path("judge.py").write_text("import sys\nfor line in sys.stdin: print(1)\n")
    assert judged(str(OUTPUT), *judge)["scores"]["adapter"]["command"] == 1
    Path("judge.py").write_text("import sys\nfor line in sys.stdin: print(0.5)\n")
    assert judged(str(OUTPUT), *judge)["scores"]["adapter"]["command"] == 0.5


def test_a_bare_model_is_judged_on_a_file_as_a_run_is(finished: Path, loads: list[str]) -> None:
    assert runs.merge_run(out=MERGED).code == 0
    shutil.move(MERGED, "model")
    found = judged("model", "--data", "eval.jsonl", "--set", "evaluate.max_new_tokens=4")
    stored = json.loads((OUTPUT / "scores.json").read_text())
    assert found["model"] == "model"
    assert found["scores"]["model"]["loss"] == pytest.approx(stored["merged"]["loss"], rel=0.02)  # bf16 against fp32
    assert set(found["scores"]["model"]) == set(stored["merged"])
    assert not Path("model/evaluation.json").exists()
    assert judged("model", "--data", "eval.jsonl", "--set", "evaluate.max_new_tokens=4")["known"] == ["model"]
    chosen = judged("base", "--data", "eval.jsonl", "--set", "evaluate.metrics=[multiple_choice]",
                    "--set", 'evaluate.multiple_choice=["2", "4", "6", "8"]')  # fmt: skip
    assert 0 <= chosen["scores"]["model"]["multiple_choice"] <= 1


def test_what_is_refused(finished: Path, loads: list[str]) -> None:
    run = str(OUTPUT)
    refused(finetune("eval", "base"), 3, "there are no rows to judge on", "--data")
    refused(finetune("eval", "nowhere"), 4, "not a run folder")
    refused(finetune("eval", run, "--set", "train.steps=3"), 2, "only how it is judged")
    refused(finetune("eval", run, "--set", "evaluate.metrics=[regex]"), 2, "regex needs evaluate.regex")
    refused(finetune("eval", "base", "--data", "eval.jsonl", "--set", "evaluate.metrics=[contians]"), 2, "'contains'")
    refused(finetune("eval", "base", "--data", "eval.jsonl", "--set", "evaluate.regex=x"), 2, "does not name regex")
    refused(finetune("eval", "base", "--data", "gone.jsonl"), 3, "gone.jsonl")
    refused(finetune("eval", run, "--data", "gone.jsonl"), 2, "no such file: 'gone.jsonl'")
    refused(finetune("eval", run, "--merged", "base"), 4, "not the merge of this run's adapter")
    refused(finetune("eval", "base", "--data", "eval.jsonl", "--merged", "base"), 4, "--merged goes with a run")
    refused(finetune("eval", run, "--task-path", "tasks"), 2, "name the tasks")
    refused(finetune("eval", "base", "--data", "eval.jsonl", "--set", "evaluate.max_new_tokens=100000"), 3, "positions")
    assert loads == []
    assert not (OUTPUT / "evaluation.json").exists()


def test_a_merge_of_another_adapter_is_left_out_and_said(finished: Path, loads: list[str]) -> None:
    assert runs.merge_run(out=MERGED).code == 0
    runs.awake(OUTPUT / "adapter")
    said = finetune("eval", str(OUTPUT))
    assert "is not the merge of this run's adapter: it is left out" in said.out
    assert list(json.loads((OUTPUT / "evaluation.json").read_text())["scores"]) == ["base", "adapter"]


def test_hostile_names_stay_text(finished: Path) -> None:
    """Another program's evaluation.json, shown in the page."""
    hostile = {
        "scores": {"<img src=x>": {"loss": 1.0, "command.<b>x</b>": 2}, "x": [], "y": {"loss": "NaN"}},
        "tasks": {"<script>": {"base": {"acc": 0.5, "<i>": 1}}, "t": 3, "u": {"base": {"acc": "x"}}},
    }
    (OUTPUT / "evaluation.json").write_text(json.dumps(hostile))
    assert finetune("report", str(OUTPUT)).code == 0
    page = (OUTPUT / "report.html").read_text().split("<h2>Evaluation</h2>")[1]
    assert "&lt;script&gt;" in page
    assert not any(tag in page for tag in ("<img", "<script", "<b>", "<i>"))
