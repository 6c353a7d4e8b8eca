"""How other trainers learn from rewards of answers that the model samples itself: GRPO's numbers, and what a step is.

Facts of TRL 1.16 (`trainer/grpo_config.py`, `grpo_trainer.py`, `utils.py`: RepeatSampler) and of ms-swift 4.6
(`rlhf_trainers/grpo_trainer.py`, `args_mixin.py`, `rl_core/advantage.py`): a batch counts answers, the reference is the
model with its adapter off, dropout is on in the policy. Rewards are Python functions there, which nothing here runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.foreign import Draft, short
from finetune.foreignparts import Origin

LOSSES = ("grpo", "dr_grpo", "dapo")
"""By the same words here as there."""
_SCALES = {"true": "group", "false": "none", "group": "group", "batch": "batch", "none": "none"}
_ROOM = 2048
_ANSWERS = ("solution", "answer", "ground_truth", "reference", "response", "label")
_WHOLE = "answers are drawn from all tokens here, at the temperature alone"
_LOST = {
    "top_p": ((1,), _WHOLE), "top_k": ((0, -1), _WHOLE), "min_p": ((0,), _WHOLE),
    "repetition_penalty": ((1,), _WHOLE), "generation_kwargs": ((), _WHOLE),
    "chat_template_kwargs": ((), "see data.thinking: keep or strip"),
    "delta": ((), "a second bound of the ratio, which is not here"),
    "importance_sampling_level": (("token",), "the ratio is taken token by token here"),
    "multi_objective_aggregation": (("sum_then_normalize",), "rewards are added before they are compared here"),
    "advantage_estimator": (("grpo",), "an advantage is a reward's distance from the mean of its group here"),
    "kl_in_reward": ((), "the KL divergence is a term of the loss here"),
    "top_entropy_quantile": ((1,), "all tokens of an answer are in the loss here"),
    "entropy_coef": ((0,), "there is no term for the entropy here"),
    "use_adaptive_entropy": ((), "there is no term for the entropy here"),
    "off_policy_mask_threshold": ((), "answers are the step's own here"),
    "off_policy_sequence_mask_delta": ((), "answers are the step's own here"),
    "dynamic_sample": ((), "prompts whose answers earn the same are not replaced here: they teach nothing and cost "
                           "their sampling"),
    "sync_ref_model": ((), "the reference followed the policy: here it stays what it was"),
    "multi_turn_scheduler": ((), "a prompt has one answer here"), "use_gym_env": ((), "a prompt has one answer here"),
    "teacher_model": ((), "a teacher beside the rewards: no objective here has both"),
    "teacher_model_server": ((), "a teacher beside the rewards: no objective here has both"),
    "chord_sft_dataset": ((), "supervised rows beside the rewards: no objective here has both"),
    "advantage_reweight": ((), "advantages are not weighed here"),
}  # fmt: skip
"""Keys → the values that change nothing, and why the others have no counterpart."""
_JUDGES = ("reward_funcs", "reward_weights", "reward_model_name_or_path", "reward_model", "reward_model_plugin")


@dataclass(frozen=True, kw_only=True)
class Names:
    """A trainer's defaults, and the names that are its own. ``corrected``: whether it can weight the KL divergence by
    the ratio, and does where nothing is said. ``masked``: the key that leaves answers out which were cut off."""

    word: str
    beta: float
    loss: str
    temperature: float
    corrected: bool
    masked: str


def objective(draft: Draft, names: Names) -> None:
    """The recipe's ``objective:``, but for its rewards: a line that says what has to be written."""
    settings = draft.settings
    settings.used.add(names.word)
    draft.put("objective.method", "grpo", names.word, value=settings.text(names.word) or "grpo")
    _rewards(draft)
    draft.put("objective.completions", settings.count("num_generations", 8, least=2), "num_generations")
    draft.put("objective.max_new_tokens", settings.count("max_completion_length", 512), "max_completion_length")
    draft.put("objective.temperature", settings.number("temperature", names.temperature), "temperature")
    word = (settings.items("loss_type") or [names.loss])[0]
    ours = word if word in LOSSES else "dapo"
    draft.put("objective.loss", ours, "loss_type", value=word)
    if word == "bnpo":
        draft.lost("loss_type", "bnpo is the mean over the tokens of a micro-batch, so that it depended on the cut: "
                   "dapo, the mean over those of the step, is written in its place")  # fmt: skip
    elif word not in LOSSES:
        draft.lost("loss_type", f"{short(word)} is no loss of a recipe's grpo ({', '.join(LOSSES)}): dapo is written "
                   "in its place, which learns otherwise")  # fmt: skip
    draft.put("objective.beta", settings.number("beta", names.beta), "beta")
    draft.put("objective.epsilon", settings.number("epsilon", 0.2), "epsilon")
    if (high := settings.given("epsilon_high")) is not None:
        draft.put("objective.epsilon_high", high, "epsilon_high")
    scale = settings.text("scale_rewards", "group").lower()
    draft.put("objective.scale_rewards", _SCALES.get(scale, "group"), "scale_rewards", value=scale)
    if scale not in _SCALES:
        draft.lost("scale_rewards", f"{short(scale)} is not here: group is written in its place")
    draft.put("objective.iterations", settings.count("num_iterations", 1), "num_iterations")
    draft.put("objective.mask_truncated_completions", settings.truth(names.masked, default=False), names.masked)
    if names.corrected:
        corrected = settings.truth("use_bias_correction_kl", default=True)
        draft.put("objective.use_bias_correction_kl", corrected, "use_bias_correction_kl")
    else:
        draft.add("objective.use_bias_correction_kl", False, "the KL divergence is not weighted by the ratio there")
    for key, (plain, why) in _LOST.items():
        if settings.has(key):
            settings.used.add(key)
            if not _nothing(settings.values[key], plain):
                draft.lost(key, why)
    if settings.truth("use_vllm", default=False):
        draft.differs("use_vllm", "answers came from vLLM there, whose probabilities are a little others than the "
                      "policy's; here from the policy itself")  # fmt: skip


