"""The script of the original Qwen's finetune.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.families import qwen1
from finetune.foreignparts import ORIGINAL
from tests.importers.conftest import Imported, plan, rows
from tests.runs import finetune


@pytest.fixture(autouse=True)
def data(place: Path) -> None:
    rows(place / "train.json", 25, "conversations")


def changed(*pairs: tuple[str, str]) -> Imported:
    text = Path("qwen.sh").read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    Path("c.sh").write_text(text)
    return Imported("c.sh")


def test_the_script_has_the_same_meaning() -> None:
    """Four cards, gradient accumulation 2, a pass of 25 rows: three whole steps, the incomplete fourth is dropped."""
    found = Imported("qwen.sh")
    assert found.json["trainer"] == "qwen"
    expected = {
        "model": "Qwen/Qwen-14B-Chat", "quantize.weights": "nf4", "quantize.compute": "fp16", "adapter.r": 64,
        "adapter.lora_alpha": 16, "adapter.lora_dropout": 0.05, "train.max_length": 512, "train.epochs": 5,
        "train.examples_per_step": 8, "train.learning_rate": 3e-4, "train.weight_decay": 0.1, "train.warmup": 3,
        "train.save_every": 1000, "train.keep_last": 10, "train.seed": 42, "tracker": "none",
        "data.train_path": "train.json", "output": "runs/qwen",
    }  # fmt: skip
    assert {key: found.values[key] for key in expected} == expected
    assert found.recipe is not None
    assert found.recipe.data.format == "sharegpt"
    assert found.recipe.trainable_tokens == "none"
    assert set(found.values["adapter.target_modules"]) == set(qwen1.TARGET_MODULES)


def test_it_plans_on_a_card_that_is_elsewhere() -> None:
    Imported("qwen.sh")
    said = finetune("plan", "recipe.yaml", "--card", "24", "--json")
    assert said.code == 0, said.err


def test_it_plans_over_a_base_that_is_here() -> None:
    changed(
        ("Qwen/Qwen-14B-Chat-Int4", "base"), ("--save_steps 1000", "--save_steps 4"), ("--fp16 True", "--bf16 True")
    )
    planned = plan()
    assert planned["steps"] == 16  # 25 rows five times, eight a step; there 15
    assert sum(one["adapter_parameters"] for one in planned["targets"]) > 0


def test_the_native_names_are_those_of_the_converter() -> None:
    """Of the original's four names, the linears that hold the same tensors."""
    held: dict[str, set[str]] = {}
    for native, piece in qwen1.pieces(1, 8).items():
        parts = piece.stored.split(".")
        if parts[-1] == "weight" and len(parts) > 3:
            held.setdefault(parts[-2], set()).add(native.split(".")[-2])
    assert {name: set(ORIGINAL[name]) for name in ("c_attn", "c_proj", "w1", "w2")} == {
        name: held[name] for name in ("c_attn", "c_proj", "w1", "w2")
    }


def test_the_deepspeed_files_scheduler_is_the_one_that_ran(place: Path) -> None:
    """cosine was asked for; WarmupLR of the kit's own file ran, and stays at the peak."""
    found = Imported("qwen.sh")
    assert found.values["train.schedule"] == "constant"
    assert "cosine was asked for and ignored" in found.about("lr_scheduler_type")
    for content, schedule in (('{"zero_optimization": {}}', "cosine"), (None, "constant")):
        Path("recipe.yaml").unlink()
        file = place / "ds_config_zero2.json"
        file.write_text(content) if content else file.unlink()
        assert Imported("qwen.sh").values["train.schedule"] == schedule


def test_a_base_that_is_no_chat_model_trained_its_embeddings_whole() -> None:
    found = changed(
        ("Qwen/Qwen-14B-Chat-Int4", "Qwen/Qwen-14B"), ("    --q_lora \\\n", ""), ("--fp16 True", "--bf16 True")
    )
    assert found.values["adapter.modules_to_save"] == ["embed_tokens", "lm_head"]
    assert found.values["quantize.weights"] == "bf16"
    assert "1.56 billion" in found.about("model_name_or_path")


def test_what_silently_meant_something_else() -> None:
    found = Imported("qwen.sh")
    assert "GPTQ" in found.about("q_lora")
    assert "lose their end" in found.about("model_max_length")
    assert "<|im_start|>" in found.about("data_path")
    assert "same weight" in found.about("gradient_accumulation_steps")
    assert "0.95" in found.about("adam_beta2", "lost")
    assert "15 steps" in found.about("epochs")


def test_rows_beyond_2048_tokens_need_a_choice() -> None:
    found = changed(("--model_max_length 512", "--model_max_length 4096"))
    assert found.recipe is not None
    assert found.recipe.rope == "plain"


def test_all_weights_are_not_taken_over(place: Path) -> None:
    Path("c.sh").write_text(Path("qwen.sh").read_text().replace("    --use_lora \\\n", ""))
    said = finetune("import", "c.sh")
    assert said.code == 2
    assert "every weight was trained" in said.err
