"""What is said of a run: its files' facts, where it stands, and nothing that a damaged file could break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import runpage, runstory
from finetune.runfolder import RunFolder
from tests import runs
from tests.runs import OUTPUT

FILES = ("plan.json", "identity.json", "metrics.jsonl", "scores.json", "samples.jsonl", "data.json", "recipe.yaml",
         "finished.json", "rows.jsonl", "adapter/manifest.json")  # fmt: skip
DAMAGES = [
    b"", b"\xff\xfe\x00", b"[]", b"null", b"{", b'{"step": 1', b'"text"', b"[" * 5000, b"12\n",
    b'{"steps": {"a": 1}, "notes": 3, "budget": [], "recipe": [], "sha256": [], "data": 4, "base": "x"}',
    b'{"step": NaN, "loss": Infinity}\n{"step": 1e400, "loss": 1}\n{"step": 2, "loss": "<b>"}\n{"step": true}',
    b'{"steps": 1' + b"0" * 400 + b"}", b'{"before": {"loss": []}, "after": 5, "step 1": {"confidence_interval": 3}}',
    b'{"row": [1], "expected": null, "before": {"a": 1}, "after": 3}', b'{"sources": 3, "shown": [1, {"pieces": 2}]}',
    b'{"shown": [{"pieces": [{"kind": [], "ids": 3}, {"kind": "end", "ids": ["x", 1e300], "weight": "a"}]}]}',
    b'{"lengths": [{"from": 1}, {"from": 9, "to": 1, "samples": -5}], "asked": [], "held_out": "x"}',
]  # fmt: skip


def test_the_summary_holds_the_files_facts(finished: Path) -> None:
    story = runstory.read(RunFolder(OUTPUT))
    said = runstory.summary(story)
    plan = json.loads((OUTPUT / "plan.json").read_text())
    scores = json.loads((OUTPUT / "scores.json").read_text())
    assert "A LoRA adapter of rank" in said
    assert "was trained on base (qwen2" in said
    assert f"6 steps over {plan['samples']} samples: {plan['tokens']:,} tokens" in said
    assert f"loss went from {scores['before']['loss']:.4f} to {scores['after']['loss']:.4f}" in said
    assert story.curves["loss"] == [(line["step"], line["loss"]) for line in runs.metrics()]
    assert story.at_steps("loss") == [(0, scores["before"]["loss"]), (6, scores["after"]["loss"])]
    assert runstory.state(story, training=False) == ""


@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_breaks_the_story(finished: Path, name: str) -> None:
    for damage in DAMAGES:
        (OUTPUT / name).write_bytes(damage)
        page = runpage.page(runstory.read(RunFolder(OUTPUT)))
        assert page.endswith("</html>\n"), damage
        assert "<b>" not in page
    (OUTPUT / name).unlink()
    assert "</html>" in runpage.page(runstory.read(RunFolder(OUTPUT)))


def test_judgements_in_between_have_their_step(finished: Path) -> None:
    scores = json.loads((OUTPUT / "scores.json").read_text())
    del scores["after"]
    scores |= {f"step {step}": {"loss": 10.0 - step} for step in (10, 2)}
    (OUTPUT / "scores.json").write_text(json.dumps(scores))
    story = runstory.read(RunFolder(OUTPUT))
    assert [step for step, _ in story.at_steps("loss")] == [0, 2, 10]
    assert story.first_and_last() == ("before", "step 10")


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """An answer may hold U+2028, which ends a line of text but none of JSON lines; a torn line is passed over."""
    file = tmp_path / "samples.jsonl"
    file.write_text('{"answer": "one\u2028two\x85three"}\n[1]\n{"torn', encoding="utf-8")
    assert list(runstory.lines(file)) == [{"answer": "one\u2028two\x85three"}]
    assert list(runstory.lines(tmp_path / "none")) == []
