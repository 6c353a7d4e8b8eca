"""data.json of a run: its counts are those of what was trained, its tokens are the trained ones."""

from __future__ import annotations

import json
from pathlib import Path

from finetune import prepare
from tests import runs
from tests.runs import OUTPUT, chat, train, write_rows


def test_it_tells_what_was_trained(finished: Path) -> None:
    found = json.loads((OUTPUT / "data.json").read_text())
    samples = prepare.prepare(Path("r.yaml")).samples
    assert samples is not None
    assert found["samples"] == len(samples) == 20
    assert found["tokens"] == sum(len(one.ids) for one in samples)
    assert found["supervised"] == sum(sum(one.supervised) for one in samples)
    assert [one["name"] for one in found["sources"]] == ["train.jsonl"]
    assert sum(one["samples"] for one in found["lengths"]) == 20
    for one in found["lengths"]:
        here = [len(sample.ids) for sample in samples if one["from"] <= len(sample.ids) <= one["to"]]
        assert len(here) == one["samples"]
    assert found["held_out"] == 4


def test_its_tokens_are_the_samples_with_their_part_in_the_loss(finished: Path) -> None:
    shown = json.loads((OUTPUT / "data.json").read_text())["shown"]
    samples = prepare.prepare(Path("r.yaml")).samples
    assert samples is not None
    assert len(shown) == 2
    for one, sample in zip(shown, samples, strict=False):
        assert [token for piece in one["pieces"] for token in piece["ids"]] == list(sample.ids)
        weights = [piece["weight"] for piece in one["pieces"] for _ in piece["ids"]]
        assert weights == list(sample.weights)
        assert one["pieces"][-1]["kind"] == "end"
        assert sample.where in one["summary"]


def test_questions_are_there_as_text_and_long_samples_are_cut(work: Path) -> None:
    write_rows(Path("train.jsonl"), [chat("q " * 450, "a " * 5), chat("q", "a")])
    assert train("train.max_length=1000", "train.steps=1", "train.micro_batch_tokens=1000").code == 0
    found = json.loads((OUTPUT / "data.json").read_text())
    assert found["shown"][0]["more"] > 0
    assert len(found["shown"][0]["pieces"]) == 600
    assert found["shown"][1]["more"] == 0
    assert set(found["asked"]) == {line["row"] for line in map(json.loads, _samples())}
    assert all("What is" in text for text in found["asked"].values())
    assert (OUTPUT / "data.json").stat().st_size < 500_000


def _samples() -> list[str]:
    return (OUTPUT / "samples.jsonl").read_text().splitlines()


def test_going_on_leaves_the_same_bytes(finished: Path, trained: Path) -> None:
    (OUTPUT / "data.json").write_text("{}")
    assert train("train.steps=7", options=["--extend"]).code == 0
    assert (OUTPUT / "data.json").read_bytes() == (trained / OUTPUT / "data.json").read_bytes()
    before = runs.snapshot(OUTPUT)["data.json"]
    assert train("train.steps=8", options=["--extend"]).code == 0
    assert runs.snapshot(OUTPUT)["data.json"] == before
