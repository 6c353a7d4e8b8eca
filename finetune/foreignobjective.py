"""What other trainers learn from preferences by: methods, losses and their numbers, and the adapter to go on from.

Facts of TRL 1.16 and 1.9, which axolotl runs (`trainer/dpo_trainer.py`, `kto_trainer.py`, `reward_trainer.py`,
`experimental/orpo` and `cpo`), of LLaMA-Factory 0.9.5 (`train/dpo/trainer.py`, `train/kto/trainer.py`,
`train/rm/trainer.py`) and of ms-swift 4.6 (`rlhf_trainers/`): the reference is the model with its adapter off, and
dropout is off in the policy too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune.foreign import Draft, Settings, short


class Word(NamedTuple):
    """``method``: what a recipe calls it, empty where it has none; then ``why``."""

    method: str = ""
    why: str = ""


_SAMPLES = "it learns from answers that it samples as it goes, and otherwise than grpo, which is"
_TEACHER = (
    "its model learns from a teacher on answers that it samples itself, all or a share of them; objective.method: "
    "distill learns from the answers of the rows (lmbda 0 there)"
)
METHODS = {
    "sft": Word("sft"), "pt": Word("sft"),
    "dpo": Word("dpo"), "ipo": Word("dpo"), "orpo": Word("orpo"), "simpo": Word("simpo"), "kto": Word("kto"),
    "cpo": Word(why="its loss has no reference and one term more; with loss_type simpo it is simpo, which is"),
    "grpo": Word("grpo"), "gdpo": Word(why=_SAMPLES), "rloo": Word(why=_SAMPLES), "ppo": Word(why=_SAMPLES),
    "ebft": Word(why=_SAMPLES), "reward": Word("reward"), "rm": Word("reward"),
    "prm": Word(why="it scores each step of an answer, and a recipe's reward model a whole answer"),
    "distillation": Word(why=_TEACHER), "gkd": Word(why=_TEACHER),
}  # fmt: skip
"""The trainers' words → the method here."""
LOSSES = ("sigmoid", "ipo", "hinge", "robust")
"""DPO's, by the same words here as there."""
_NOT_SMOOTHED = ("ipo", "hinge")
_REFERENCE = (
    "the reference is the same model without its adapter, or with the one that it begins from: no model of its own"
)
_LIKELIHOOD = "it adds the chosen answer's cross-entropy to the loss: no term of {method} here; orpo has one"
_LOST = {
    "loss_weights": "a sum of several losses: a recipe has one", "dpo_loss_weights": "as loss_weights",
    "rpo_alpha": _LIKELIHOOD, "pref_ftx": _LIKELIHOOD,
    "pref_bco_weight": "it adds BCO's loss, which is not here", "alpha": "AlphaPO's reward, which is not here",
    "ld_alpha": "the tokens by which one answer is the longer weighed less: here all weigh the same",
    "use_weighting": "pairs were weighed by their probability (WPO): here all weigh the same",
    "dpo_use_weighting": "as use_weighting", "reference_free": "a reference of equal rewards: take simpo or orpo",
    "sync_ref_model": "the reference followed the policy: here it stays what it was",
    "ref_model": _REFERENCE, "ref_model_name_or_path": _REFERENCE, "ref_model_adapters": _REFERENCE,
    "center_rewards_coefficient": "a reward model's", "discopop_tau": "DiscoPOP's loss, which is not here",
}  # fmt: skip
_HEADS = ("score", "v_head")
_SHAPE = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save")


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a trainer calls an objective's settings, and its defaults. ``beta``: the keys in the order that they count.

    ``gamma_default``: None where it has none. ``smooths``: whether its sigmoid loss heeds label smoothing.
    ``likelihood``: the weight that it gives SimPO's further term, and that key.
    """

    word: str
    beta: tuple[str, ...] = ("beta",)
    beta_default: float = 0.1
    loss: str = "loss_type"
    smoothing: str = "label_smoothing"
    smooths: bool = True
    gamma: str = "simpo_gamma"
    gamma_default: float | None = 1.0
    likelihood: str = "cpo_alpha"
    likelihood_default: float = 1.0
    wanted: str = "desirable_weight"
    unwanted: str = "undesirable_weight"


def method(settings: Settings, key: str, word: str) -> str:
    """The method of a recipe for a trainer's word. Raises RecipeError where there is none."""
    found = METHODS.get(word)
    known = ", ".join(name for name, one in METHODS.items() if one.method)
    if found is None:
        raise settings.stop(key, f"{short(word)} is no method that is known here", f"one of {known}")
    if not found.method:
        what = f"{short(word)} is not taken over: {found.why}"
        raise settings.stop(key, what, f"taken over are {known}; docs/objectives.md")
    return found.method


