"""Plans: what `auto` becomes on which machine, what a plan promises, and when it says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune import hardware, known_models, plan, recipe
from finetune.budget import Load
from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault, RecipeError
from finetune.hardware import Hardware, imagined
from finetune.plan import Plan
from tests import runs
from tests.conftest import ROOT

BIG = ROOT / "recipes" / "qwen2.5-14b-qlora-24gb.yaml"
LOAD = Load(lengths=[500] * 1000, supervised=[200] * 1000, evaluated_tokens=1000, generated_rows=0)


def _card(gigabytes: float, **other: Any) -> Hardware:
    size = int(gigabytes * 1e9)
    fields = {"device": "cuda", "name": "a card", "bf16": True, "threads": 2, "instruction_set": "-", "flops": 1e14}
    return Hardware(memory=size, free_memory=size, **(fields | other))


def _plan(machine: Hardware, *overrides: str, load: Load | None = LOAD, must_fit: bool = True) -> Plan:
    known = known_models.find("Qwen/Qwen2.5-14B")
    assert known is not None
    located = recipe.locate(BIG, overrides)
    return plan.make(located, DecoderShape.from_known(known), machine, load, must_fit=must_fit)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_24_gb_card_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _plan(_card(24))
    assert (made.compute, made.loss_scaling, made.recompute) == ("bf16", False, "layers")
    assert 2048 <= made.micro_batch_tokens < 16384
    assert 0 < made.recomputed_layers < 48  # no more of them than memory asks for
    assert made.budget.total < 24e9 * 0.9 + made.budget.overhead
    assert 9e9 < made.budget.weights < 10.5e9  # linears at 4.13 bits, embedding and head in bf16


def test_an_80_gb_card_does_not() -> None:
    made = _plan(_card(80))
    assert (made.compute, made.recompute) == ("bf16", "none")
    assert made.budget.total < 80e9
    # A third less work: nothing is computed twice.
    slow = _plan(_card(24), "train.recompute=layers").seconds
    assert made.seconds is not None
    assert slow is not None
    assert 0.6 < made.seconds / slow < 0.75


def test_a_card_without_bf16_scales_the_loss() -> None:
    made = _plan(_card(16, bf16=False, name="Tesla T4"), "train.max_length=512")
    assert (made.compute, made.loss_scaling, made.recompute) == ("fp16", True, "layers")
    assert any("fp16 with loss scaling" in note for note in made.notes)
    assert "loss scaling" not in " ".join(_plan(_card(24)).notes)


def test_a_processor_without_bf16_computes_in_fp32() -> None:
    made = _plan(_card(64, device="cpu", bf16=False))
    assert (made.compute, made.loss_scaling) == ("fp32", False)
    assert any("runs on the CPU" in note for note in made.notes)
    assert _plan(_card(64, device="cpu"), "train.max_length=512").compute == "bf16"


def test_what_cannot_fit_is_refused_in_numbers() -> None:
    for gigabytes in (12, 8, 1):
        with pytest.raises(EnvironmentFault, match=r"needs about 13\.\d GB, at most \d+\.\d GB can be used here"):
            _plan(_card(gigabytes))
    made = _plan(_card(8), must_fit=False)  # the weights may be on another machine: a note, no refusal
    assert any("does not fit here" in note for note in made.notes)


@pytest.mark.parametrize("gigabytes", [1, 2, 12, 13, 14, 16, 24, 80])
def test_no_plan_for_an_imagined_card_takes_more_than_the_card_has(gigabytes: float) -> None:
    made = _plan(imagined(gigabytes), "train.max_length=512", must_fit=False)
    fits = not any("does not fit here" in note for note in made.notes)
    assert fits == (gigabytes >= 14)
    assert made.budget.total <= gigabytes * 1e9 or not fits


def test_the_mend_for_too_little_memory_names_what_takes_less() -> None:
    for overrides, mend in (
        (["quantize.weights=bf16"], "use quantize nf4"),
        ([], "take a smaller model"),
        (["train.micro_batch_tokens=90000"], "lower train.micro_batch_tokens"),
    ):
        with pytest.raises(EnvironmentFault) as caught:
            _plan(_card(12), *overrides)
        assert mend in caught.value.faults[0].fix


@pytest.mark.parametrize("gigabytes", [13.5, 14, 15, 16, 18, 20, 24, 32, 48, 64, 80, 140])
def test_what_is_planned_fits_and_more_memory_is_never_worse(gigabytes: float) -> None:
    try:
        made = _plan(_card(gigabytes), "train.max_length=512")
    except EnvironmentFault:
        assert gigabytes < 13.5
        return
    assert made.budget.total <= gigabytes * 1e9 * 0.9 + made.budget.overhead
    more = _plan(_card(gigabytes * 1.2), "train.max_length=512")
    ways = ("offload", "layers", "none")
    assert ways.index(more.recompute) >= ways.index(made.recompute)
    if more.recomputed_layers != made.recomputed_layers:
        assert more.recomputed_layers < made.recomputed_layers
    else:
        assert more.micro_batch_tokens >= made.micro_batch_tokens


def test_what_the_recipe_says_is_kept() -> None:
    made = _plan(_card(80), "train.recompute=layers", "train.micro_batch_tokens=4096", "quantize.compute=fp32")
    assert (made.recompute, made.micro_batch_tokens, made.compute) == ("layers", 4096, "fp32")


@pytest.mark.parametrize(("weights", "bits"), [("nf4", 4.13), ("fp4", 4.13), ("int8", 8), ("bf16", 16), ("fp32", 32)])
def test_the_weights_cost_what_their_format_takes(weights: str, bits: float) -> None:
    made = _plan(_card(200), f"quantize.weights={weights}")
    known = known_models.find("Qwen/Qwen2.5-14B")
    assert known is not None
    shape = DecoderShape.from_known(known)
    rest = (shape.parameters() - shape.linear_parameters()) * (4 if weights == "fp32" else 2)
    assert made.budget.weights == pytest.approx(shape.linear_parameters() * bits / 8 + rest, rel=2e-3)


def test_without_double_quantisation_scales_cost_half_a_bit() -> None:
    more = _plan(_card(80), "quantize.double=false").budget.weights - _plan(_card(80)).budget.weights
    known = known_models.find("Qwen/Qwen2.5-14B")
    assert known is not None
    bits = 8 * more / DecoderShape.from_known(known).linear_parameters()
    assert bits == pytest.approx(0.373, abs=0.002)


def test_a_window_beyond_the_models_is_refused_by_line() -> None:
    with pytest.raises(RecipeError, match="200000 is more than the model's 131072 positions"):
        _plan(_card(80), "train.max_length=200000", "train.tokens_per_step=200000")


def test_the_numbers_of_a_real_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    said = runs.finetune("plan", "r.yaml", "--json")
    assert said.code == 0
    made = json.loads(said.out)
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert (made["steps"], made["samples"]) == (6, 24)
    assert made["supervised_tokens"] < made["tokens"]
    assert made["trainable_parameters"] == sum(target["adapter_parameters"] for target in made["targets"])
    assert made["parameters"] == sum(value.numel() for value in load_file("base/model.safetensors").values())
    assert made["micro_batch_tokens"] == 256
    said = runs.finetune("plan", "r.yaml", "--json", "--set", "train.steps=null", "--set", "train.epochs=2")
    made = json.loads(said.out)
    assert (made["steps"], made["samples"]) == (10, 2 * len(rows))
    assert not Path("runs").exists()


def test_the_plan_that_is_printed_is_the_plan_that_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    made = json.loads(runs.finetune("plan", "r.yaml", "--json").out)
    kept = json.loads((runs.OUTPUT / "plan.json").read_text())
    varying = ("free_memory", "seconds", "notes")
    assert {key: made[key] for key in made if key not in varying} == {
        key: kept[key] for key in kept if key not in varying
    }
    lines = runs.metrics()
    assert sum(line["tokens"] for line in lines) == made["tokens"]
    assert sum(line["supervised_tokens"] for line in lines) == made["supervised_tokens"]
    assert sum(line["samples"] for line in lines) == made["samples"]


def test_a_full_disk_is_refused_before_the_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(hardware, "free_disk", lambda path: 5_000_000)
    said = runs.train()
    assert said.code == 5
    assert said.err.startswith("environment: runs/one: 5 MB free, the run writes about ")
    assert not Path("runs").exists()


def test_too_little_memory_is_refused_before_the_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(hardware, "detect", lambda: _card(0.001, device="cpu"))
    said = runs.train()
    assert said.code == 5
    assert "can be used here" in said.err
    assert not Path("runs").exists()


def test_the_disk_is_promised_what_a_run_takes(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads((finished / runs.OUTPUT / "plan.json").read_text())
    used = sum(path.stat().st_size for path in (finished / runs.OUTPUT).rglob("*") if path.is_file())
    assert used <= made["output_bytes"]


def test_judging_a_finished_run_asks_no_room_for_training(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr(hardware, "free_disk", lambda path: 5_000_000)
    assert runs.finetune("eval", str(runs.OUTPUT)).code == 0
