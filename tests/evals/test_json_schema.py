from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.errors import EnvironmentFault
from finetune.evals import json_schema
from tests.evals.rows import questions

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer", "minimum": 0}}}


def test_the_whole_answer_must_be_json_that_fits(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    given = ['{"age": 3}', '{"age": -1}', '```json\n{"age": 3}\n```', '{"age": 3} ok', '<think>h</think>\n{"age": 4}',
             '{"age": NaN}', "[" * 100_000]  # fmt: skip
    verdicts, scores = json_schema.judge(questions(*"abcdefg"), given, str(tmp_path / "s.json"))
    assert verdicts == [1, 0, 0, 0, 1, 0, 0]
    assert scores["json_schema"] == 2 / 7


def test_a_schema_that_has_gone_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        json_schema.judge(questions("a"), ["a"], str(tmp_path / "s.json"))
