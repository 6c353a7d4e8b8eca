"""The small files of a model folder in one layout or the other: config, tokenizer, template, licence, and the record
of the original layout that a native folder keeps so that the way back is exact.

A native folder is what plain transformers loads. The files of the original layout lie in its sub-folder ``original/``
as they were; its Python files among them are only ever copied, never run.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from finetune import headers, tiktoken_file
from finetune.base import HEADERS, ORIGIN, Base
from finetune.errors import ModelError
from finetune.families import qwen1
from finetune.headers import INDEX
from finetune.runfolder import json_bytes, read_json, write_synced
from finetune.tokens import VOCABULARY

NAMES = ("native", "original")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)(\.index\.json)?$")
_NOT_COPIED = {"digests.json", "README.md", "manifest.json", "finetune.json", "config.json", "generation_config.json"}
_ORIGINAL_ONLY = {VOCABULARY, "tokenizer_config.json"}


def write(base: Base, out: Path, layout: str, *, trained: bool = False) -> None:
    """Everything of a model folder but its weights and its card. ``trained``: the model has learned its template.

    Raises:
        ModelError: the folder was never in the original layout.
    """
    if layout == "original":
        _write_original(base, out)
        if trained:
            _say_chat(out)
    else:
        _write_native(base, out, trained)


def refuse_impossible(base: Base, layout: str) -> None:
    """Raise ModelError where this base cannot be written in that layout."""
    if layout == "original" and base.shape.scored:
        what = "the original Qwen layout has no place for a score head"
        raise ModelError(what, str(base.folder), "write it in the native layout")
    if layout == "original" and base.origin is None:
        what = "this model never had the original Qwen layout"
        raise ModelError(what, str(base.folder), "write it in the native layout")
    if layout == "native" and base.config.get("logn_from"):
        what = "logn attention cannot be expressed in the native layout: plain transformers and GGUF would leave it out"
        raise ModelError(what, str(base.folder), "write the original layout (--layout original)")


def _write_native(base: Base, out: Path, trained: bool) -> None:
    config = {key: value for key, value in base.config.items() if key not in ("auto_map", "logn_from")}
    if not base.shape.scored:
        write_synced(out / "generation_config.json", json_bytes(generation(base, trained=trained)))
    taken = _ORIGINAL_ONLY if base.layout == "original" else set()
    for path in _small_files(base.folder):
        if path.name not in _NOT_COPIED | taken:
            shutil.copyfile(path, out / path.name)
    if base.layout == "native":
        if base.origin is not None:
            (out / ORIGIN).mkdir()
            for path in sorted((base.folder / ORIGIN).iterdir()):
                if path.is_file() and (path.name == INDEX or not _WEIGHTS.match(path.name)):
                    shutil.copyfile(path, out / ORIGIN / path.name)
        _write_config(config, base, out)
        return
    write_tokenizer(base, out)
    _write_config(config, base, out)
    (out / ORIGIN).mkdir()
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and (path.name == INDEX or not _WEIGHTS.match(path.name)):
            shutil.copyfile(path, out / ORIGIN / path.name)
    headers_of = {shard: headers.text(base.folder / shard).decode() for shard in base.shards}
    write_synced(out / ORIGIN / HEADERS, json_bytes(headers_of))


def _write_config(config: dict[str, Any], base: Base, out: Path) -> None:
    """The config; of a reward model with the token that pads, in the tokenizer's settings too."""
    if base.shape.scored:
        token, identifier = padding(base)
        config = config | {"pad_token_id": identifier}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            stored = read_json(out / name)
            if isinstance(stored, dict) and ("pad_token" in stored or name == "tokenizer_config.json"):
                write_synced(out / name, json_bytes(stored | {"pad_token": token}))
    write_synced(out / "config.json", json_bytes(config))


def padding(base: Base) -> tuple[str, int]:
    """(token, id) that a reward model's texts are padded with: not the stop token that they end with.

    transformers reads a score at the last token that is none of padding: where both are one, as in SmolLM2, it would
    pass the stop token over.
    """
    if not (base.folder / "tokenizer.json").is_file():
        first = len(tiktoken_file.read_ranks(base.folder / VOCABULARY))
        return tiktoken_file.END, first + tiktoken_file.SPECIALS.index(tiktoken_file.END)
    entries = json.loads((base.folder / "tokenizer.json").read_bytes())["added_tokens"]
    settings = read_json(base.folder / "tokenizer_config.json")
    named = settings.get("pad_token") if isinstance(settings, dict) else None
    named = named.get("content") if isinstance(named, dict) else named
    others = {str(one["content"]): int(one["id"]) for one in entries if one["content"] != base.stop_token}
    token = next((one for one in (named, tiktoken_file.END) if one in others), next(iter(others), ""))
    if not token:
        what = "the tokenizer has no token beside its stop token, which a reward model's texts could be padded with"
        raise ModelError(what, str(base.folder / "tokenizer.json"), "take a base with a padding token")
    return token, others[token]