def objective(
    draft: Draft, method: str, names: Names, *, loss: str | Sequence[str] = "", said: Sequence[str] = ()
) -> None:
    """The recipe's ``objective:`` for a method that judges answers, behind the adapter's keys.

    ``loss``: DPO's or KTO's, as it was there. ``said``: keys of which enough is said already.
    """
    settings = draft.settings
    settings.used.update((names.word, names.loss))
    draft.put("objective.method", method, names.word, value=settings.text(names.word) or method)
    losses = [loss] if isinstance(loss, str) else list(loss)
    if method == "dpo":
        _loss(draft, names, losses)
    beta = next((key for key in names.beta if settings.has(key)), names.beta[0])
    settings.used.update(names.beta)
    draft.put("objective.beta", settings.number(beta, names.beta_default), beta)
    if method == "simpo":
        _simpo(draft, names)
    if method == "kto":
        if losses not in ([], [""], ["kto"]):
            draft.lost(
                names.loss, f"{short(losses[0])} is no loss of a recipe's kto: the paper's is written in its place"
            )
        for key, ours in ((names.wanted, "desirable_weight"), (names.unwanted, "undesirable_weight")):
            draft.put(f"objective.{ours}", settings.number(key, 1.0), key)
        draft.differs(names.word, "the zero point was taken over the rows of a micro-batch there, so that its "
                      "gradient depended on the cut; here over the whole step")  # fmt: skip
    if method == "orpo":
        draft.differs(names.word, "the chosen answer's cross-entropy is the mean over its own tokens here, and each "
                      "pair counts alike")  # fmt: skip
    no_dropout(draft)
    said = (*said, names.likelihood) if method == "simpo" else said
    for key, why in _LOST.items():
        if key not in said and settings.has(key) and settings.values[key] not in (False, 0, [], ""):
            draft.lost(key, why.format(method=method))
    if settings.text("f_divergence_type", "reverse_kl") != "reverse_kl":
        draft.lost("f_divergence_type", "the margin is that of the reverse KL divergence here")


def _loss(draft: Draft, names: Names, words: list[str]) -> None:
    settings = draft.settings
    word = words[0] if words and words[0] else "sigmoid"
    if len(words) > 1:
        draft.lost(names.loss, f"{short(words)}: a recipe has one loss; {short(word)} is the first")
    smoothing = settings.number(names.smoothing, 0.0)
    ours = word if word in LOSSES else "sigmoid"
    if word not in LOSSES:
        draft.lost(names.loss, f"{short(word)} is no loss of a recipe ({', '.join(LOSSES)}): sigmoid is written in its "
                   "place, which learns otherwise")  # fmt: skip
    if word == "robust" and not smoothing:
        ours = "sigmoid"
    note = "robust without label_smoothing is sigmoid" if ours != word and word == "robust" else ""
    draft.put("objective.loss", ours, names.loss, value=word, note=note)
    if word == "ipo":
        draft.put("objective.length_normalised", True, names.loss, value=word, note="ipo takes means over tokens")
    heeded = ours == "robust" or (names.smooths and ours not in _NOT_SMOOTHED)
    if smoothing and not heeded:
        draft.differs(names.smoothing, f"the loss {short(word)} does not heed it there, without a word: nor is it "
                      "written here; the loss robust heeds it")  # fmt: skip
        smoothing = 0.0
    if smoothing:
        draft.put("objective.label_smoothing", smoothing, names.smoothing)


def _simpo(draft: Draft, names: Names) -> None:
    settings = draft.settings
    if names.gamma_default is None and not settings.has(names.gamma):
        settings.fault(names.gamma, f"missing: {settings.trainer} has no default for it", "write it")
    draft.put("objective.gamma", settings.number(names.gamma, names.gamma_default or 0.0), names.gamma)
    weight = settings.number(names.likelihood, names.likelihood_default)
    if weight:
        source = "" if settings.has(names.likelihood) else ", its default"
        draft.lost(names.likelihood, f"it is {weight:g}{source}: that much of the chosen answer's cross-entropy was in "
                   "the loss (CPO-SimPO); simpo here is the paper's, without it, and orpo has one")  # fmt: skip


