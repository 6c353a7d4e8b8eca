"""Reward models as other trainers say them: the loss's numbers, the head, dropout, lengths, margins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune import importers
from tests.importers import facts
from tests.importers.conftest import AXOLOTL, FACTORY, SWIFT, TRL, Imported, imported, plan
from tests.importers.test_objectives import brief, theirs
from tests.runs import finetune

pytestmark = pytest.mark.usefixtures("judged")
SCORED = f"{TRL}lora_task_type: SEQ_CLS\n"
BRADLEY = AXOLOTL.replace("pairs.jsonl", "bradley.jsonl")
BRADLEY = BRADLEY.replace("chat_template.argilla_chat", "bradley_terry.chat_template") + "reward_model: true\n"
CENTRE = "center_rewards_coefficient: 0.01\n"
PLAIN = {"margin": 0.0, "centre_rewards_coefficient": 0.0}
CENTRED = PLAIN | {"centre_rewards_coefficient": 0.01}


@pytest.mark.parametrize(
    ("trainer", "text", "expected", "train", "dropout"),
    [
        ("trl", SCORED, PLAIN, {"learning_rate": 1e-4, "max_length": 1024}, 0),
        ("trl", f"{TRL}{CENTRE}", CENTRED, {"learning_rate": 1e-4}, 0),
        ("trl", f"{SCORED}{CENTRE}disable_dropout: false\n", CENTRED, {}, 0.05),
        ("axolotl", BRADLEY, PLAIN, {"learning_rate": 1e-5, "max_length": 512}, 0),
        ("axolotl", f"{BRADLEY}{CENTRE}", CENTRED, {}, 0),
        ("llamafactory", f"{FACTORY}stage: rm\nlora_dropout: 0.1\n", PLAIN, {"learning_rate": 5e-5}, 0.1),
        ("llamafactory", f"{FACTORY}stage: rm\npacking: true\n", PLAIN, {"examples_per_step": 8}, 0),
        ("swift", f"{SWIFT}rlhf_type: rm\n", PLAIN, {"learning_rate": 1e-4, "weight_decay": 0.1}, 0),
        ("swift", f"{SWIFT.replace('pairs', 'swift')}rlhf_type: rm\n{CENTRE}", CENTRED, {}, 0),
    ],
    ids=brief,
)
def test_it_becomes_a_reward_model_that_plans(
    trainer: str, text: str, expected: dict[str, Any], train: dict[str, Any], dropout: float
) -> None:
    found = imported(trainer, text)
    assert found.recipe is not None
    assert (found.recipe.objective.method, found.recipe.objective.settings()) == ("reward", expected)
    assert {key: getattr(found.recipe.train, key) for key in train} == train
    assert found.recipe.adapter.fields["lora_dropout"] == dropout
    assert found.recipe.data.over_length == "drop"
    assert plan()["steps"] == 2


WORD = {"trl": "trl", "axolotl": "reward_model", "llamafactory": "stage", "swift": "rlhf_type"}
TEXT = {"trl": SCORED, "axolotl": BRADLEY, "llamafactory": f"{FACTORY}stage: rm\n", "swift": f"{SWIFT}rlhf_type: rm\n"}


@pytest.mark.parametrize("trainer", TEXT)
def test_what_is_otherwise_is_said_of_each(trainer: str) -> None:
    found = imported(trainer, TEXT[trainer])
    for what in ("random numbers", "line break behind the stop token"):
        assert what in found.about(WORD[trainer])
    assert ("a tenth of its inputs" in found.about("stage", "lost")) == (trainer == "llamafactory")
    assert "value head" in found.about("stage", "lost") or trainer != "llamafactory"
    assert not [one for one in found.json["lost"] if "a reward model's" in one["what"]]


@pytest.mark.parametrize(
    ("trainer", "text", "key", "kind", "what"),
    [
        ("trl", f"{TRL}{CENTRE}", "lora_task_type", "differs", "it is CAUSAL_LM, the default"),
        ("trl", SCORED, "max_length", "differs", "not set: pairs with a text over 1,024 tokens are left out there"),
        ("trl", SCORED.replace("pairs", "margins"), "dataset_name", "lost", "its column margin"),
        ("trl", f"{SCORED}packing: true\n", "packing", "differs", "does not know this key"),
        ("axolotl", BRADLEY, "sequence_len", "differs", "loses its end there, where its reward is read"),
        ("axolotl", f"{AXOLOTL}reward_model: true\n", "datasets", "differs", "needs type bradley_terry.chat_template"),
        ("axolotl", f"{BRADLEY}lora_model_dir: earlier\n", "lora_model_dir", "lost", "has no score head here"),
        ("llamafactory", f"{FACTORY}stage: rm\nadapter_name_or_path: e\n", "adapter_name_or_path", "lost", "merge"),
        ("swift", f"{SWIFT}rlhf_type: rm\nadapters: earlier\n", "adapters", "lost", "`finetune merge` that run"),
        ("swift", f"{SWIFT.replace('pairs', 'margins')}rlhf_type: rm\n", "dataset", "lost", "its column margin"),
    ],
    ids=brief,
)
def test_what_has_no_counterpart_or_meant_something_else_is_said(
    trainer: str, text: str, key: str, kind: str, what: str
) -> None:
    found = imported(trainer, text)
    assert what in found.about(key, kind), found.json[kind]
    plan()


@pytest.mark.parametrize(
    ("trainer", "text", "what"),
    [
        ("axolotl", f"{BRADLEY}sample_packing: true\n", "its reward trainer packs no pairs"),
        ("axolotl", f"{AXOLOTL}process_reward_model: true\n", "prm is not taken over"),
        ("swift", f"{SWIFT}rlhf_type: rm\npacking: true\n", "does not go with rlhf_type: rm"),
        ("trl", f"{SCORED}center_rewards_coefficient: -1\n", "must not be below 0"),
    ],
    ids=brief,
)
def test_what_cannot_be_meant_is_refused(trainer: str, text: str, what: str) -> None:
    Path("c.yaml").write_text(text)
    said = finetune("import", "c.yaml", "--from", trainer)
    assert (said.code, what in said.err) == (2, True), said.err
    assert not Path("recipe.yaml").exists()


def test_a_command_line_tells_it_and_the_run_learns() -> None:
    line = "trl reward --model_name_or_path base --dataset_name pairs.jsonl --use_peft --lora_task_type SEQ_CLS"
    Path("c.sh").write_text(f"{line} --dtype bfloat16 --lora_modules_to_save score --max_steps 2\n")
    found = Imported("c.sh")
    assert found.recipe is not None
    assert found.recipe.objective.method == "reward"
    assert "modules_to_save" not in found.recipe.adapter.fields or not found.recipe.adapter.fields["modules_to_save"]
    assert not found.about("lora_task_type")
    said = finetune("train", "recipe.yaml", "--set", "tracker=none", "--set", "evaluate.metrics=[loss]")
    assert said.code == 0, said.err
    assert (Path(found.recipe.output) / "adapter" / "adapter_config.json").is_file()


# ── what the packages themselves say ──────────────────────────────────────


def test_keys_and_defaults_are_trls() -> None:
    found = theirs("reward")
    assert set(found["keys"]) - {"help"} == set(importers.known("trl.reward"))
    read = {
        "learning_rate": 1e-4, "max_length": 1024, "disable_dropout": True, "center_rewards_coefficient": None,
    }  # fmt: skip
    assert {key: found["defaults"][key] for key in read} == read


def test_llamafactorys_reward_trainer_leaves_dropout_on_and_adds_nothing_to_the_loss() -> None:
    text = (facts.source("llamafactory") / "train" / "rm" / "trainer.py").read_text(encoding="utf-8")
    assert "disable_dropout" not in text
    assert "loss = -torch.nn.functional.logsigmoid(chosen_scores.float() - rejected_scores.float()).mean()" in text


def test_swift_and_axolotl_have_the_numbers_that_are_read() -> None:
    found = facts.defaults(facts.source("swift") / "arguments" / "rlhf_args.py", "RLHFArguments")
    assert found["center_rewards_coefficient"] is None
    axolotl = facts.source("axolotl")
    assert "return TaskType.SEQ_CLS" in (axolotl / "loaders" / "adapter.py").read_text(encoding="utf-8")
    strategy = axolotl / "prompt_strategies" / "bradley_terry" / "chat_template.py"
    assert 'chosen_tokenized["input_ids"][:max_length]' in strategy.read_text(encoding="utf-8")
