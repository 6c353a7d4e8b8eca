"""The parts of a recipe that other trainers say in much the same words: target modules, number formats, data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.foreign import Draft, Remark, Settings, short

ORIGINAL = {
    "c_attn": ("q_proj", "k_proj", "v_proj"), "attn.c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"), "attn.c_proj": ("o_proj",), "mlp.c_proj": ("down_proj",),
    "w1": ("up_proj",), "w2": ("gate_proj",), "mlp.w1": ("up_proj",), "mlp.w2": ("gate_proj",),
}  # fmt: skip
"""Linears of the original Qwen → the native ones that hold the same numbers (docs/qwen14b.md)."""
WHOLE = {"wte": "embed_tokens", "ln_f": "norm"}
_ALL = ("all", "all-linear", "all_linear", "ALL")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A data set as a recipe names it; ``columns``: the format's column → the one used there."""

    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    split: str = ""
    subset: str = ""
    revision: str = ""
    share: float | None = None

    def parts(self) -> dict[str, Any]:
        """What a source of a recipe says, without its defaults."""
        found = {
            "path": self.path, "format": self.format if self.format != "auto" else "", "columns": self.columns,
            "split": self.split if self.split != "train" else "", "subset": self.subset, "revision": self.revision,
            "share": self.share,
        }  # fmt: skip
        return {key: value for key, value in found.items() if value or key == "path"}


def base(draft: Draft) -> None:
    """The base model by the words that Hugging Face's own settings have for it."""
    settings = draft.settings
    if settings.has("model_name_or_path"):
        draft.put("model", settings.text("model_name_or_path"), "model_name_or_path")
    else:
        settings.fault("model_name_or_path", "missing", "name the base model")
    if settings.text("model_revision", "main") != "main":
        draft.put("revision", settings.text("model_revision"), "model_revision")


def targets(draft: Draft, key: str, names: Sequence[str], note: str = "") -> None:
    """``adapter.target_modules``: names of linears, those of the original Qwen by their native ones.

    ``note``: what all of them means.
    """
    if not names or any(name in _ALL for name in names):
        draft.put("adapter.target_modules", "all-linear", key, value=list(names) or "all", note=note)
        return
    if len(names) == 1 and set(names[0]) & set(".*\\|(^$[") and names[0] not in ORIGINAL:
        draft.put("adapter.target_modules", names[0], key, note="one pattern")
        return
    native = [one for name in names for one in ORIGINAL.get(name, (name,))]
    native = list(dict.fromkeys(native))
    note = "their native names" if native != list(names) else ""
    draft.put("adapter.target_modules", native, key, value=list(names), note=note)
    if any("c_attn" in name for name in names):
        draft.differs(key, "c_attn was one matrix there with one A for q, k and v; here each of the three has an A of "
                      "its own: the same updates and more can be learned")  # fmt: skip


def whole(draft: Draft, key: str, names: Sequence[str]) -> None:
    """Modules that are trained whole beside the adapter; then no rows of theirs are trained apart."""
    if names:
        native = [WHOLE.get(name.rpartition(".")[2], name) for name in names]
        draft.put("adapter.modules_to_save", native, key, value=list(names))
    draft.add("trainable_tokens", "none", "as there: nothing beside the adapter; auto also trains the rows of control "
              "tokens that the base never learned")  # fmt: skip


def number_formats(
    draft: Draft, weights: str, keys: Sequence[str], value: Any, *, double: bool = True, note: str = ""
) -> None:  # fmt: skip
    """``quantize.weights`` (and ``double``), from the keys that decided it."""
    draft.put("quantize.weights", weights, *keys, value=value, note=note)
    if weights in ("nf4", "fp4"):
        draft.add(
            "quantize.double", double, "block scales in 8 bits too" if double else "block scales in fp32, as there"
        )


def compute(draft: Draft, bf16: bool, fp16: bool, keys: Sequence[str], value: Any) -> None:
    """``quantize.compute``: the number format of the matrix products."""
    draft.put("quantize.compute", "bf16" if bf16 else "fp16" if fp16 else "fp32", *keys, value=value)
    if fp16 and not bf16:
        draft.differs(keys[-1], "fp16 scales the loss and skips the steps that overflow: how many were skipped is "
                                "not in "
                      "the file; bf16 has no such steps")  # fmt: skip


def train_rows(draft: Draft, origins: Sequence[Origin], *keys: str, note: str = "") -> None:
    """``data.train_path``, or ``data.sources`` where one path does not say it all."""
    if len(origins) == 1 and not set(origins[0].parts()) - {"path", "format", "columns"}:
        only = origins[0]
        draft.put("data.train_path", only.path, *keys, note=note)
        if only.format != "auto":
            draft.add("data.format", only.format, "as its declaration there says")
        if only.columns:
            draft.add("data.columns", only.columns, "the format's column: the one used here")
    elif origins:
        sources = [origin.parts() for origin in origins]
        draft.put("data.sources", sources, *keys, value=[origin.path for origin in origins], note=note)


def eval_rows(draft: Draft, origins: Sequence[Origin], key: str) -> None:
    """``data.eval_path``: a recipe has one."""
    if origins:
        first = origins[0]
        draft.put("data.eval_path", first.path, key)
        if first.split and first.split != "test":
            draft.add("data.eval_split", first.split, "the split that was judged on there")
    for extra in origins[1:]:
        draft.remarks.append(Remark("lost", key, f"{short(extra.path)}: a recipe judges on one data set: join them"))


def kept_back(draft: Draft, settings: Settings, key: str, tests: str | None) -> None:
    """Rows, or a share of them, that are judged on instead of trained on; ``tests``: the key that names others."""
    size = settings.number(key, 0.0)
    if size < 0:
        settings.fault(key, "must be a number of rows, or a share below 1")
    elif size and tests:
        settings.fault(key, f"cannot be given together with {tests}", "keep one")
    elif size and draft.course:
        draft.course.held, draft.course.held_key = size, key


def shape(columns: Sequence[str] | None) -> str:
    """What rows with these columns are, as TRL and the others tell: pairs, messages, text, or unknown ("")."""
    found = set(columns or ())
    if {"prompt", "completion"} <= found:
        return "pairs"
    if found & {"messages", "conversations"}:
        return "messages"
    return "text" if "text" in found else ""
