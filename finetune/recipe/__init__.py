"""A recipe: the YAML file that says everything about a run, read into one frozen object.

``load`` refuses a bad recipe with *all* its faults, each with file, line, column, key and nearest legal word. Nothing
here imports torch, transformers or peft: a recipe is judged in a fraction of a second, before any model is touched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.errors import Fault, RecipeError
from finetune.recipe import adapter_fields, checks, editor_schema, several, sources, wording
from finetune.recipe.flat import flatten as flatten
from finetune.recipe.words import Finding

_LIMIT = 10_000_000  # steps, rows: beyond this a number is a slip of the finger

Positive = Annotated[int, Field(ge=1, le=_LIMIT)]
Count = Annotated[int, Field(ge=0, le=_LIMIT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Section(BaseModel):
    """Frozen, strict (no text taken for a number, no bool for an int), and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Quantize(_Section):
    """How the frozen base weights are held while training."""

    weights: Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"] = Field(
        description="number format of the frozen base weights"
    )
    double: bool = Field(
        default=True, description="nf4/fp4: store the block scales in 8 bits too (about 0.4 bits a weight less)"
    )
    compute: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="number format of the matrix products"
    )


class Adapter(_Section):
    """A PEFT method and that method's own fields, PEFT's defaults filled in."""

    method: str = Field(description="PEFT method")
    fields: dict[str, Any] = Field(description="the method's own PEFT field names")


Format = Literal["auto", "alpaca", "chat", "completion", "kto", "preference", "sharegpt", "text"]


class DataSource(_Section):
    """One of several places that rows come from."""

    path: str = Field(description="a file, a folder, or a data set's id on the hub")
    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="share of the trained tokens that come from here; all shares together are 1"
    )
    format: Format = Field(default="auto", description="layout of a row; auto looks at the columns")
    columns: dict[str, str] = Field(default={}, description="the format's column name → the one used here")
    split: str = Field(default="train", description="split of a folder or of a data set on the hub")
    subset: str | None = Field(default=None, description="configuration of a data set on the hub")
    revision: str | None = Field(default=None, description="branch, tag or commit of a data set on the hub")


class Data(_Section):
    """Where the rows come from, and what of them is trained."""

    train_path: str | None = Field(
        default=None, description="rows to train on: a file, a folder, or a data set's id on the hub; or use sources"
    )
    sources: list[DataSource] = Field(default=[], description="several places with rows to train on; or use train_path")
    eval_path: str | None = Field(
        default=None, description="rows to judge on: a file, a folder, or a data set's id; or use eval_fraction"
    )
    eval_split: str = Field(default="test", description="split of eval_path, where that is a folder or on the hub")
    eval_fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="share of the training rows to hold out and judge on, between 0 and 1; or use eval_path",
    )
    format: Format = Field(default="auto", description="layout of a row; auto looks at the columns")
    columns: dict[str, str] = Field(default={}, description="the format's column name → the one used in the files")
    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="what is in the loss: every assistant turn, the last one of a row, or every token of it",
    )
    thinking: Literal["keep", "strip", "mask"] = Field(
        default="keep",
        description="reasoning in answers: as the template renders it, taken out, or read but not in the loss",
    )
    literal_tokens: list[str] = Field(
        default=[], description="special tokens that may stand in a content as text; there they control nothing"
    )
    over_length: Literal["error", "drop", "truncate_turns", "split"] = Field(
        default="error",
        description="rows longer than train.max_length: refused, left out, cut by whole turns from the front, or split",
    )


class Train(_Section):
    """How long, how fast, how much at a time."""

    steps: Positive | None = Field(default=None, description="optimizer steps; or use epochs")
    epochs: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = Field(
        default=None, description="passes over the training rows; or use steps"
    )
    examples_per_step: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="rows in one optimizer step, all devices together; or use tokens_per_step"
    )
    tokens_per_step: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None, description="tokens in one optimizer step, all devices together; or use examples_per_step"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="shape of the learning rate after warmup"
    )
    warmup: Count = Field(default=0, description="steps over which the learning rate rises from 0 to its peak")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lora_fa", "riemannian"] = Field(
        default="adamw", description="what turns gradients into updates, see docs/training.md"
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="LoRA+: the learning rate of LoRA's B matrices times this; null means one rate"
    )
    weight_decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.0, description="decoupled weight decay of the adapter"
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = Field(
        default=1.0, description="gradients are scaled down to this 2-norm"
    )
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(description="longest example, in tokens")
    micro_batch_tokens: Annotated[int, Field(ge=8, le=100_000_000)] | Literal["auto"] = Field(
        default="auto", description="tokens that go through the model at once on one device; auto fits the memory"
    )
    recompute: Literal["auto", "none", "layers"] = Field(
        default="auto", description="recompute activations layer by layer in the backward pass to save memory"
    )
    save_every: Positive = Field(default=50, description="steps between checkpoints")
    keep_last: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=2, description="checkpoints kept; older ones are removed"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed of data order, adapter start and dropout"
    )
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="processes that prepare rows; 0 means none extra"
    )


class Evaluate(_Section):
    """How the result is judged."""

    metrics: Annotated[list[Literal["loss", "exact_match"]], Field(min_length=1)] = Field(
        default=["loss"], description="what is measured on the held-out rows"
    )
    every: Count = Field(default=0, description="steps between evaluations; 0 means only at the start and the end")
    rows: Positive | None = Field(default=None, description="held-out rows used, from the first; null means all")
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        default=64, description="longest generated answer, in tokens"
    )
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = Field(default=32, description="rows judged at once")


