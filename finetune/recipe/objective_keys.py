"""The recipe's ``objective:``: which keys a method has, their defaults, and what it asks of other keys.

A key that a method does not know is refused; what is left out takes that method's default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.recipe.words import Finding
from finetune.recipe.yamlfile import KeyPath

DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "length_normalised": False},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "reward": {"margin": 0.0, "centre_rewards_coefficient": 0.0},
    "distill": {
        "teacher": None, "teacher_weights": "auto", "temperature": 1.0, "divergence": "forward_kl", "beta": None,
        "alpha": 0.0,
    },
    "grpo": {
        "rewards": None, "completions": 8, "max_new_tokens": 256, "temperature": 1.0, "loss": "dapo", "beta": 0.0,
        "epsilon": 0.2, "epsilon_high": None, "scale_rewards": "group", "iterations": 1,
        "mask_truncated_completions": False, "use_bias_correction_kl": True, "batch_rows": 32,
    },
}  # fmt: skip
"""Method → its keys. Those of the papers: DPO, ORPO and KTO 0.1, SimPO 2 with a margin of half of it; of GRPO TRL's."""
ROWS = {
    "sft": "answers", "dpo": "pairs", "orpo": "pairs", "simpo": "pairs", "kto": "labels", "reward": "pairs",
    "distill": "answers", "grpo": "prompts",
}  # fmt: skip
"""Method → what it trains on."""
SCORED = ("reward",)
"""Methods that train a score head, in place of the head over the vocabulary."""
_SCORES = {
    "pairs": ("preference_accuracy", "reward_accuracy", "reward_margin"),
    "labels": ("reward_accuracy", "reward_margin"),
}  # fmt: skip
FORMATS = {"pairs": ("preference",), "labels": ("kto",)}
"""What a method trains on → the formats that have it; every other format has answers."""
EXTRA_PASSES = {"dpo": 1, "kto": 3}
"""Forward passes without gradients in each step, beside the one that trains: the reference's, and those of KTO's zero
point."""
_COLDEST, _WARMEST = 0.01, 2.0
"""Temperatures that answers are sampled at."""
_LOSSES = {"dpo": ("sigmoid", "ipo", "hinge", "robust"), "grpo": ("grpo", "dr_grpo", "dapo")}


def extra_passes(chosen: Any) -> int:
    """Those of a recipe's ``objective``; grpo looks at the reference and back where its keys ask for it."""
    if chosen.method == "grpo":
        return int(bool(chosen.beta)) + int(chosen.iterations > 1)
    return EXTRA_PASSES.get(chosen.method, 0)


def scores(tree: dict[str, Any]) -> tuple[str, ...]:
    """What the metric ``loss`` measures beside it, where rows judge answers or a teacher does."""
    section = tree.get("objective", {})
    method = section.get("method", "sft") if isinstance(section, dict) else None
    if method in SCORED:
        return ("reward_accuracy", "reward_margin")
    if method == "distill":
        return ("teacher_kl",)
    return _SCORES.get(ROWS.get(method, ""), ()) if isinstance(method, str) else ()


def check(tree: dict[str, Any]) -> Iterator[Finding]:
    """Every fault; values of a wrong type are somebody else's to report."""
    section = tree.get("objective", {})
    method = section.get("method", "sft") if isinstance(section, dict) else None
    if not isinstance(method, str) or method not in DEFAULTS:
        return
    every = {key for keys in DEFAULTS.values() for key in keys}
    for key, value in section.items():
        if key in every and key not in DEFAULTS[method] and value is not None:
            yield Finding(("objective", key), f"has no meaning with {method}", "remove it")
    if (loss := section.get("loss")) is not None and method in _LOSSES and loss not in _LOSSES[method]:
        yield Finding(("objective", "loss"), f"is no loss of {method}", f"use {' or '.join(_LOSSES[method])}")
    if section.get("beta") == 0 and method != "grpo":
        yield Finding(("objective", "beta"), f"is 0, which leaves nothing of {method}", "make it larger")
    if method == "kto" and section.get("desirable_weight") == 0 == section.get("undesirable_weight"):
        yield Finding(("objective", "undesirable_weight"), "both weights are 0: nothing is learned", "raise one")
    if method == "dpo":
        yield from _smoothing(section)
    if method == "distill":
        yield from _teacher(section)
    if method == "grpo":
        yield from _sampled(tree, section)
    train = tree.get("train")
    if method == "kto" and isinstance(train, dict) and train.get("examples_per_step") == 1:
        what = "kto takes its zero point from the other answers of a step"
        yield Finding(("train", "examples_per_step"), what, "give it two at least, better 16 or more")
    yield from _formats(tree, method)
    if method in SCORED:
        yield from _scored(tree, method)
    if ROWS[method] != "answers":
        yield from _single_answers(tree, method)
        yield from _room(tree, method)


def _smoothing(section: dict[str, Any]) -> Iterator[Finding]:
    at, loss, share = ("objective", "label_smoothing"), section.get("loss"), section.get("label_smoothing")
    if loss in ("ipo", "hinge") and share:
        yield Finding(at, f"has no meaning with the loss {loss}", "remove it, or take sigmoid or robust")
    if loss == "robust" and not share:
        yield Finding(at, "missing: robust corrects for a share of swapped pairs", "add it, or take sigmoid")


def _teacher(section: dict[str, Any]) -> Iterator[Finding]:
    if section.get("teacher") is None:
        fix = "name a finished run, an adapter, a model, or what finetune teach wrote"
        yield Finding(("objective", "teacher"), "missing: distill learns from a teacher", fix)
    beta, divergence = _number(section.get("beta")), section.get("divergence", "forward_kl")
    if beta is not None and divergence in ("forward_kl", "reverse_kl"):
        yield Finding(("objective", "beta"), f"has no meaning with {divergence}", "remove it, or take divergence: jsd")
    elif beta is not None and beta >= 1:
        yield Finding(("objective", "beta"), f"must be below 1 with jsd; found {beta}", "1 is divergence: reverse_kl")