def _nothing(value: object, plain: Sequence[float | str]) -> bool:
    """Whether a value changes nothing, however it is written (command lines have text alone)."""
    text = str(value).lower()
    try:
        return float(text) in plain
    except ValueError:
        return text in (*plain, "false", "none", "[]", "{}", "")


def _rewards(draft: Draft) -> None:
    settings = draft.settings
    draft.add("objective.rewards", None, "TO BE WRITTEN: what an answer earns, as docs/objectives.md shows; "
              "[{metric: exact_match}] is the shortest")  # fmt: skip
    named = [f"{key}: {short(settings.values[key])}" for key in _JUDGES if settings.has(key)]
    settings.used.update(_JUDGES)
    draft.lost("reward_funcs", f"rewards are Python functions or models there ({'; '.join(named) or 'none is named'}), "
               "which are not run here: write objective.rewards, metrics of answers with their weights (a pattern, "
               "a JSON schema, a command or a test of your own: docs/evaluating.md)")  # fmt: skip


def window(draft: Draft, key: str, longest: int | None, reach: int | None) -> None:
    """``train.max_length``: a prompt with its answer. ``longest``: of prompts there, None where they had no bound.
    ``reach``: of the model, where that is known."""
    answer = int(draft.lines["objective.max_new_tokens"][0])
    length = answer + (_ROOM if longest is None else longest)
    length = min(length, reach or length)
    keys = dict.fromkeys((key, "max_completion_length"))
    draft.put("train.max_length", length, *keys, value=f"{length - answer} + {answer}", note="a prompt and its answer")
    draft.add("data.over_length", "drop", "rows whose prompt is too long: left out and named")
    if longest is None:
        draft.differs("max_completion_length", "a prompt may have any length there; here prompt and answer must fit "
                      f"into train.max_length, which has room for prompts of {length - answer:,} tokens")  # fmt: skip


def steps(draft: Draft, batch: str) -> None:
    """Rows of a step are prompts here; there a batch counts answers. Behind ``hftrainer.course``."""
    settings, made = draft.settings, draft.course
    assert made is not None
    count, again = int(draft.lines["objective.completions"][0]), int(draft.lines["objective.iterations"][0])
    answers, device = made.per_step, made.micro * made.devices
    sampled = settings.count(
        "generation_batch_size", device * settings.count("steps_per_generation", made.accumulation)
    )
    if sampled % count:
        settings.fault(batch, f"{sampled} answers at once are no whole groups of {count} (num_generations): it is "
                       "refused there", f"make the batch a multiple of {count}, or give --devices N")  # fmt: skip
    if sampled > answers:
        draft.differs("steps_per_generation", f"{sampled} answers were sampled at once and used in steps of {answers} "
                      "there, the later ones from an older policy; here each step samples its own")  # fmt: skip
    prompts = max(1, answers // count)
    if answers % count and not sampled % count:
        draft.lost(
            batch, f"a step took {answers} of {sampled} answers, no whole groups of {count}: here {prompts * count}"
        )
    keys = (batch, "gradient_accumulation_steps", *(("devices",) if made.devices > 1 else ()))
    draft.put(
        "train.examples_per_step", prompts, *keys, value=f"{answers} answers ÷ {count}", note="prompts in one step"
    )
    made.micro, made.accumulation, made.devices, made.passes = 1, prompts, 1, "dropped"
    if again > 1:
        _updates(draft, again)


def _updates(draft: Draft, again: int) -> None:
    """A step here has several updates, of which each was a step there."""
    made = draft.course
    assert made is not None
    draft.differs("num_iterations", f"each of {again} updates from the same answers is a step of the schedule there; "
                  "here they are one step, with one rate")  # fmt: skip
    if made.steps is not None:
        steps = math.ceil(made.steps / again)
        draft.put("train.steps", steps, "max_steps", value=made.steps, note=f"{again} updates each")
        made.steps = steps
    made.warmup = math.ceil(made.warmup / again) if made.warmup >= 1 else made.warmup
    made.save, made.evaluate = (
        math.ceil(every / again) if not isinstance(every, str) and every >= 1 else every
        for every in (made.save, made.evaluate)
    )


def rows(draft: Draft, key: str, origins: Sequence[Origin]) -> list[Origin]:
    """The same origins, read as questions with the right answer, which the metrics compare with."""
    found = []
    for origin in origins:
        here = draft.settings.place.columns(origin.path)
        answer = next((name for name in _ANSWERS if name in (here or ())), "")
        if here is None or {"prompt", "completion"} <= set(here):
            found.append(origin)
        elif "prompt" in here and answer and not origin.columns:
            found.append(replace(origin, format="completion", columns={"completion": answer}))
            draft.differs(key, f"{short(origin.path)}: its column {answer} is given to the reward functions there; "
                          "here it is the right answer that metrics compare with")  # fmt: skip
        else:
            found.append(origin)
            if answer or not {"messages", "conversations"} & set(here):
                draft.lost(key, f"{short(origin.path)}: a row here ends with the right answer, which metrics compare "
                           f"with: write {answer or 'it'} as its last turn, or as a column completion")  # fmt: skip
    return found
