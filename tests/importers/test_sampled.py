"""GRPO as TRL and ms-swift say it: its numbers, a step's prompts, rows with an answer, the rewards to be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune import importers, recipe
from tests.importers import facts
from tests.importers.conftest import SWIFT, TRL, Imported, imported, plan
from tests.importers.test_objectives import brief, theirs
from tests.runs import finetune

TRLS = TRL.replace("pairs", "asked").replace("per_device_train_batch_size: 4", "num_generations: 4")
SWIFTS = f"{SWIFT.replace('pairs', 'train')}rlhf_type: grpo\nnum_generations: 4\nper_device_train_batch_size: 8\n"
SWIFTS = SWIFTS.replace("max_length: 256", "max_length: 120\nmax_completion_length: 64")
SHORT = "max_completion_length: 64\n"
BOTH = {"trl": f"{TRLS}{SHORT}", "swift": SWIFTS}
EMPTY, WRITTEN = "rewards: null", "rewards: [{metric: exact_match}]"


@pytest.fixture(autouse=True)
def asked(place: Path) -> None:
    """Twelve questions with the column that a reward function is given, as TRL's rows are."""
    rows = [{"prompt": [{"role": "user", "content": f"After {at}?"}], "solution": str(at + 1)} for at in range(12)]
    (place / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "bare.jsonl").write_text("".join(f"{json.dumps({'prompt': row['prompt']})}\n" for row in rows))


def filled(trainer: str, text: str) -> tuple[Imported, recipe.Recipe]:
    """The recipe with the one line that its importer cannot know."""
    found = imported(trainer, text)
    file = Path("recipe.yaml")
    assert file.read_text().count(EMPTY) == 1
    file.write_text(file.read_text().replace(EMPTY, WRITTEN))
    return found, recipe.load(file)


@pytest.mark.parametrize("trainer", BOTH)
def test_nothing_plans_before_the_rewards_are_written(trainer: str) -> None:
    found = imported(trainer, f"{BOTH[trainer]}reward_funcs: [accuracy_reward, my.own]\nreward_weights: [1, 0.5]\n")
    (missing,) = found.json["missing"]
    assert (missing["what"], "c.yaml (here objective.rewards)" in missing["where"]) == (
        "missing: grpo learns from what its answers earn",
        True,
    )
    said = found.about("reward_funcs", "lost")
    assert "reward_funcs: [accuracy_reward, my.own]; reward_weights: [1, 0.5]" in said
    assert "TO BE WRITTEN" in Path("recipe.yaml").read_text()
    said = finetune("plan", "recipe.yaml").err
    assert "objective.rewards: missing" in said