class Recipe(_Section):
    """Everything a run depends on besides the machine, the base weights and the data files."""

    model: str = Field(description="base model: a folder, or a model's id on the hub")
    revision: str | None = Field(default=None, description="branch, tag or commit of a model on the hub")
    rope: (
        Literal["plain", "plain+logn", "bucket-4096", "bucket-4096+logn", "bucket-8192", "bucket-8192+logn"] | None
    ) = Field(
        default=None,
        description="original Qwen beyond its 2048 tokens: one choice for training, evaluation and export",
    )
    quantize: Quantize
    adapter: Adapter
    trainable_tokens: Literal["auto", "none"] | list[str] = Field(
        default="auto",
        description="tokens whose rows of embedding and head are trained too; auto takes those of the template that "
        "the base never learned",
    )
    data: Data
    train: Train
    evaluate: Evaluate = Evaluate()
    tracker: Literal["trackio", "wandb", "tensorboard", "mlflow", "none"] = Field(
        default="trackio", description="where curves go, besides the run folder's own metrics file"
    )
    output: str = Field(description="the run folder")

    def to_yaml_dict(self) -> dict[str, Any]:
        """The recipe as plain values with every default filled in; written as YAML it loads to an equal recipe."""
        tree = self.model_dump()
        adapter = tree["adapter"]
        tree["adapter"] = {"method": adapter["method"], **adapter["fields"]}
        return tree


class Located(NamedTuple):
    """A recipe together with where each of its keys was written; ``name``: which of several adapters it is."""

    recipe: Recipe
    origins: sources.Origins
    name: str = ""

    def where(self, key: str) -> str:
        """``file:line:column: key`` (or ``--set key``), for faults that only a later step can see."""
        return self.origins.where(tuple(key.split(".")))


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its ``extends:`` chain and ``--set`` overrides.

    Raises ``RecipeError`` with every fault found.
    """
    return locate(path, overrides).recipe


def locate(path: Path, overrides: Sequence[str] = ()) -> Located:
    """``load``, and where each key was written. Raises ``RecipeError`` with every fault found."""
    found = locate_all(path, overrides)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        where = found[0].origins.where((several.KEY,))
        raise RecipeError(
            f"this asks for one run, the recipe has {names}", where, f"take one: --set {several.KEY}=NAME"
        )
    return found[0]


def locate_all(path: Path, overrides: Sequence[str] = ()) -> list[Located]:
    """The runs of a recipe: one, or one for each of its ``adapters:``, by name.

    Raises ``RecipeError`` with every fault found.
    """
    try:
        variants = several.read(path, overrides, lambda: schema()["properties"])
    except RecipeError as error:
        raise RecipeError.of(wording.in_order(error.faults)) from None
    judged = [(one, *_judged(one.tree, one.origins)) for one in variants]
    if faults := several.faults([(one.name, found) for one, _, found in judged]):
        raise RecipeError.of(wording.in_order(faults))
    return [Located(recipe, one.origins, one.name) for one, recipe, _ in judged if recipe is not None]


def _judged(tree: dict[str, Any], origins: sources.Origins) -> tuple[Recipe | None, list[Fault]]:
    """A tree's recipe, if its keys have their types, and everything wrong with it."""
    section = tree.get("adapter")
    fields, findings = adapter_fields.check(section) if isinstance(section, dict) else ({}, [])
    recipe, errors = _validated(tree, fields)
    findings = [finding._replace(path=("adapter", *finding.path)) for finding in findings]
    faults = list(origins.secrets)
    if errors or findings:
        faults += wording.word(errors, tree, origins, schema())
    faults += _further(tree, origins, [*findings, *checks.check(tree)], {fault.where for fault in faults})
    return recipe, faults


def _validated(tree: dict[str, Any], fields: dict[str, Any]) -> tuple[Recipe | None, list[Any]]:
    """The models' verdict; PEFT's own fields were judged before and travel as one value."""
    if isinstance(tree.get("adapter"), dict):
        tree = {**tree, "adapter": {"method": adapter_fields.METHOD, "fields": fields}}
    try:
        return Recipe.model_validate(tree), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False, include_context=False, include_input=False))


def _further(
    tree: dict[str, Any], origins: sources.Origins, findings: Sequence[Finding], taken: set[str]
) -> list[Fault]:
    """Findings as faults, save for keys that have one already and keys that are only missing because misspelt."""
    findings = list(findings)
    if not findings:
        return []
    shape = schema()
    meant = wording.meanings(wording.unknown_keys(tree, shape), shape)
    faults: dict[str, Fault] = {}
    echoes: dict[str, Fault] = {}
    for path, what, fix in findings:
        where = origins.where(path)
        echo = where in taken or (path in meant and what.startswith("missing"))
        (echoes if echo else faults).setdefault(where, Fault(what, where, fix))
    # Were nothing else wrong, an echo would have no source: then it is the fault.
    return list(faults.values()) or ([] if taken else list(echoes.values()))


def schema() -> dict[str, Any]:
    """JSON schema for editors: the recipe's keys with their meaning, ``extends``, and the installed PEFT's fields."""
    return editor_schema.build(Recipe.model_json_schema())


def schema_text() -> str:
    """The schema as the file that recipes name in their first line."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
