"""``finetune data check``: every row that cannot be trained, by place and code, and what is odd about the others."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from finetune import datacheck, prepare, records
from finetune.dataset import Reader, Source
from finetune.errors import DataError
from tests.conftest import ROOT
from tests.runs import chat, finetune, read_rows, write_rows

GOOD = json.dumps(chat("a", "b"))


def report(path: Path, **settings: Any) -> datacheck.Report:
    return datacheck.check(Reader(Source(path=str(path)), datacheck.CONTROL), **settings)


def codes(path: Path, **settings: Any) -> dict[str, int]:
    return dict(report(path, **settings).counts)


FOLDER = ROOT / "data" / "bad"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
WARNINGS = {"duplicate", "near_duplicate", "secret", "personal_data", "mojibake"}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_fault_has_its_code_and_place(name: str) -> None:
    wanted, path = EXPECTED[name], FOLDER / name
    said = finetune("data", "check", str(path), "--json")
    if wanted["code"] is None:  # a fault of the whole file
        assert said.code == 3
        (finding,) = json.loads(said.out)["sources"][0]["findings"]
        assert finding["code"] in ("unreadable", "empty_file")
        assert finding["where"].startswith(str(path))
        assert finding["fix"]
        return
    severity = "warning" if wanted["code"] in WARNINGS else "error"
    assert said.code == (0 if severity == "warning" else 3)
    (finding,) = json.loads(said.out)["sources"][0]["findings"]
    place = f"{path}:{wanted['line']}"  # a blank line is no row
    assert (finding["row"], finding["where"], finding["severity"]) == (wanted["row"], place, severity)
    assert finding["code"] == wanted["code"]
    assert finding["message"]
    assert finding["fix"]


def test_the_files_of_faults_are_what_their_script_makes(script: Any) -> None:
    made = script("data/bad/make.py")
    assert set(EXPECTED) == {f"{name}.jsonl" for name in (*made.ROWS, *made.RANKED)} | set(made.FILES)
    for name, (text, code) in made.ROWS.items():
        assert text in (FOLDER / f"{name}.jsonl").read_text()
        assert EXPECTED[f"{name}.jsonl"]["code"] == code


def test_every_fault_of_a_file_comes_at_once(tmp_path: Path, script: Any) -> None:
    path = tmp_path / "x.jsonl"
    rows = [text for text, code in script("data/bad/make.py").ROWS.values() if code not in WARNINGS]
    path.write_text("\n".join([GOOD, *rows, *["{"] * 100]))
    said = finetune("data", "check", str(path), "--json")
    assert said.code == 3
    (told,) = json.loads(said.out)["sources"]
    assert told["summary"]["errors"] == len(told["findings"]) == len(rows) + 100
    assert told["summary"]["codes"]["broken_json"] == 102
    printed = finetune("data", "check", str(path))
    assert printed.code == 3
    assert "… and 82 more of broken_json" in printed.out


ODD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "again": ([chat("q", "r"), chat("q", "r")], "duplicate"),
    "again, other blanks and case": ([chat("Who  is it?", "me"), chat("who is IT?", "me")], "near_duplicate"),
    "secret": ([chat("my key is hf_" + "a1B2" * 6, "thanks")], "secret"),
    "mail": ([chat("write to jane.doe@example.org", "done")], "personal_data"),
    "card": ([chat("pay with 4111 1111 1111 1111", "done")], "personal_data"),
    "wrongly decoded": ([chat("cafÃ©", "b")], "mojibake"),
    "very long": ([*(chat(f"{n} short", "b") for n in range(30)), chat("x" * 5000, "b")], "length_outlier"),
}


@pytest.mark.parametrize(("rows", "code"), ODD.values(), ids=ODD)
def test_what_is_odd_is_a_warning(rows: list[dict[str, Any]], code: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", rows)
    said = finetune("data", "check", str(tmp_path / "x.jsonl"), "--json")
    assert said.code == 0
    (found,) = json.loads(said.out)["sources"]
    assert [finding["code"] for finding in found["findings"]] == [code]
    assert found["findings"][0]["severity"] == "warning"
    assert found["summary"]["trainable"] == len(rows)


def test_ordinary_text_is_not_odd(samples: Path, dates: Path) -> None:
    for path in (*samples.glob("*.jsonl"), dates / "train.jsonl"):
        assert report(path).findings == []


def test_a_recipe_is_judged_with_its_own_tokenizer_window_and_training_rows(work: Path) -> None:
    rows = [chat(f"What is {n}?", f"{n}") for n in range(8)]
    write_rows(Path("train.jsonl"), [*rows, chat("long " * 200, "x"), chat("<|im_start|>", "x")])
    write_rows(Path("eval.jsonl"), [chat("what is  3?", "3"), chat("new", "n")])
    said = finetune("data", "check", "r.yaml", "--json")
    assert said.code == 3
    train, judged = json.loads(said.out)["sources"]
    assert train["summary"]["codes"] == {"special_token": 1, "too_long": 1}
    assert judged["summary"]["codes"] == {"leak": 1}
    assert "training row 4 of train.jsonl but for white space" in judged["findings"][0]["message"]
    assert finetune("data", "check", "r.yaml", "--set", "train.lerning_rate=1").code == 2


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("x.jsonl", GOOD.encode("utf-16"), "perhaps UTF-16"),
        ("x.jsonl", GOOD.replace("a", "é").encode("latin-1"), "latin-1"),
        ("x.jsonl", gzip.compress(GOOD.encode(), mtime=0), "this is a gzip file"),
        ("x.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-4], "cannot be read"),
        ("x.csv", b'prompt,completion\na,"b\n', "not valid CSV"),
        ("x.json", b"[{]", "not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message(name: str, data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    said = finetune("data", "check", str(tmp_path / name))
    assert said.code == 3
    assert what in said.out
    assert "[unreadable]" in said.out


def test_what_stands_before_the_unreadable_is_judged_too(tmp_path: Path) -> None:
    good, bad = GOOD.encode(), GOOD.replace('"b"', '"é"').encode("latin-1")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, b"{", *[good] * 3, bad]))
    said = finetune("data", "check", str(tmp_path / "x.jsonl"), "--json")
    assert said.code == 3
    (told,) = json.loads(said.out)["sources"]
    assert told["summary"]["codes"] == {"broken_json": 1, "duplicate": 3, "unreadable": 1}
    assert told["findings"][-1]["where"] == f"{tmp_path}/x.jsonl:6"


def test_gzipped_files_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(f"{GOOD}\n".encode() * 3))
    assert codes(tmp_path / "x.jsonl.gz") == {"duplicate": 2}
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"prompt,completion\na,b\n"))
    assert report(tmp_path / "x.csv.gz").trainable == 1


def test_a_file_larger_than_memory_is_read_line_by_line(tmp_path: Path) -> None:
    """The next line is not asked for before this one is done."""
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n" * 5)
    reader = records.read(path)
    assert next(reader).number == 1
    path.write_bytes(b"")  # what was not yet read is gone, but for the buffer
    assert sum(1 for _ in reader) <= 4


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    assert codes(tmp_path / "x.jsonl") == {"empty_file": 1}
    assert finetune("data", "check", str(tmp_path / "x.jsonl")).code == 3


def _mutated(rng: random.Random, data: bytes) -> bytes:
    """One byte changed, removed or doubled, or one field's value exchanged."""
    if rng.random() < 0.5:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)] * rng.randrange(3)) + data[place + 1 :]
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    row = json.loads(lines[number])
    target = rng.choice([row, *row["messages"]])
    key = rng.choice(list(target))
    target[key] = rng.choice([None, 3, "", [], {}, "\0", [{}], True, "<|im_end|>", "x" * 300])
    lines[number] = json.dumps(row)
    return "\n".join(lines).encode() + b"\n"