DEFAULTS = {
    "trl": {
        "completions": 8, "max_new_tokens": 512, "temperature": 1.0, "loss": "dapo", "beta": 0.0, "epsilon": 0.2,
        "epsilon_high": None, "scale_rewards": "group", "iterations": 1, "mask_truncated_completions": False,
        "use_bias_correction_kl": True,
    },
    "swift": {
        "completions": 8, "max_new_tokens": 512, "temperature": 0.9, "loss": "grpo", "beta": 0.04, "epsilon": 0.2,
        "epsilon_high": None, "scale_rewards": "group", "iterations": 1, "mask_truncated_completions": False,
        "use_bias_correction_kl": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("trainer", DEFAULTS)
def test_every_default_is_that_trainers(trainer: str) -> None:
    text = BOTH[trainer].replace("num_generations: 4\n", "reward_funcs: x\n").replace(SHORT, "")
    _, made = filled(trainer, text)
    settings = made.objective.settings()
    assert {key: settings[key] for key in DEFAULTS[trainer]} == DEFAULTS[trainer]
    assert made.adapter.fields["lora_dropout"] == 0.05, "dropout is on in GRPO's policy"
    assert made.train.examples_per_step == 1


NUMBERS = "beta: 0.02\nepsilon: 0.1\nepsilon_high: 0.3\ntemperature: 0.7\nloss_type: dr_grpo\nscale_rewards: none\n"
SAID = {"beta": 0.02, "epsilon": 0.1, "epsilon_high": 0.3, "temperature": 0.7, "loss": "dr_grpo", "completions": 4}
SAID |= {"scale_rewards": "none", "max_new_tokens": 64, "mask_truncated_completions": True}
MASKED = {"trl": "mask_truncated_completions: true\n", "swift": "overlong_filter: true\n"}


@pytest.mark.parametrize("trainer", BOTH)
def test_every_number_is_carried_over_and_plans(trainer: str) -> None:
    found, made = filled(trainer, f"{BOTH[trainer]}{NUMBERS}{MASKED[trainer]}")
    settings = made.objective.settings()
    assert {key: settings[key] for key in SAID} == SAID
    assert made.train.examples_per_step == 2, "8 answers of 4 each"
    assert made.train.max_length == (120 + 64 if trainer == "swift" else 1024), "no bound there: what the model reaches"
    assert {f"objective.{key}" for key in SAID} <= set(found.values)
    assert plan()["steps"] == 2


def test_a_step_counts_prompts_and_passes_drop_what_fills_none() -> None:
    text = TRLS.replace("max_steps: 2", "num_train_epochs: 2") + f"{SHORT}gradient_accumulation_steps: 2\n"
    found, made = filled("trl", f"{text}save_strategy: epoch\n")
    assert (made.train.examples_per_step, made.train.save_every) == (4, 3)
    found, made = filled("trl", f"{text}per_device_train_batch_size: 10\n")
    assert made.train.examples_per_step == 5
    assert "left out its last rows, which filled no step there: 4 steps" in found.about("epochs")


def test_updates_from_the_same_answers_are_one_step_here() -> None:
    text = BOTH["trl"].replace("max_steps: 2", "max_steps: 9")
    found, made = filled("trl", f"{text}num_iterations: 2\nwarmup_steps: 3\nsave_steps: 4\n")
    assert (made.objective.iterations, made.train.steps, made.train.warmup, made.train.save_every) == (2, 5, 2, 2)
    assert "each of 2 updates" in found.about("num_iterations")
    plan()


def test_a_script_and_several_cards() -> None:
    line = "trl grpo --model_name_or_path base --dataset_name asked.jsonl --use_peft --dtype bfloat16 --top_p 1.0"
    Path("c.sh").write_text(f"torchrun --nproc_per_node 2 {line} --max_completion_length 64 --reward_funcs a.b\n")
    found = Imported("c.sh")
    assert found.values["train.examples_per_step"] == 2
    assert not found.about("top_p", "lost")


@pytest.mark.parametrize(
    ("trainer", "text", "key", "kind", "what"),
    [
        ("trl", "loss_type: bnpo\n", "loss_type", "lost", "bnpo is the mean over the tokens of a micro-batch"),
        ("trl", "loss_type: sapo\n", "loss_type", "lost", "learns otherwise"),
        ("trl", "top_p: 0.9\n", "top_p", "lost", "drawn from all tokens"),
        ("trl", "importance_sampling_level: sequence\n", "importance_sampling_level", "lost", "token by token"),
        ("trl", "use_vllm: true\n", "use_vllm", "differs", "came from vLLM there"),
        ("trl", "steps_per_generation: 4\n", "steps_per_generation", "differs", "from an older policy"),
        ("trl", "", "dataset_name", "differs", "its column solution is given to the reward functions"),
        ("trl", "", "max_completion_length", "differs", "a prompt may have any length there"),
        ("swift", "scale_rewards: gdpo\n", "scale_rewards", "lost", "group is written in its place"),
        ("swift", "", "truncation_strategy", "differs", "left: prompts over 120 tokens lose their beginning"),
        ("swift", "adapters: earlier\n", "adapters", "differs", "is the base without this adapter"),
    ],
    ids=brief,
)
def test_what_has_no_counterpart_or_meant_something_else_is_said(
    trainer: str, text: str, key: str, kind: str, what: str
) -> None:
    found = imported(trainer, f"{BOTH[trainer]}{text}")
    assert what in found.about(key, kind), found.json[kind]


def test_rows_without_an_answer_are_said() -> None:
    found = imported("trl", BOTH["trl"].replace("asked", "bare"))
    assert "ends with the right answer" in found.about("dataset_name", "lost")


def test_a_batch_that_holds_no_whole_groups_is_refused_as_there() -> None:
    Path("c.yaml").write_text(BOTH["trl"].replace("num_generations: 4", "num_generations: 3"))
    said = finetune("import", "c.yaml", "--from", "trl")
    assert (said.code, "8 answers at once are no whole groups of 3" in said.err) == (2, True), said.err
    assert not Path("recipe.yaml").exists()


# ── what the packages themselves say ──────────────────────────────────────

THEIRS = {
    "num_generations": 8, "max_completion_length": 512, "temperature": 1.0, "loss_type": "dapo", "beta": 0.0,
    "epsilon": 0.2, "epsilon_high": None, "scale_rewards": "group", "num_iterations": 1, "disable_dropout": False,
    "mask_truncated_completions": False, "use_bias_correction_kl": True, "learning_rate": 1e-6,
}  # fmt: skip


def test_keys_and_defaults_are_trls() -> None:
    found = theirs("grpo")
    program = {"reward_funcs", "reward_model_name_or_path"}  # of the script's own arguments
    assert (set(found["keys"]) | program) - {"help"} == set(importers.known("trl.grpo"))
    assert {key: found["defaults"][key] for key in THEIRS} == THEIRS


def test_defaults_are_those_of_swift() -> None:
    swift = facts.source("swift")
    found: dict[str, Any] = facts.defaults(swift / "rlhf_trainers" / "args_mixin.py", "GRPOArgumentsMixin")
    found |= facts.defaults(swift / "arguments" / "rlhf_args.py", "RLHFArguments", "GRPOArguments")
    read = {
        "num_generations": 8, "max_completion_length": 512, "temperature": 0.9, "epsilon": 0.2, "epsilon_high": None,
        "scale_rewards": None, "num_iterations": 1, "overlong_filter": False, "advantage_estimator": "grpo",
    }  # fmt: skip
    assert {key: found[key] for key in read} == read
    text = (swift / "arguments" / "rlhf_args.py").read_text(encoding="utf-8")
    assert "self.beta = 0.04" in text
    assert "self.loss_type = 'grpo'" in text
    assert "Setting default gradient_accumulation_steps to 1 for GRPO." in text
    trainer = (swift / "rlhf_trainers" / "grpo_trainer.py").read_text(encoding="utf-8")
    assert "torch.exp(safe_ratio) - safe_ratio - 1, min=-10, max=10)" in trainer
    assert "per_token_kl * coef" not in trainer