def reward(draft: Draft, key: str, *, centre: str = "", dropout: bool = False) -> None:
    """The recipe's ``objective:`` for a reward model, behind the adapter's keys.

    ``key``: the one that says so. ``centre``: the key of the rewards' squared sum, where that trainer has one.
    ``dropout``: whether it leaves dropout on.
    """
    settings = draft.settings
    draft.put("objective.method", "reward", key, value=settings.text(key) or "reward")
    draft.add("objective.margin", 0.0, "as there, where rows have none of their own")
    if centre:
        weight = settings.number(centre, 0.0)
        if weight < 0:
            settings.fault(centre, f"must not be below 0; found {short(weight)}")
        draft.put("objective.centre_rewards_coefficient", weight, centre)
    if kept := draft.lines.get("adapter.modules_to_save"):
        others = [name for name in kept[0] if name not in _HEADS]
        draft.taken = [one for one in draft.taken if one.recipe != "adapter.modules_to_save"]
        del draft.lines["adapter.modules_to_save"]
        if others:
            draft.add("adapter.modules_to_save", others, "the score head is trained whole anyway")
    draft.differs(key, "the score head begins with random numbers there, so that it ranks pairs by chance at first; "
                  "here with zeros: the first loss is log 2")  # fmt: skip
    draft.differs(key, "a text's reward is read at its last token, with ChatML's template the line break behind the "
                  "stop token; here at the stop token")  # fmt: skip
    if not dropout:
        no_dropout(draft)


def margins(draft: Draft, key: str, paths: Sequence[str]) -> None:
    """Rows of a reward model that have a margin of their own, which TRL and ms-swift read without being told."""
    for path in paths:
        if "margin" in (draft.settings.place.columns(path) or ()):
            draft.lost(key, f"{short(path)}: its column margin is what each pair's rewards were to differ by there; "
                       "here it is not read, and objective.margin is the same for all")  # fmt: skip


def no_dropout(draft: Draft) -> None:
    """Trainers of preferences switch all dropout off, the adapter's too, unless they are told not to."""
    settings = draft.settings
    if not settings.truth("disable_dropout", default=True):
        return
    found = draft.lines.get("adapter.lora_dropout", (0.0, ""))[0]
    draft.put("adapter.lora_dropout", 0.0, "lora_dropout", value=found, note="dropout was off")
    if found:
        draft.differs("lora_dropout", f"it was {found:g} and did nothing: dropout is off in the policy there, the "
                      "adapter's too (disable_dropout)")  # fmt: skip


def onward(draft: Draft, key: str, path: str, method: str, *, reference: str = "") -> None:
    """``adapter.start_from``; where that adapter is on this disk, its shape is the one that counted there.

    ``reference``: the adapter of the reference there, where it had one of its own.
    """
    settings = draft.settings
    if method == "reward":
        draft.lost(key, "it went on from that adapter there; an adapter of another run has no score head here: "
                   "`finetune merge` that run, and name the result as model")  # fmt: skip
        return
    folder = settings.find(path)
    draft.put("adapter.start_from", folder, key, value=path)
    if method in ("dpo", "kto", "grpo"):
        if not reference:
            draft.differs(key, "the reference there is the base without this adapter; here it is the base with it, "
                          "so that a run begins where its reference is")  # fmt: skip
        elif reference != path:
            draft.lost(
                key, f"the reference there is {short(reference)}; here it is the adapter that the run begins from"
            )
    there = _config(Path(folder))
    for name in (one for one in _SHAPE if one in there):
        value, old = there[name] or None, draft.lines.get(f"adapter.{name}", (None, ""))[0] or None
        if name == "target_modules" and isinstance(value, list):
            value = sorted(map(str, value))
        if value != old:
            draft.put(f"adapter.{name}", value, key, value=path, note="as that adapter has it, whatever this file says")


def _config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter or a finished run; empty where it is not here or cannot be read."""
    for place in (folder, folder / "adapter"):
        try:
            found = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else {}
    return {}
