"""The adapter that a run begins from (``adapter.start_from``): found, and judged before anything loads.

A finished run's, or a bare adapter folder in PEFT's format. It must be of the same base, method and shape as the recipe
asks for, so that going on with it is going on with the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import manifest
from finetune.errors import Fault, ModelError, RecipeError
from finetune.recipe import Located
from finetune.runfolder import RunFolder, read_json

WEIGHTS, CONFIG, PROVENANCE = "adapter_model.safetensors", "adapter_config.json", "finetune.json"
KEY = "adapter.start_from"
_LARGE = (".safetensors", ".bin")
_BY_NAME = ("target_modules", "exclude_modules", "modules_to_save")
"""Lists of names whose order says nothing."""
_FREE = ("lora_dropout", "init_lora_weights")
"""Fields that a run may change: they are no part of what an adapter is."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """An adapter folder with the sha-256 of its weights. ``base``: of the base's files, where the folder says so."""

    folder: Path
    digests: Mapping[str, str]
    base: Mapping[str, str] | None

    def refuse_other_base(self, digests: Mapping[str, str]) -> None:
        """Raise ModelError where it was trained on other weights than the run's base."""
        if self.base is not None and dict(self.base) != dict(digests):
            raise self._of_another_base()

    def refuse_other_files(self, base: Path) -> None:
        """The same by the base's small files alone, which a plan has time for. Raises ModelError."""
        for name, digest in (self.base or {}).items():
            known = not name.endswith(_LARGE) and (base / name).is_file()
            if known and manifest.digest(base / name) != digest:
                raise self._of_another_base()

    def _of_another_base(self) -> ModelError:
        what = "this adapter was trained on another base"
        return ModelError(what, str(self.folder), "set model: to that base, or begin from another adapter")


def find(located: Located, fields: Mapping[str, Any], base: Path | None = None) -> Start | None:
    """The adapter that the recipe names, whole and of the shape of ``fields``; None where it names none.

    ``base``: the folder of the run's base, where it is here.

    Raises:
        RecipeError: nothing is there, or an adapter of another shape, with each field that differs.
        ModelError: the run is not finished, or the adapter is damaged, or it was trained on another base.
    """
    name = located.recipe.adapter.start_from
    if name is None:
        return None
    folder, where = adapter_folder(Path(name), located.where(KEY)), located.where(KEY)
    config = whole(folder)
    if config.get("peft_type") != "LORA":
        what = f"{name} is an adapter of the method {config.get('peft_type')!r}"
        raise RecipeError(what, where, "begin from a LoRA adapter")
    _refuse_other_shape(located, config, fields)
    made = read_json(folder / PROVENANCE)
    over = made.get("base_sha256") if isinstance(made, dict) else None
    found = Start(
        folder=folder, digests={WEIGHTS: manifest.digest(folder / WEIGHTS)},
        base=over if isinstance(over, dict) else None,
    )  # fmt: skip
    if base is not None:
        found.refuse_other_files(base)
    return found


def whole(folder: Path) -> dict[str, Any]:
    """PEFT's config of an adapter's folder, none of whose files is damaged. Raises ModelError."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not (folder / WEIGHTS).is_file():
        raise ModelError(f"{CONFIG} or {WEIGHTS} is missing or damaged", str(folder), "train it again, or fetch it")
    if faults := manifest.faults(folder) if (folder / manifest.NAME).is_file() else []:
        raise ModelError(faults[0], str(folder), "train it again, or take it from a backup")
    return config


def adapter_folder(path: Path, where: str) -> Path:
    """The adapter's own folder. Raises RecipeError, ModelError."""
    if (path / CONFIG).is_file():
        return path
    run = RunFolder(path)
    if not path.exists():
        raise RecipeError(f"there is no {path}", where, "name the folder of a finished run, or of an adapter")
    if not run.identity.is_file():
        raise RecipeError(f"{path} is no finished run and no adapter", where, "name the folder of one")
    if not run.finished.is_file():
        raise ModelError("this run is not finished", str(path), "finish it first: `finetune train` with its recipe")
    return run.adapter


def _refuse_other_shape(located: Located, config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    faults = []
    for key in sorted({*fields} - {*_FREE}):
        ours, theirs = _plain(key, fields[key]), _plain(key, config.get(key))
        if ours != theirs:
            what = f"the adapter to begin from has {theirs!r}, this recipe {ours!r}"
            place = "trainable_tokens" if key == "trainable_token_indices" else f"adapter.{key}"
            faults.append(Fault(what, located.where(place), "make them alike, or begin from another adapter"))
    if "trainable_token_indices" not in fields and config.get("trainable_token_indices"):
        what = "the adapter to begin from trains rows of embedding or head, this recipe none"
        faults.append(Fault(what, located.where("trainable_tokens"), "name the same tokens"))
    if faults:
        raise RecipeError.of(faults)


def _plain(key: str, value: Any) -> Any:
    """A field as it can be compared: nothing, an empty collection and PEFT's null are one."""
    if isinstance(value, list | tuple | set) and key in _BY_NAME:
        value = sorted(value)
    return value or None
