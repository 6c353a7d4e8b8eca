"""A recipe whose model is a hub id: planned from its config, fetched by train, and from then on taken from the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import known_models, source
from tests import qwen1, runs
from tests.hub import NEW, REPO, Hub
from tests.runs import OUTPUT
from tests.test_fetch import hub  # noqa: F401 - a fixture

Build = Callable[..., Path]


def serve(served: Hub, folder: Path) -> None:
    served.commits[NEW] = {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["native", "original"])
def test_a_model_of_the_hub_is_planned_fetched_and_trained(
    layout: str, work: Path, build_tiny: Build, hub: Hub, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    if layout == "original":
        shutil.rmtree(work / "base")
        qwen1.build(work / "base", build_tiny)
    serve(hub, work / "base")
    (work / "base" / "config.json").unlink()
    model = [f"model={REPO}", "evaluate.metrics=[loss]"]
    said = runs.finetune("plan", "r.yaml", *(part for one in model for part in ("--set", one)))
    assert said.code == 0, said.err
    assert "not on this disk (numbers: its config.json on the hub)" in said.out
    assert {asked.name for asked in hub.asked} & set(hub.commits[NEW]) == {"config.json"}
    said = runs.train(*model, "train.steps=1")
    assert said.code == 0, said.err
    assert f"{REPO} from hub at commit {NEW}" in said.out
    made = json.loads((OUTPUT / "adapter" / "finetune.json").read_text())
    assert (made["base"], made["commit"]) == (REPO, NEW)
    assert set(made["base_sha256"]) >= {"config.json", "tokenizer.json"}
    asked = len(hub.asked)
    assert runs.merge_run().code == 0
    assert runs.train(*model, "train.steps=2", options=["--extend"]).code == 0
    assert len(hub.asked) == asked  # everything is here now


def test_what_the_hub_does_not_have_is_told_before_anything(work: Path, hub: Hub) -> None:  # noqa: F811
    for name, what in (("Nobody/Nothing", "Nobody/Nothing"), ("Qwen/Qwen2.5-14B-Instrukt", "did you mean")):
        said = runs.train(f"model={name}")
        assert said.code in (2, 4)
        assert what in said.err
        assert said.err.count("\n") == 1
    assert not OUTPUT.exists()


def test_a_family_that_is_none_of_ours_is_refused_from_its_config(work: Path, hub: Hub) -> None:  # noqa: F811
    hub.commits[NEW]["config.json"] = b'{"model_type": "mamba"}'
    said = runs.finetune("plan", "r.yaml", "--set", f"model={REPO}", "--set", f"revision={NEW}")
    assert said.code == 4
    assert "known ones: llama, qwen1, qwen2, qwen3" in said.err


@pytest.mark.parametrize(
    ("rope", "longest"), [(None, 2048), ("plain", 8192), ("bucket-4096", 4096), ("bucket-8192+logn", 8192)]
)
def test_the_known_original_reaches_as_far_as_the_choice(rope: str | None, longest: int) -> None:
    known = known_models.find("Qwen/Qwen-14B")
    assert known is not None
    assert source.reach_of(known, rope) == longest
    other = known_models.find("Qwen/Qwen2.5-14B")
    assert other is not None
    assert source.reach_of(other, rope) is None
