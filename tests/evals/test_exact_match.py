from __future__ import annotations

import pytest

from finetune import bootstrap
from finetune.dataset import Question
from finetune.evals import exact_match


def questions(answers: list[str]) -> list[Question]:
    return [Question(prompt=(1,), answer=text, where=f"rows.jsonl:{i}") for i, text in enumerate(answers, 1)]


def test_an_answer_counts_when_every_character_is_right() -> None:
    asked = questions(["1999-12-31", " 5", "Ja", "a b", "", "7"])
    verdicts, scores = exact_match.judge(
        asked, ["1999-12-31\n", "5 ", "ja", "a  b", "x", "<think>\n3 + 4\n</think>\n\n7"]
    )
    assert scores["exact_match"] == 0.5
    assert verdicts == [1, 1, 0, 0, 0, 1]
    assert scores["confidence_interval"] == list(bootstrap.wilson(3, 6))


def test_answers_and_questions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match.judge(questions(["a", "b"]), ["a"])
