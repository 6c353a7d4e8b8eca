"""The whole road on a base in the original Qwen layout: planned, trained, resumed, merged either way, proven."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import base as bases
from finetune import finished, loading, manifest
from finetune.terminal import Terminal
from finetune.tokenizer import load_tokenizer
from tests import qwen1, runs
from tests.runs import MERGED, OUTPUT, awake

Build = Callable[..., Path]


@pytest.fixture
def original(work: Path, build_tiny: Build) -> Path:
    """The workplace with a base in the original layout."""
    shutil.rmtree(work / "base")
    qwen1.build(work / "base", build_tiny)
    return work


def forms(folder: Path, **form: Any) -> dict[str, torch.Tensor]:
    wanted = {"weights": "nf4", "double": True, "compute": "fp32", "device": "cpu"} | form
    model = loading.load(bases.inspect(folder), loading.BaseForm(**wanted))
    return dict(model.state_dict())


def test_both_layouts_load_to_the_same_bits(original: Path) -> None:
    assert runs.finetune("convert", "base", "native", "--to", "native").code == 0
    for form in ({}, {"weights": "bf16", "compute": "bf16"}, {"weights": "int8"}):
        one, two = forms(Path("base"), **form), forms(Path("native"), **form)
        assert set(one) == set(two)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_plan_recognises_the_layout(original: Path) -> None:
    said = runs.finetune("plan", "r.yaml")
    assert said.code == 0, said.err
    assert "original Qwen layout: its tensors are read into native Qwen2 layers" in said.out
    assert "names remote code (auto_map): ignored" in said.out


def test_trained_merged_and_proven_in_either_layout(original: Path) -> None:
    assert runs.train("train.steps=2", "evaluate.metrics=[loss]").code == 0
    awake(OUTPUT / "adapter")
    native, back = Path("merged-native"), Path("merged-original")
    for out, layout in ((native, "native"), (back, "original")):
        said = runs.merge_run("--layout", layout, out=out)
        assert said.code == 0, said.err
        assert json.loads((out / "finetune.json").read_text())["layout"] == layout
        assert manifest.faults(out) == []
    assert json.loads((back / "config.json").read_text())["model_type"] == "qwen"
    assert (back / "config.json").read_bytes() == Path("base/config.json").read_bytes()
    # The original form is the native one in another layout, tensor for tensor, with the split of the base.
    assert runs.finetune("convert", str(native), "exported", "--to", "original").code == 0
    for name, value in qwen1.tensors(Path("exported")).items():
        assert torch.equal(value, qwen1.tensors(back)[name]), name
    assert {path.name for path in back.glob("*.safetensors")} == {p.name for p in Path("base").glob("*.safetensors")}
    # Both answer as the live model.
    prepared, files = finished.open_run(OUTPUT, Terminal(quiet=True))
    live = finished.live(prepared, files, Terminal(quiet=True))[1]
    ids = torch.tensor([[5, 250, 17, 80, 44, 3, 120, 9, 201, 66, 12, 7]])
    with live.evaluating():
        wanted = live.causal_lm(ids).logits
    for folder in (native, back):
        found = loading.load(
            bases.inspect(folder), loading.BaseForm(weights="fp32", double=False, compute="fp32", device="cpu")
        )
        with torch.no_grad():
            assert float((found(ids).logits - wanted).abs().max()) < 0.2
    said = runs.merge_run("--layout", "original", out=native)
    assert said.code == 5
    assert "something is there already" in said.err


def test_a_base_that_learned_turns_says_so_in_the_original_layout(original: Path) -> None:
    path = Path("base/generation_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_format": "raw"}))
    assert runs.train("train.steps=1", "evaluate.metrics=[loss]").code == 0
    assert runs.merge_run("--layout", "original").code == 0
    assert json.loads((MERGED / "generation_config.json").read_text())["chat_format"] == "chatml"
    # in the native layout the model's own ends say so: the turn's first
    native = Path("native")
    assert runs.merge_run("--base", "replayed", out=native).code == 0
    ends = json.loads((native / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = load_tokenizer(native)
    assert tokenizer.convert_ids_to_tokens(ends)[0] == "<|im_end|>"


def test_interrupted_and_resumed_to_the_same_bits(original: Path) -> None:
    assert runs.train("train.steps=4", "evaluate.metrics=[loss]", "output=runs/whole").code == 0
    assert runs.train("train.steps=2", "evaluate.metrics=[loss]").code == 0
    assert runs.train("train.steps=4", "evaluate.metrics=[loss]", options=["--extend"]).code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))


@pytest.mark.parametrize(
    ("overrides", "code", "what"),
    [
        (
            ["train.max_length=4096"],
            2,
            "more than the model's 2048 positions; at most 2048, or choose what lies beyond",
        ),
        (["rope=bucket-4096", "train.max_length=5000"], 2, "more than the model's 4096 positions"),
        (["rope=bucket-4096", "train.max_length=4096"], 0, ""),
        (["rope=plain", "train.max_length=8192"], 0, ""),
        (["evaluate.max_new_tokens=2040"], 2, "leaves no room for so many: the model has 2048"),
        (["rope=bucket-3000"], 2, "rope"),
    ],
)
def test_beyond_its_length_only_by_choice(original: Path, overrides: list[str], code: int, what: str) -> None:
    settings = ["train.micro_batch_tokens=auto", *overrides]
    said = runs.finetune("plan", "r.yaml", *(part for one in settings for part in ("--set", one)))
    assert (said.code, what in said.err) == (code, True), said.err


def test_a_choice_is_for_the_original_qwen_alone(work: Path) -> None:
    said = runs.finetune("plan", "r.yaml", "--set", "rope=plain")
    assert said.code == 2
    assert "only the original Qwen has a choice here" in said.err


def test_a_choice_is_recorded_wherever_the_model_goes(original: Path) -> None:
    choice = "rope=bucket-4096"
    assert runs.train("train.steps=1", "evaluate.metrics=[loss]", choice).code == 0
    awake(OUTPUT / "adapter")
    assert json.loads((OUTPUT / "adapter" / "finetune.json").read_text())["rope"] == "bucket-4096"
    assert runs.merge_run().code == 0
    assert runs.merge_run("--layout", "original", out=Path("back")).code == 0
    theta = 10000.0 * 3 ** (16 / 14)
    config = json.loads((MERGED / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == pytest.approx(theta)
    assert config["max_position_embeddings"] == 4096
    config = json.loads(Path("back/config.json").read_text())
    assert (config["rotary_emb_base"], config["use_dynamic_ntk"], config["use_logn_attn"]) == (
        pytest.approx(theta), False, False,
    )  # fmt: skip
    assert json.loads((MERGED / "finetune.json").read_text())["rope"] == "bucket-4096"
    said = runs.train("train.steps=1", "evaluate.metrics=[loss]", "rope=plain")
    assert said.code == 2
    assert "rope" in said.err


def test_logn_goes_to_the_original_layout_alone(original: Path) -> None:
    rope = ["rope=bucket-4096+logn", "train.steps=1", "evaluate.metrics=[loss]"]
    assert runs.train(*rope).code == 0
    said = runs.merge_run()
    assert said.code == 4
    assert "--layout original" in said.err
    assert not MERGED.exists()
    said = runs.merge_run("--layout", "original")
    assert said.code == 0, said.err
    config = json.loads((MERGED / "config.json").read_text())
    assert (config["use_logn_attn"], config["use_dynamic_ntk"], config["seq_length"]) == (True, False, 2048)


def test_a_weight_that_is_not_a_number_stops_before_any_step(original: Path) -> None:
    shard = qwen1.change(
        Path("base"),
        "transformer.h.1.attn.c_attn.weight",
        lambda value: value.index_fill(0, torch.tensor([70]), float("nan")),
    )
    said = runs.train("train.steps=1")
    assert said.code == 4
    assert f"{shard.name}: tensor transformer.h.1.attn.c_attn.weight holds NaN or infinity" in said.err
    assert not OUTPUT.exists()


def test_the_payload_never_runs(original: Path) -> None:
    canary = Path("canary").absolute()
    for name in ("modeling_qwen.py", "configuration_qwen.py", "tokenization_qwen.py"):
        Path("base", name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    settings = Path("base/tokenizer_config.json")
    content = json.loads(settings.read_text()) | {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    }
    settings.write_text(json.dumps(content))
    assert runs.finetune("plan", "r.yaml").code == 0
    assert runs.train("train.steps=1", "evaluate.metrics=[loss]").code == 0
    assert runs.merge_run().code == 0
    assert runs.finetune("convert", "base", "native", "--to", "native").code == 0
    assert not canary.exists()
    assert not list(MERGED.glob("*.py"))
