"""A recipe: the YAML file that says everything about a run, read into one frozen object.

``load`` refuses a bad recipe with *all* its faults, each with file, line, column, key and nearest legal word. Nothing
here imports torch, transformers or peft: a recipe is judged in a fraction of a second, before any model is touched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from finetune.errors import Fault, RecipeError
from finetune.recipe import adapter_fields, checks, editor_schema, judging, several, sources, wording
from finetune.recipe.section import Section
from finetune.recipe.sections import Adapter, Data, Evaluate, Objective, Quantize
from finetune.recipe.training import Train
from finetune.recipe.words import Finding

Scalar = str | int | float | bool


class Recipe(Section):
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
    objective: Objective = Objective()
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
        tree["adapter"] = {"method": adapter["method"], "start_from": adapter["start_from"], **adapter["fields"]}
        tree["objective"] = {"method": self.objective.method, **self.objective.settings()}
        return tree

    @property
    def unit_tokens(self) -> int:
        """The most tokens of what a step takes at once: a sample's, or both texts of a pair."""
        return self.train.max_length * (2 if self.objective.rows == "pairs" else 1)


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
        start = {key: value for key, value in tree["adapter"].items() if key == adapter_fields.START}
        method = tree["adapter"].get("method")
        named = method if isinstance(method, str) else adapter_fields.METHOD
        tree = {**tree, "adapter": {"method": named, "fields": fields, **start}}
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


def evaluation(overrides: Sequence[str] = (), metrics: Sequence[str] = ("loss", "exact_match")) -> Evaluate:
    """The section ``evaluate:`` alone, for a model without a recipe: these ``metrics``, and what is overridden.

    Raises ``RecipeError`` with every fault found.
    """
    tree: dict[str, Any] = {"evaluate": {"metrics": list(metrics)}}
    origins = sources.Origins()
    sources.override(tree, origins, overrides)
    made, errors = None, []
    try:
        made = Evaluate.model_validate(tree["evaluate"])
    except ValidationError as error:
        errors = [
            {**one, "loc": ("evaluate", *one["loc"])} for one in error.errors(include_url=False, include_context=False)
        ]
    faults = wording.word(errors, tree, origins, schema())
    faults += _further(tree, origins, list(judging.check(tree)), {fault.where for fault in faults})
    if faults or made is None:
        raise RecipeError.of(wording.in_order(faults))
    return made


def schema() -> dict[str, Any]:
    """JSON schema for editors: the recipe's keys with their meaning, ``extends``, and the installed PEFT's fields."""
    return editor_schema.build(Recipe.model_json_schema())


def schema_text() -> str:
    """The schema as the file that recipes name in their first line."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def flatten(recipe: Recipe) -> dict[str, Scalar]:
    """The resolved recipe as ``{"train.steps": 12, ...}``: trackers refuse nested values and lists."""
    flat: dict[str, Scalar] = {}
    _flatten_into(flat, "", recipe.to_yaml_dict())
    return flat


def _flatten_into(flat: dict[str, Scalar], prefix: str, tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            _flatten_into(flat, f"{name}.", value)
        elif isinstance(value, list | tuple | dict):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = "null" if value is None else value
