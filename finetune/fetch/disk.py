"""What of the hub is on this disk already: huggingface_hub's cache, and folders that ModelScope made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from finetune.headers import INDEX, SINGLE

_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_FORMS = ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
"""(index, single file) of each form of weights that can be read; pickles only where there is no safetensors."""
_SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)", re.ASCII)
_SMALL = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "qwen.tiktoken", "chat_template.jinja",
}  # fmt: skip
_LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|Notice|USE_POLICY)[\w-]*(\.(md|txt|rst|pdf))?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether the hub could have a repository of this name: ``owner/name``."""
    return _ID.fullmatch(name) is not None and not re.search(r"--|\.\.|\.git$", name)


def cache() -> Path:
    """huggingface_hub's cache as the environment names it now; the library read it once, when it was imported."""
    env = os.environ
    above = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    named = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{above}/hub"
    return Path(os.path.expandvars(named)).expanduser()


def home(repo: str) -> Path:
    """The repository's folder in the cache: blobs/, snapshots/, refs/."""
    return cache() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, revision: str) -> Path | None:
    """The cache's folder for a revision, whole or not."""
    if not is_hub_id(repo) or not REVISION.fullmatch(revision):
        return None
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (home(repo) / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            return None
    folder = home(repo) / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def modelscope(repo: str) -> Iterator[Path]:
    """Where ModelScope may have put a model. Its versions have four layouts, most with dots written as ``___``."""
    if not is_hub_id(repo):
        return
    root = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    owner, name = repo.split("/")
    for parent in (root / "hub" / "models", root / "hub", root / "models", root):
        for written in dict.fromkeys((name.replace(".", "___"), name)):
            if (parent / owner / written).is_dir():
                yield parent / owner / written


def is_whole(folder: Path) -> bool:
    """Whether config.json and all weights are there."""
    names = names_in(folder)
    found = weights(names, folder)
    return bool(found) and {"config.json", *found} <= names


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}  # a link whose blob is gone is no file


def small(names: set[str]) -> list[str]:
    """The names of configuration, tokenizer and licence files among ``names``: no code, no other format."""
    return sorted(name for name in names if name in _SMALL or _LEGAL.fullmatch(name))


def index_of(names: set[str]) -> str | None:
    """The index that names the weights' shards, where they have one."""
    for index, single in _FORMS:
        if index in names or single in names:
            return index if index in names else None
    return None


def weights(names: set[str], folder: Path) -> list[str]:
    """The weight files and their index, which lies in ``folder``; empty where there are none that can be read."""
    index = index_of(names)
    if index is None:
        return [single for _, single in _FORMS if single in names][:1]
    try:
        shards = sorted(set(json.loads((folder / index).read_bytes())["weight_map"].values()))
        return [index, *shards] if all(map(_SHARD.fullmatch, shards)) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
