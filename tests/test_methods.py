"""PEFT's methods by name: what a plan counts is what is trained, and what PEFT refuses is a fault of the recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cells
from finetune import base as bases
from finetune import methods, model, targets
from finetune.recipe import adapter_fields, adapter_methods, adapter_source
from tests import runs, tiny
from tests.runs import OUTPUT, finetune, train

ROWS = {row.name: row for row in cells.rows()}
TRAINED = [name for name in adapter_fields.trainable() if name in ROWS and name not in ("adamss",)]
"""Every method that can be trained; PEFT asks for scikit-learn before it makes an AdaMSS config."""


def fields_of(name: str) -> dict[str, Any]:
    """As a plan hands them on."""
    row = ROWS[name]
    read, findings = adapter_fields.check({"method": row.method, **row.fields})
    assert findings == []
    return targets.fields_of(row.method, read)


@pytest.mark.parametrize("method", TRAINED)
def test_defaults_that_a_run_writes_down_are_read_again(method: str) -> None:
    """A run's own recipe.yaml holds every default of PEFT's."""
    read, _ = adapter_fields.check({"method": method, **ROWS[method].fields})
    again, findings = adapter_fields.check({"method": method, **read})
    assert findings == []
    assert again == read


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_counted_is_what_is_trained(method: str, tiny_base: Path) -> None:
    found = methods.added(method, fields_of(method), bases.inspect(tiny_base).shape)
    policy = model.attach(tiny.load(tiny_base), fields_of(method), 0, method=method)
    real = sum(value.numel() for value in policy.trainable().values())
    if method in ("frod", "shira"):  # their indices come from the weights
        assert found is None
        return
    assert found is not None
    assert sum(elements * count for (_, elements), count in found.trained.items()) == real
    assert set(found.modules) == set(policy.model.targeted_module_names)


@pytest.mark.parametrize("method", TRAINED)
def test_the_config_is_pefts_own(method: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    made = methods.config(method, adapter_fields.check({"method": method, **ROWS[method].fields})[0])
    alone = kinds[method](task_type="CAUSAL_LM", **ROWS[method].fields)
    ours = set(methods._OWN.get(method, {}))
    for one in dataclasses.fields(alone):
        if one.name not in ours:
            assert getattr(made, one.name) == getattr(alone, one.name), one.name


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (["method=gralora", "r=7"], "PEFT refuses these fields of gralora for this model"),
        (["method=c3a", "block_size=48"], "PEFT refuses these fields of c3a"),
        (["method=adamss", "r=8"], "scikit-learn is required"),
        (["method=prefix_tuning"], "prefix_tuning cannot be trained here: it trains keys and values"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_plan_says_what_peft_would(work: Path, adapter: list[str], words: str) -> None:
    _plain()
    said = finetune("plan", "r.yaml", *(part for one in adapter for part in ("--set", f"adapter.{one}")))
    assert said.code == 2, said.out
    assert words in said.err
    assert "adapter.method" in said.err


def test_a_rank_that_peft_changes_is_told(work: Path) -> None:
    """OFT takes the nearest rank that divides the layer's width, which must not pass unseen."""
    _plain()
    said = finetune(
        "plan", "r.yaml", *("--set=adapter.method=oft", "--set=adapter.r=3", "--set=adapter.oft_block_size=0")
    )
    assert said.code == 0
    assert "PEFT says: Invalid `r` (3)! Adjusted `r` to (2)." in said.out


def _plain() -> None:
    """The recipe without LoRA's own fields."""
    recipe = Path("r.yaml").read_text().replace("  r: 4\n  lora_alpha: 8\n", "").replace("method: lora", "method: ia3")
    Path("r.yaml").write_text(recipe.replace("weights: nf4", "weights: fp32"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.optimizer", "lora_fa", "lora_fa moves LoRA's A and B, which ia3 has not"),
        ("train.lora_plus_ratio", "16", "is the rate of LoRA's B, which ia3 has not"),
        ("trainable_tokens", "[<|im_end|>]", "PEFT trains no rows beside ia3"),
        ("adapter.target_modules", "[q_proj, vproj]", "did you mean 'v_proj'?"),
        ("adapter.start_from", "base", "only a LoRA can be gone on with"),
        ("adapter.r", "8", "unknown key; not a field of the installed PEFT's ia3"),
    ],
)
def test_what_only_lora_has_is_refused(work: Path, key: str, value: str, words: str) -> None:
    _plain()
    said = finetune("plan", "r.yaml", "--set", f"{key}={value}")
    assert said.code == 2
    assert words in said.err
    assert key in said.err


def test_a_refused_method_stops_at_the_recipe_and_names_the_base(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the matrix says does not work; here of a method that does."""
    _plain()
    table = {"peft": "0", "refused": {"ia3": {"bf16": "it was seen to forget"}}, "unmerged": {"ia3": {"fp32": "no"}}}
    monkeypatch.setattr(adapter_methods, "tried", lambda: table)
    said = finetune("plan", "r.yaml", "--set", "quantize.weights=fp16")
    assert said.code == 2
    assert "r.yaml:6:3: adapter.method: ia3 on fp16: it was seen to forget (docs/capabilities.md)" in said.err
    said = finetune("plan", "r.yaml")
    assert said.code == 0
    assert "ia3 on fp32 cannot be merged: no; serve the adapter with PEFT" in said.out
    assert f"ia3 was tried with PEFT 0, and {adapter_source.version()} is installed" in said.out


def test_a_run_of_another_method_goes_the_whole_road(work: Path) -> None:
    """Trains on NF4, resumes to the bit, is judged, merged and exported; a second adapter beside it is refused."""
    _plain()
    loha = ["adapter.method=loha", "adapter.r=4", "quantize.weights=nf4", "train.learning_rate=0.02"]
    assert train(*loha).code == 0
    whole = runs.adapter_digest()
    assert train(*loha, "output=runs/two", options=["--until", "3"]).code == 0
    assert train(*loha, "output=runs/two").code == 0
    assert runs.adapter_digest(Path("runs/two")) == whole
    merged = runs.merge_run()
    assert merged.code == 0, merged.err
    assert "LOHA is merged by PEFT itself" in merged.out
    again = finetune("eval", str(OUTPUT))
    assert again.code == 0, again.err
    scores = json.loads((OUTPUT / "scores.json").read_text())
    judged = json.loads((OUTPUT / "evaluation.json").read_text())["scores"]
    assert judged["adapter"]["loss"] == scores["after"]["loss"]
    assert finetune("export", str(OUTPUT), "--out", "plain").code == 0
    said = finetune("export", str(OUTPUT), "--out", "served", "--target", "vllm")
    assert (said.code, "vllm cannot load LOHA (finetune convert --to lora" in said.err) == (4, True)
