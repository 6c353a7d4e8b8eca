"""The folder that one publishes: weights, tokenizer, card, licence, notice, manifest, digests, a signature if asked.

Made whole or not at all, from a finished run's own files; nothing in it is claimed that the run has not recorded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune import (
    certify,
    checkpoint,
    ended,
    forms,
    gather,
    layouts,
    manifest,
    scores,
    seal,
    terms,
    trained,
    unfinished,
    verify,
)
from finetune.card import Card
from finetune.certify import Asked
from finetune.errors import EnvironmentFault, FinetuneError
from finetune.exporters import adapter
from finetune.prepare import Prepared
from finetune.recipe import flatten, yamlfile
from finetune.runfolder import RunFolder, json_bytes, read_json, write_synced
from finetune.terminal import ByteBar, Terminal
from finetune.terms import Terms

PARTS = {"merged": ("merged",), "adapter": ("adapter",), "both": ("merged", "adapter")}
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\ntokenizer.json filter=lfs diff=lfs merge=lfs -text\n"
"""Every repository on a hub has such a file. This one is among the digests; one that the hub makes would not be."""
_ADAPTER = (checkpoint.ADAPTER, checkpoint.CONFIG, checkpoint.PROVENANCE)


def release(
    run: Path, out: Path, what: str, terminal: Terminal, *, asked: Asked,
    data_licence: str | None = None, allow_unknown: bool = False, key: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the release ``out`` of a finished run; → where it is, and its manifest.

    Args:
        what: merged, adapter or both. asked: the kind of merge.
        data_licence: the licence of the data, where no text beside it says it.
        key: the private key to sign with.

    Raises:
        EnvironmentFault: a licence forbids it or is not known; something is in the way; the disk refuses.
        ModelError, FinetuneError: no finished run, or a merge that does not hold.
    """
    given = trained.of_run(run, terminal)
    assert given.run is not None
    prepared, files = given.run.prepared, given.run.folder
    found = terms.find(given.base, prepared.recipe.model, gather.training_sources(prepared.recipe), data_licence)
    terms.refuse(found, allow_unknown=allow_unknown)
    parts = PARTS[what]
    made_of = certify.made_of(given, asked) | {
        "parts": parts, "data_licence": data_licence, "signed": key is not None,
    }  # fmt: skip
    digest = manifest.digest_bytes(json_bytes(made_of))
    if out.exists() or out.is_symlink():
        _refuse_other(out, digest)
        terminal.say(f"{out} is this release already: nothing to do")
        return _told(out)
    with unfinished.folder(out, made_of, certify.KEPT) as temporary:
        merged: dict[str, Any] = {}
        if "merged" in parts:
            merged, reason = certify.make(given, temporary, asked, terminal)
            if reason:
                raise FinetuneError(reason, str(out), "nothing was released")
        if "adapter" in parts:
            _copy_adapter(files, temporary if parts == ("adapter",) else temporary / "adapter")
        if parts == ("adapter",):
            layouts.copy_tokenizer(given.base, temporary)
        made = _describe(prepared, files, (temporary, out.name), parts, found, {**merged, "asked": digest})
        seal.write(temporary, made, ByteBar.over(terminal, "digesting", temporary.rglob("*")).more)
        if key is not None:
            seal.sign(temporary, key)
    terminal.say(f"release: {out}   check it: finetune verify {out}, or sha256sum -c SHA256SUMS inside it")
    return _told(out)


def _told(out: Path) -> dict[str, Any]:
    return {"out": str(out), "manifest": read_json(out / verify.MANIFEST)}


def _refuse_other(out: Path, asked: str) -> None:
    """Raise EnvironmentFault where what is there is anything but the release that was ``asked`` for, whole."""
    made = read_json(out / verify.MANIFEST) if out.is_dir() else None
    provenance = made.get("provenance") if isinstance(made, dict) else None
    if not isinstance(provenance, dict) or provenance.get("asked") != asked:
        raise EnvironmentFault("something is there already", str(out), "give another --out, or remove it")
    if faults := verify.faults(out):
        raise EnvironmentFault(f"this release is there, but {faults[0]}", str(out), "remove it and release again")


def _copy_adapter(files: RunFolder, to: Path) -> None:
    to.mkdir(exist_ok=True)
    for name in _ADAPTER:
        shutil.copyfile(files.adapter / name, to / name)


def _describe(
    prepared: Prepared, files: RunFolder, to: tuple[Path, str], parts: tuple[str, ...], found: Terms, merged: Any
) -> dict[str, Any]:
    """Licence, notice and card; → the release's provenance."""
    recipe, (folder, name) = prepared.recipe, to
    identity = read_json(files.identity)
    made = {
        "base": {"name": recipe.model, "commit": prepared.commit, "sha256": identity["base"]},
        "data": identity["data"],
        **({"begun_from": identity["start"]} if identity.get("start") else {}),
        "recipe": flatten(recipe),
        "environment": identity["environment"],
        "resolved": identity["resolved"],
        "rope": recipe.rope,
        "merge": {
            key: merged[key] for key in ("base_choice", "choices", "layout", "proof", "quantised_as") if key in merged
        },
        "scores": scores.read(files),
        "licence": found.licence.id if found.licence else "unknown",
        "asked": merged["asked"],
    }
    changes = [f"- {line}" for line in _changes(recipe.model, parts, merged)]
    terms.write(found, folder, changes)
    tokenizer = read_json(folder / "tokenizer_config.json") or {}
    card = Card(
        name=name, terms=found, parts=parts, recipe=yamlfile.dump(recipe.to_yaml_dict()), scores=scores.read(files),
        provenance=made, thinking=recipe.data.thinking, vllm_rank=_vllm_rank(files) if "adapter" in parts else 0,
        end=tuple(ended.sentences(ended.end(files))), score=_score(prepared),
        chat=(folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template")),
    )  # fmt: skip
    write_synced(folder / "README.md", card.text().encode())
    write_synced(folder / ".gitattributes", _ATTRIBUTES)
    return made


def _score(prepared: Prepared) -> tuple[str, int] | None:
    """Of a reward model, the token that its texts end with and the id that pads them."""
    base = prepared.base
    return (base.stop_token, layouts.padding(base)[1]) if base and base.shape.scored else None


def _vllm_rank(files: RunFolder) -> int:
    """The adapter's largest rank, 0 where vLLM could not load it or would scale it otherwise."""
    read = checkpoint.read_adapter(files.adapter)
    if read.config.get("use_rslora") or adapter.refusals(read.config, read.weights, "vllm"):
        return 0
    return adapter.vllm_rank(read.weights)


def _ground(merged: dict[str, Any]) -> str:
    """What the adapter was folded into."""
    word = str(merged.get("quantised_as"))
    if merged["base_choice"] != "replayed" or not forms.is_packed(word):
        return "as published"
    return f"as published in {word}, dequantised" if word in forms.STORED else f"as quantised for training ({word})"


def _changes(base: str, parts: tuple[str, ...], merged: dict[str, Any]) -> list[str]:
    lines = []
    if "merged" in parts:
        said = _ground(merged)
        said += ", corrected towards the quantised form" if merged["base_choice"] == "corrected" else ""
        lines.append(f"a LoRA adapter was trained on {base} and folded into its weights, {said}: *.safetensors")
        lines.append("config.json and generation_config.json name what this model needs; other files are the base's")
    if "adapter" in parts:
        lines.append(f"a LoRA adapter for {base} was added: adapter_model.safetensors, adapter_config.json")
    return lines