def test_a_files_name_reaches_no_terminal_raw(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m\n.jsonl"
    path.write_text(json.dumps(chat("q", "r")) + "\n{}\n")
    lines = report(path).lines()
    assert len(lines) > 1
    assert not any("\x1b" in line or "\n" in line for line in lines)


def test_two_thousand_mutations_end_in_an_answer(tmp_path: Path) -> None:
    """No traceback, no hang; where nothing is found the rows are those that training reads."""
    rng = random.Random(5)
    good = "".join(json.dumps(chat(f"q{n}", f"r{n}", system="s" * (n % 2))) + "\n" for n in range(4)).encode()
    path = tmp_path / "x.jsonl"
    clean = faulty = 0
    for _ in range(2000):
        path.write_bytes(_mutated(rng, good))
        began = time.monotonic()
        errors = report(path).errors
        assert time.monotonic() - began < 2
        try:
            read_rows(path, special_tokens=datacheck.CONTROL)
            assert errors == 0
            clean += 1
        except DataError:
            assert errors
            faulty += 1
    assert clean > 100
    assert faulty > 500


def test_pairs_can_be_checked_but_not_trained_by_sft(work: Path) -> None:
    write_rows(Path("train.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert finetune("data", "check", "train.jsonl").code == 0
    said = finetune("data", "check", "r.yaml", "--json")
    assert said.code == 3
    assert json.loads(said.out)["sources"][0]["summary"]["codes"] == {"ranked": 1}
    said = finetune("plan", "r.yaml")
    assert (said.code, said.err.count("\n")) == (3, 1)
    assert "train.jsonl:1: this row ranks two answers" in said.err


def test_text_that_the_tokenizer_composes_is_said_and_scored_as_composed(work: Path) -> None:
    write_rows(Path("train.jsonl"), [chat("a", "cafe\u0301"), chat("b", "caf\u00e9")])
    train = json.loads(finetune("data", "check", "r.yaml", "--json").out)["sources"][0]
    assert [(one["row"], one["code"]) for one in train["findings"]] == [(1, "normalised")]
    located, renderer = prepare.open_renderer(Path("r.yaml"), ())
    assert {renderer.question(row).answer for row in read_rows(Path("train.jsonl"))} == {"caf\u00e9"}
    assert located.recipe.data.train_path == "train.jsonl"


KEY = "hf_" + "a1B2" * 8


def test_no_message_shows_what_may_be_a_key(tmp_path: Path) -> None:
    good = chat("a", "b")
    rows = [
        json.dumps(good), json.dumps({KEY: 1}), f'{{"{KEY}": 1, "{KEY}": 2}}',
        json.dumps({"messages": KEY}), json.dumps({"messages": [{"role": KEY, "content": "a"}]}),
        json.dumps({"messages": [good["messages"][0], good["messages"][1] | {"weight": KEY}]}),
        json.dumps({"messages": [good["messages"][0], good["messages"][1] | {"tool_calls": KEY}]}),
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    said = finetune("data", "check", str(tmp_path / "x.jsonl"), "--json")
    assert json.loads(said.out)["sources"][0]["summary"]["errors"] == 6
    assert KEY[:12] not in said.out


def test_keys_are_found_wherever_text_is_read(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [KEY]}}]}
    thinking = {"role": "assistant", "content": "b", "reasoning_content": f"the key is {KEY}"}
    tools = [{"name": "f", "description": f"uses {KEY}"}]
    user = {"role": "user", "content": "a"}
    write_rows(
        tmp_path / "x.jsonl",
        [{"messages": [user, call]}, {"messages": [user, thinking]}, chat("a", "b") | {"tools": tools}],
    )
    assert codes(tmp_path / "x.jsonl") == {"secret": 3}


def test_rows_with_other_calls_thinking_or_tools_are_other_rows(tmp_path: Path) -> None:
    user = {"role": "user", "content": "a"}
    calls = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": n}}]} for n in range(3)]
    thoughts = [{"role": "assistant", "content": "b", "thinking": text} for text in ("x", "y")]
    rows = [{"messages": [user, one]} for one in (*calls, *thoughts)]
    rows += [chat("a", "c") | {"tools": [{"name": name}]} for name in ("f", "g")]
    write_rows(tmp_path / "x.jsonl", rows)
    assert report(tmp_path / "x.jsonl", search=datacheck.Search(near=False)).counts == {}


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "z.jsonl").symlink_to("/dev/zero")
    for name in ("x.jsonl", "z.jsonl"):
        said = finetune("data", "check", str(tmp_path / name))
        assert said.code == 3
        assert "not a regular file" in said.out