def _sampled(tree: dict[str, Any], section: dict[str, Any]) -> Iterator[Finding]:
    """What sampling asks of other keys."""
    if section.get("rewards") is None:
        what = "missing: grpo learns from what its answers earn"
        yield Finding(("objective", "rewards"), what, "add rewards: [{metric: exact_match}], or other metrics")
    listed = section.get("rewards")
    weights = [one.get("weight", 1) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if weights and not any(weights):
        yield Finding(("objective", "rewards"), "every weight is 0: no answer earns anything", "raise one")
    if (warmth := _number(section.get("temperature"))) is not None and not _COLDEST <= warmth <= _WARMEST:
        what = f"nothing can be sampled from: give {_COLDEST} to {_WARMEST}; found {warmth}"
        yield Finding(("objective", "temperature"), what, "1 is the model's own")
    train, data = tree.get("train"), tree.get("data")
    train, data = train if isinstance(train, dict) else {}, data if isinstance(data, dict) else {}
    if train.get("tokens_per_step") is not None:
        what = "grpo does not know its answers' tokens ahead"
        yield Finding(("train", "tokens_per_step"), what, "use examples_per_step: prompts in one step")
    if data.get("thinking") == "mask":
        what = "grpo trains all that it has sampled, its thinking too"
        yield Finding(("data", "thinking"), what, "use keep or strip")
    length, longest = _number(train.get("max_length")), _number(section.get("max_new_tokens"))
    longest = DEFAULTS["grpo"]["max_new_tokens"] if longest is None else longest
    if length is not None and longest >= length:
        what = f"a prompt and its answer must fit into train.max_length ({length}); found {longest}"
        yield Finding(("objective", "max_new_tokens"), what, "lower it, or raise train.max_length")


def _formats(tree: dict[str, Any], method: str) -> Iterator[Finding]:
    """A format that is named must have what the method trains on; of ``auto`` each row says what it is."""
    data, rows = tree.get("data"), ROWS[method]
    if not isinstance(data, dict):
        return
    sources = data.get("sources")
    named: list[tuple[KeyPath, Any]] = [(("data", "format"), data.get("format"))]
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            named.append((("data", "sources", index, "format"), source.get("format")))
    special = [name for names in FORMATS.values() for name in names]
    for at, found in named:
        if not isinstance(found, str) or found == "auto":
            continue
        if rows in FORMATS and found not in FORMATS[rows]:
            yield Finding(at, f"{method} trains on {rows}, which {found} rows are not", f"use {FORMATS[rows][0]}")
        elif rows == "answers" and found in special:
            yield Finding(
                at, f"{method} trains on answers, and {found} rows judge them", "choose another objective.method"
            )
        elif rows == "prompts" and found in (*special, "text"):
            yield Finding(at, f"grpo needs rows that ask and answer, which {found} rows are not", "use chat or another")


def _single_answers(tree: dict[str, Any], method: str) -> Iterator[Finding]:
    """An answer is judged whole, given what was asked: nothing of either may be cut, and the prompt is not trained."""
    data, wanted = tree.get("data"), tree.get("evaluate")
    data = data if isinstance(data, dict) else {}
    if data.get("train_on") == "all":
        yield Finding(("data", "train_on"), f"{method} judges answers, not what was asked", "use assistant or last")
    if data.get("over_length") in ("truncate_turns", "split"):
        yield Finding(("data", "over_length"), f"{method} compares whole answers to one prompt", "use error or drop")
    metrics = wanted.get("metrics") if isinstance(wanted, dict) else None
    for at, metric in enumerate(metrics if isinstance(metrics, list) else []):
        if method == "kto" and metric == "exact_match":
            fix = "remove it; rows with right answers: finetune eval MERGED --data FILE"
            yield Finding(("evaluate", "metrics", at), "a kto row may hold an unwanted answer", fix)


def _scored(tree: dict[str, Any], method: str) -> Iterator[Finding]:
    """A reward model writes no text, and its adapter holds a head that other runs have not."""
    wanted, adapter = tree.get("evaluate"), tree.get("adapter")
    metrics = wanted.get("metrics") if isinstance(wanted, dict) else None
    for at, metric in enumerate(metrics if isinstance(metrics, list) else []):
        if isinstance(metric, str) and metric != "loss":
            what = f"{method} trains a model that scores texts and writes none"
            yield Finding(("evaluate", "metrics", at), what, "keep loss, which tells how many pairs are told apart too")
    if not isinstance(adapter, dict):
        return
    if isinstance(adapter.get("method"), str) and adapter["method"] != "lora":
        yield Finding(("adapter", "method"), f"{method} trains its score head beside lora only", "use lora")
    if adapter.get("start_from") is not None:
        what, fix = "an adapter of another run has no score head", "merge that run, and set model: to the merged folder"
        yield Finding(("adapter", "start_from"), what, fix)


def _room(tree: dict[str, Any], method: str) -> Iterator[Finding]:
    """Both texts of a pair go through the model at once."""
    train = tree.get("train")
    if not isinstance(train, dict) or ROWS[method] != "pairs":
        return
    length = _number(train.get("max_length"))
    for key in ("tokens_per_step", "micro_batch_tokens"):
        tokens = _number(train.get(key))
        if tokens is not None and length is not None and length <= tokens < 2 * length:
            what = f"must hold both texts of a pair, each up to max_length ({length}); found {tokens}"
            yield Finding(("train", key), what, "raise it")


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
