"""``--json``: what each verb answers a program, of one finished run on its way to a release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import options, terminal, verify
from tests.runs import OUTPUT, finetune
from tests.test_release import KNOWN, OUT, licensed, release


def answer(*words: str) -> dict[str, Any]:
    """The object, and proof that a quiet verb prints nothing else."""
    said = finetune(*words, "--json", "--quiet")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert isinstance(found, dict)
    return found


def test_a_run_is_told_as_it_stands(finished: Path) -> None:
    (run,) = answer("train", "r.yaml")["runs"]
    assert (run["folder"], run["finished"], run["adapter"]) == (str(OUTPUT), True, str(OUTPUT / "adapter"))
    assert run["steps"] == json.loads((OUTPUT / "finished.json").read_text())["steps"]
    assert run["scores"] == json.loads((OUTPUT / "scores.json").read_text())
    assert answer("report", str(OUTPUT)) == {"pages": [str(OUTPUT / "report.html")]}


def test_rows_are_told_token_by_token(finished: Path) -> None:
    (row,) = answer("data", "show", "r.yaml", "--row", "1")["rows"]
    ids = [token for piece in row["pieces"] for token in piece["ids"]]
    assert len(ids) == row["tokens"]
    assert sum(len(piece["ids"]) for piece in row["pieces"] if piece["weight"]) == row["trained"] > 0


def test_a_mended_copy_is_told(work: Path) -> None:
    Path("odd.jsonl").write_bytes(Path("train.jsonl").read_bytes() + b'{"messages": "\\u0000"}\n')
    said = finetune("data", "check", "odd.jsonl", "--fix", "mended.jsonl", "--json", "--quiet")
    found = json.loads(said.out)
    assert found["sources"][0]["summary"]["errors"] == 1
    assert (found["fixed"]["out"], said.code) == ("mended.jsonl", 3)
    assert sum(found["fixed"]["rows"].values()) > 0


def test_what_ships_is_told(finished: Path) -> None:
    merged = answer("merge", str(OUTPUT), "--out", "merged")
    assert (merged["out"], merged["proof"]["holds"]) == ("merged", True)
    assert merged["base"]["sha256"] == json.loads((OUTPUT / "identity.json").read_text())["base"]
    exported = answer("export", str(OUTPUT), "--out", "plain")
    assert (exported["kind"], exported["target"]) == ("adapter", "peft")
    assert set(exported["sha256"]) >= {"adapter_model.safetensors", "adapter_config.json"}
    shutil.copytree(OUTPUT, "runs/two")
    both = answer("merge", f"{OUTPUT}:0.5", "runs/two:0.5", "--out", "sum")
    assert [part["share"] for part in both["parts"]] == [0.5, 0.5]


def test_a_release_is_told_and_verified(finished: Path) -> None:
    licensed()
    said = release("--what", "adapter", *KNOWN, "--json", "--quiet")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["manifest"] == json.loads((OUT / "manifest.json").read_text())
    assert answer("verify", str(OUT)) == {"folder": str(OUT), "holds": True, "signature": None}
    (OUT / "README.md").write_text("other")
    said = finetune("verify", str(OUT), "--json")
    assert said.code == 1
    (fault,) = json.loads(said.out)["error"]["faults"]
    assert fault["what"].startswith("README.md is damaged")


def test_verify_shows_how_far_it_is(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    licensed()
    assert release("--what", "adapter", *KNOWN).code == 0
    read: list[int] = []
    assert verify.faults(OUT, read.append) == []
    names = [name for name in verify.listing(OUT)[0] if name != verify.SUMS]
    assert sum(read) == sum((OUT / name).stat().st_size for name in names)
    monkeypatch.setattr(terminal, "_WORTH_A_BAR", 0)
    assert "verifying, MB" in finetune("verify", str(OUT)).out
    assert "verifying, MB" not in finetune("verify", str(OUT), "--quiet").out


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("0.5h", 1800), (" 1m ", 60)]
)
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert options.seconds(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "2", "0m", "-1h", "2h!", "1m1h", "99999999999h"])
def test_what_is_no_time_is_told(text: str) -> None:
    said = finetune("train", "r.yaml", "--max-time", text)
    assert said.code == 2
    assert "--max-time" in said.err
    assert "write 2h, 90m or 1h30m" in said.err
