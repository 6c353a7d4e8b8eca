from __future__ import annotations

import time

from finetune.evals import regex
from tests.evals.rows import questions


def test_without_groups_an_answer_must_match() -> None:
    verdicts, scores = regex.judge(questions("x", "x", "x"), ["on 2024-01-02.", "no", "<think>2024-01-02</think>\nno"],
                                   r"\d{4}-\d\d-\d\d")  # fmt: skip
    assert verdicts == [1, 0, 0]
    assert scores["regex"] == 1 / 3
    assert set(scores) == {"regex", "regex_interval"}


def test_what_groups_catch_must_be_what_they_catch_in_the_right_answer() -> None:
    """The final number of a worked solution."""
    asked = questions("6 + 6 = 12. #### 12", "#### 12", "#### 12", "no number")
    given = ["I say 12 #### 12", "#### 13", "12", "#### 1"]
    assert regex.judge(asked, given, r"#### (\d+)")[0] == [1, 0, 0, 0]


def test_a_search_that_would_not_end_is_stopped_and_told() -> None:
    began = time.monotonic()
    verdicts, scores = regex.judge(questions("x", "x"), ["aaaa", "a" * 60 + "!"], r"^(?:a|aa)+$")
    assert time.monotonic() - began < 20
    assert verdicts == [1, 0]
    assert scores["regex_stopped"] == 1
