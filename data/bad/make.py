"""Write one small file for each fault that a data file can have, and what `finetune data check` must say of it.

    python data/bad/make.py          # rewrites the files of this folder; expected.json names code and row

Every file has good rows around the bad one, so that a check that stops early or blames the wrong row is seen.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BEFORE = {"messages": [{"role": "user", "content": "before"}, {"role": "assistant", "content": "first"}]}
AFTER = {"messages": [{"role": "user", "content": "after"}, {"role": "assistant", "content": "last"}]}


def row(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)})


ROWS: dict[str, tuple[str, str]] = {
    "broken-json": ('{"messages": [', "broken_json"),
    "duplicate-key": ('{"messages": [], "messages": []}', "duplicate_key"),
    "not-an-object": ("7", "not_an_object"),
    "nan": ('{"messages": NaN}', "not_a_number"),
    "huge-number": ('{"messages": ' + "9" * 5000 + "}", "broken_json"),
    "other-columns": ('{"input": 1}', "missing_column"),
    "no-turns": (row(), "no_turns"),
    "null-content": (row(USER, ANSWER | {"content": None}), "null_content"),
    "int-content": (row(USER, ANSWER | {"content": 3}), "wrong_type"),
    "picture": (row(USER, ANSWER | {"content": [{"type": "image"}]}), "not_text"),
    "misspelt-role": (row(USER, ANSWER | {"role": "asistant"}), "unknown_role"),
    "no-assistant": (row(USER), "no_assistant"),
    "empty-answer": (row(USER, ANSWER | {"content": " "}), "empty_answer"),
    "empty-question": (row(USER | {"content": " "}, ANSWER), "empty_question"),
    "missing-content": (row(USER, {"role": "assistant"}), "missing_column"),
    "misspelt-key": (row(USER, ANSWER | {"wieght": 0}), "unread_column"),
    "thinking-inside": (row(USER, ANSWER | {"content": "b <think>x</think> c"}), "thinking"),
    "two-users": (row(USER, USER, ANSWER), "turn_order"),
    "assistant-first": (row(ANSWER, USER, ANSWER), "turn_order"),
    "unanswered": (row(USER, ANSWER, USER), "unanswered"),
    "nothing-trained": (row(USER, ANSWER | {"weight": 0}), "nothing_trained"),
    "bad-weight": (row(USER, ANSWER | {"weight": -1}), "bad_weight"),
    "weight-of-user": (row(USER | {"weight": 1}, ANSWER), "bad_weight"),
    "weight-and-train": (row(USER, ANSWER | {"weight": 1, "train": False}), "bad_weight"),
    "tool-calls": (row(USER, ANSWER | {"tool_calls": [1]}), "tool_calls"),
    "tool-arguments": (row(USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}), "tool_calls"),
    "tool-injection": (
        row(USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": {"x": "<|im_end|>"}}]}), "special_token"
    ),
    "tools-without-name": (json.dumps({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}), "tools"),
    "system-twice": (json.dumps({"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"}),
                     "turn_order"),
    "thinking-twice": (row(USER, ANSWER | {"content": "<think>x</think>b", "reasoning": "x"}), "unread_column"),
    "unread-column": (row(USER, ANSWER | {"audio": {"id": "x"}}), "unread_column"),
    "nul": (row(USER, ANSWER | {"content": "a\0b"}), "nul"),
    "lone-surrogate": (row(USER, ANSWER | {"content": "\ud800"}), "lone_surrogate"),
    "turn-injection": (row(USER | {"content": "<|im_end|>"}, ANSWER), "special_token"),
    "duplicate": (json.dumps(BEFORE), "duplicate"),
    "near-duplicate": (json.dumps(BEFORE).replace("before", " BEFORE"), "near_duplicate"),
    "secret": (row(USER | {"content": "it is hf_" + "a1B2" * 6}, ANSWER), "secret"),
    "personal": (row(USER | {"content": "write to jane.doe@example.org"}, ANSWER), "personal_data"),
    "mojibake": (row(USER | {"content": "cafÃ©"}, ANSWER), "mojibake"),
}  # fmt: skip
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RANKED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "same-answers": (PAIR, PAIR | {"rejected": "b"}, "same_answers"),
    "rejected-missing": (PAIR, {"prompt": "a", "chosen": "b"}, "missing_column"),
    "rejected-ends-with-user": (PAIR, PAIR | {"rejected": [ANSWER, USER]}, "unanswered"),
    "pair-without-prompt": (PAIR, {"chosen": "b", "rejected": "c"}, "missing_column"),
    "label-of-text": ({"prompt": "a", "completion": "b", "label": True},
                      {"prompt": "a", "completion": "c", "label": "yes"}, "wrong_type"),
}  # fmt: skip
"""Rows that judge answers: name → (a good row, the bad one, its code)."""
GOOD = "\n".join(json.dumps(one) for one in (BEFORE, AFTER))
FILES: dict[str, bytes] = {
    "utf16.jsonl": GOOD.encode("utf-16"),
    "latin1.jsonl": GOOD.replace("before", "été").replace("\\u00e9", "é").encode("latin-1"),
    "empty.jsonl": b"\n \n",
    "gzip-by-another-name.jsonl": gzip.compress(GOOD.encode(), mtime=0),
    "open-quote.csv": b'prompt,completion\na,"b\n',
    "column-twice.csv": b"prompt,completion,completion\na,b,c\n",
    "broken-array.json": b"[{]",
}
"""Faults of a whole file: exit 3, one message."""


def main() -> int:
    expected: dict[str, Any] = {}
    for name, (text, code) in ROWS.items():
        (HERE / f"{name}.jsonl").write_text(f"{json.dumps(BEFORE)}\n\n{text}\n{json.dumps(AFTER)}\n", encoding="utf-8")
        expected[f"{name}.jsonl"] = {"code": code, "row": 2, "line": 3}
    for name, (good, bad, code) in RANKED.items():
        lines = [json.dumps(one) for one in (good, bad)]
        (HERE / f"{name}.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}\n", encoding="utf-8")
        expected[f"{name}.jsonl"] = {"code": code, "row": 2, "line": 3}
    for name, data in FILES.items():
        (HERE / name).write_bytes(data)
        expected[name] = {"code": None}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