def write_tokenizer(base: Base, out: Path) -> None:
    """The native tokenizer files of a folder in the original layout: its own, or made from its vocabulary file."""
    settings = read_json(base.folder / "tokenizer_config.json")
    settings = settings if isinstance(settings, dict) else {}
    if not (base.folder / "tokenizer.json").is_file():
        if (base.folder / VOCABULARY).is_file():
            tiktoken_file.write(
                out, base.folder / VOCABULARY, vocab_rows=base.shape.vocab,
                max_length=base.shape.max_positions, chat=is_chat(base),
            )  # fmt: skip
        return
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, out / name)
    if not settings.get("chat_template") and not (out / "chat_template.jinja").is_file():
        write_synced(out / "chat_template.jinja", tiktoken_file.CHAT_TEMPLATE.encode())
    settings = {key: value for key, value in settings.items() if key not in ("auto_map", "tokenizer_class")}
    write_synced(out / "tokenizer_config.json", json_bytes(settings | {"tokenizer_class": "Qwen2Tokenizer"}))


def copy_tokenizer(base: Base, out: Path) -> None:
    """The native tokenizer files alone: what an adapter's user needs to write the prompts that it was trained on."""
    if base.layout != "native":
        write_tokenizer(base, out)
        return
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, out / name)


def is_chat(base: Base) -> bool:
    """Whether the model was published as one that chats."""
    where = base.folder if base.layout == "original" else base.folder / ORIGIN
    stored = read_json(where / "generation_config.json")
    return isinstance(stored, dict) and stored.get("chat_format") == "chatml"


def generation(base: Base, *, trained: bool = False) -> dict[str, Any]:
    """How the model is asked and where it ends: the family's stop token first, then what the folder names.

    An original base that was published for plain text ends where its folder says, until it is ``trained`` to talk.
    """
    stored = read_json(base.folder / "generation_config.json")
    stored = stored if isinstance(stored, dict) else {}
    if base.layout == "original":
        known = ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "eos_token_id", "pad_token_id")
        stored = {key: value for key, value in stored.items() if key in known and value is not None}
        for key in ("eos_token_id", "pad_token_id"):
            if isinstance(stored.get(key), int) and stored[key] >= base.shape.vocab:
                del stored[key]
    ends = stored.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    stop = stop_id(base)
    if stop is not None and (trained or base.layout != "original" or is_chat(base)):
        ends = [stop, *[end for end in ends if end != stop]]
    return stored | ({"eos_token_id": ends} if ends else {})


def stop_id(base: Base) -> int | None:
    """The id of the base's stop token."""
    path = base.folder / "tokenizer.json"
    if path.is_file():
        entries = json.loads(path.read_bytes()).get("added_tokens", [])
        ids: list[int] = [int(entry["id"]) for entry in entries if entry["content"] == base.stop_token]
        return ids[0] if ids else None
    if base.stop_token and (base.folder / VOCABULARY).is_file():
        first = len(tiktoken_file.read_ranks(base.folder / VOCABULARY))
        return first + tiktoken_file.SPECIALS.index(base.stop_token)
    return None


def _write_original(base: Base, out: Path) -> None:
    refuse_impossible(base, "original")
    assert base.origin is not None
    source = base.folder if base.layout == "original" else base.folder / ORIGIN
    rewritten = {"config.json", "finetune.json", HEADERS}
    for path in sorted(source.iterdir()):
        if path.is_file() and not _WEIGHTS.match(path.name) and path.name not in rewritten:
            shutil.copyfile(path, out / path.name)
    changed = qwen1.original_config(base.origin, base.config.get(qwen1.RECORD))
    config = (source / "config.json").read_bytes() if changed == base.origin else json_bytes(changed)
    write_synced(out / "config.json", config)


def _say_chat(out: Path) -> None:
    """The original's own code answers in turns only where its generation config says so; a base's does not."""
    stored = read_json(out / "generation_config.json")
    stored = stored if isinstance(stored, dict) else {}
    if stored.get("chat_format") != "chatml":
        write_synced(out / "generation_config.json", json_bytes(stored | {"chat_format": "chatml"}))


def _small_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not _WEIGHTS.match(path.name) and path.suffix != ".py"
    ]
