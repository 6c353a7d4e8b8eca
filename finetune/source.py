"""Where a recipe's base is: a folder, a model of the hub that is on this disk, or one that must be fetched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from finetune import families, fetch, forms
from finetune.decoder import DecoderShape
from finetune.errors import ModelError
from finetune.families import qwen1
from finetune.known_models import KnownModel
from finetune.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Source:
    """A base's folder on this disk; ``commit`` where it came from the hub."""

    folder: Path
    commit: str | None = None
    notes: tuple[str, ...] = ()


def find(name: str, revision: str | None) -> Source | None:
    """The base's folder, without asking the network; None where it is not on this disk."""
    if Path(name).is_dir():
        return Source(folder=Path(name))
    found = fetch.local(name, revision) if fetch.is_hub_id(name) else None
    if found is None:
        return None
    note = f"{name} from {found.origin}" + (f" at commit {found.commit}" if found.commit else "")
    return Source(folder=found.folder, commit=found.commit or None, notes=(note,))


def bring(name: str, revision: str | None, terminal: Terminal) -> None:
    """Fetch a model of the hub into its cache.

    Raises:
        ModelError: the name is no model of the hub, or what came is damaged.
        EnvironmentFault: no access, connection or room.
    """
    if not fetch.is_hub_id(name):
        fix = "fetch it (for the shipped recipes: make base, make tiny-base) and name its folder in `model:`"
        raise ModelError("the model is not on this disk", name, fix)
    fetch.fetch(name, revision, terminal)


def reach_of(known: KnownModel, rope: str | None) -> int | None:
    """How far a known original Qwen reaches under the choice; None for other models."""
    if known.seq_length is None:
        return None
    return qwen1.rope_choice(_NUMBERS | {"seq_length": known.seq_length, "kv_channels": known.head_dim}, rope).longest


_NUMBERS = {"rotary_emb_base": 10000.0, "max_position_embeddings": 8192}


def remote_shape(name: str, revision: str | None, rope: str | None) -> tuple[DecoderShape, int | None]:
    """(shape, reach of an original Qwen) of a model on the hub, from its config.json alone.

    Raises:
        ModelError: no family of ours, or numbers missing.
        EnvironmentFault: the hub cannot be asked.
    """
    where = f"{name}: config.json"
    stored = fetch.config(name, revision)
    families.get(stored.get("model_type", ""), where)
    original = stored.get("model_type") == qwen1.MODEL_TYPE
    try:
        config = qwen1.native_config(stored, rope, "bfloat16") if original else stored
        shape = replace(DecoderShape.from_config(config), packing=forms.packing_of(stored, where))
        return shape, config["max_position_embeddings"] if original else None
    except KeyError as error:
        raise ModelError(f"it has no {error}", where, "name another model") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"it holds a number that cannot be: {error}", where, "name another model") from None
