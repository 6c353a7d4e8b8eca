"""Rows as what a model is judged by: options, whose words a token is, and rows that a metric cannot judge."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune import heldout
from finetune.conversation import Conversation, Turn
from finetune.dataset import Row
from finetune.errors import DataError
from finetune.evaluate import HeldOut
from finetune.renderer import Renderer
from finetune.window import Window, fit
from tests import runs, tiny

TURNS = (Turn("system", "Be short."), Turn("user", "Is 2 even?"), Turn("assistant", "yes"), Turn("user", "And 3?"),
         Turn("assistant", "no"))  # fmt: skip
OPTIONS = {"multiple_choice": ["yes", "no"]}


@pytest.fixture(scope="module")
def plain(tiny_base: Path) -> Renderer:
    return tiny.load(tiny_base).renderer


def asked(turns: tuple[Turn, ...], where: str = "r:1", kept: Any = None) -> Row:
    return Row(conversation=Conversation(turns), where=where, kept=kept)


def made(renderer: Renderer, rows: Sequence[Row], metrics: Sequence[str], needs: dict[str, Any]) -> HeldOut:
    return heldout.make(fit(rows, Window(renderer=renderer, max_length=512)), renderer, metrics, needs)


def test_options_are_answers_in_place_of_the_right_one(plain: Renderer) -> None:
    (question,) = made(plain, [asked(TURNS)], ["multiple_choice"], OPTIONS).questions
    assert (question.right, question.answer) == (1, "no")
    assert question.asked[-1] == ("user", "And 3?")
    for option, text in zip(question.options, ("yes", "no"), strict=True):
        assert option.ids[: len(question.prompt)] == question.prompt
        said = [token for token, weight in zip(option.ids, option.weights, strict=True) if weight]
        assert plain.tokenizer.decode(said) == text + plain.stop_token
        assert not any(option.weights[: len(question.prompt)])


def test_a_row_may_have_its_own_options(plain: Renderer) -> None:
    row = asked(TURNS, kept=["no", "perhaps", "yes"])
    (question,) = made(plain, [row], ["multiple_choice"], {"multiple_choice": "choices"}).questions
    assert (question.right, len(question.options)) == (0, 3)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (["yes", "perhaps"], "the right answer 'no' is none of its options"),
        (["no"], "two texts or more"),
        (None, "two texts or more; found None"),
        (["no", 3], "two texts or more"),
        (["no", " no"], "an option comes twice"),
    ],
)
def test_options_that_are_none(plain: Renderer, kept: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        made(plain, [asked(TURNS, kept=kept)], ["multiple_choice"], {"multiple_choice": "choices"})
    assert caught.value.faults[0].where == "r:1"


def test_a_metric_that_calls_the_right_answer_wrong_is_refused_by_row(plain: Renderer, tmp_path: Path) -> None:
    rows = [asked((Turn("user", "?"), Turn("assistant", text)), f"r:{text}") for text in ("12", "x")]
    with pytest.raises(DataError, match="regex calls this row's own answer wrong: 'x'") as caught:
        made(plain, rows, ["regex"], {"regex": r"\d"})
    assert [fault.where for fault in caught.value.faults] == ["r:x"]
    (tmp_path / "s.json").write_text('{"type": "integer"}')
    with pytest.raises(DataError, match="json_schema calls this row's own answer wrong: 'x'"):
        made(plain, rows, ["json_schema"], {"json_schema": str(tmp_path / "s.json")})


def test_whose_words_each_supervised_token_is(tiny_base: Path) -> None:
    policy = tiny.load(tiny_base)
    everything = Renderer(policy.tokenizer, policy.stop_token, train_on="all")
    held = made(everything, [asked(TURNS)], ["loss"], {})
    (example,), (roles,) = held.examples, held.roles
    said = [token for token, weight in zip(example.ids, example.weights, strict=True) if weight]
    by_role: dict[str, str] = {}
    for role in dict.fromkeys(roles):
        by_role[role] = policy.tokenizer.decode([one for one, own in zip(said, roles, strict=True) if own == role])
    assert list(by_role) == ["system", "user", "assistant"]
    assert "Be short." in by_role["system"]
    assert by_role["user"].startswith("<|im_start|>user")  # the frame goes with its turn
    assert by_role["assistant"].startswith("<|im_start|>assistant")
    assert re.sub(r"<\|.*?\|>|\s|user", "", by_role["user"]) == "Is2even?And3?"
    assert re.sub(r"<\|.*?\|>|\s|assistant", "", by_role["assistant"]) == "yesno"


def test_a_run_tells_the_loss_of_each_role_and_every_metric(work: Path) -> None:
    """The whole way: a recipe with every metric, through training into the files that others read."""
    (work / "answer.json").write_text('{"type": "integer"}')
    (work / "judge.py").write_text(
        "import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n    print(len(row['answer']) / 10)\n"
    )
    rows = [
        json.loads(line) | {"choices": ["2", "4", "6", "8"]} for line in Path("eval.jsonl").read_text().splitlines()
    ]
    runs.write_rows(Path("eval.jsonl"), rows)
    metrics = "[loss, exact_match, contains, regex, json_schema, multiple_choice, command]"
    wanted = ["data.train_on=all", f"evaluate.metrics={metrics}", r"evaluate.regex='(\d+)'",
              "evaluate.json_schema=answer.json", "evaluate.multiple_choice=choices",
              "evaluate.command=[python3, judge.py]", "evaluate.every=4"]  # fmt: skip
    said = runs.train(*wanted)
    assert said.code == 0, said.err
    scores = json.loads((runs.OUTPUT / "scores.json").read_text())
    assert list(scores) == ["before", "step 4", "after"]
    for found in scores.values():
        assert set(found) >= {"loss", "exact_match", "contains", "regex", "json_schema", "multiple_choice", "command"}
        assert set(found["loss_by_role"]) == {"user", "assistant"}
    lines = [json.loads(line) for line in (runs.OUTPUT / "samples.jsonl").read_text().splitlines()]
    for name, found in scores.items():
        for metric in ("exact_match", "contains", "regex", "json_schema", "multiple_choice", "command"):
            mean = sum(line["verdicts"][name][metric] for line in lines) / len(lines)
            assert mean == pytest.approx(found[metric])
    assert "multiple choice" in said.out
    page = (runs.OUTPUT / "report.html").read_text()
    assert all(word in page for word in ("multiple choice", "json schema", "role assistant"))
    other = runs.train(*wanted, "output=runs/two", "train.learning_rate=0.05")
    assert other.code == 0, other.err
    compared = json.loads(runs.finetune("compare", "runs/one", "runs/two", "--json").out)
    (answer,) = compared["answers"]
    assert set(answer["measures"]) == {"loss", *list(lines[0]["verdicts"]["after"])}
    assert all(one["rows"] == 4 for one in answer["measures"].values())
    assert "multiple choice" in runs.finetune("compare", "runs/one", "runs/two").out
