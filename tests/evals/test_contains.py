from __future__ import annotations

from finetune import bootstrap
from finetune.evals import contains
from tests.evals.rows import questions


def test_the_right_answer_may_stand_among_other_words() -> None:
    asked = questions("42", " 42\n", "Paris", "a", "7")
    given = ["It is 42.", "42", "paris", "<think>a</think>\nb", "<think>3</think>\n7 it is"]
    verdicts, scores = contains.judge(asked, given)
    assert verdicts == [1, 1, 0, 0, 1]
    assert scores == {"contains": 0.6, "contains_interval": list(bootstrap.wilson(3, 5))}
