"""Do a base's tokenizer, template and stop token fit its weights? Judged from the files' JSON, without loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune import tiktoken_file
from finetune.errors import Fault, ModelError
from finetune.families import qwen1

VOCABULARY = "qwen.tiktoken"


def is_there(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / VOCABULARY).is_file()


def judge(folder: Path, rows: int, stops: tuple[str, ...], layout: str) -> tuple[str, list[Fault]]:
    """(the stop token that ends a turn here, what is wrong with tokenizer and template). ``rows``: of the embedding."""
    path = folder / "tokenizer.json"
    if layout == "original" and not path.is_file():
        return _original(folder, rows, stops)
    try:
        tokenizer = json.loads(path.read_bytes())
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        added = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens", [])}
        vocabulary = tokenizer["model"]["vocab"]
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))), *added.values()]
        highest = max(map(int, ids), default=-1)
        template = settings.get("chat_template") or (folder / "chat_template.jinja").is_file()
    except FileNotFoundError as error:
        return "", [Fault(f"no {Path(str(error.filename)).name}", str(folder), "fetch the model's tokenizer files")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return "", [Fault(f"the tokenizer cannot be read: {error}", str(path), "fetch it again")]
    faults = []
    if highest >= rows:
        what = f"the tokenizer knows id {highest} but the model has only {rows} embedding rows"
        faults.append(Fault(what, str(path), "tokenizer and weights belong to two models"))
    if not template and layout != "original":  # which has none, and gets the one that it was trained with
        fix = "use the chat or instruct form of the model"
        faults.append(Fault("no chat template", str(folder / "tokenizer_config.json"), fix))
    return _stop(added, stops, path, faults)


def _stop(added: dict[str, Any], stops: tuple[str, ...], path: Path, faults: list[Fault]) -> tuple[str, list[Fault]]:
    stop = next((token for token in stops if token in added), "")
    if not stop:
        what = f"none of the family's stop tokens ({', '.join(stops)}) is in the tokenizer"
        faults.append(Fault(what, str(path), "a model trained without a stop token never ends its answer"))
    return stop, faults


def _original(folder: Path, rows: int, stops: tuple[str, ...]) -> tuple[str, list[Fault]]:
    """The original's vocabulary file is the tokenizer: its published digest where the model is a published one."""
    path = folder / VOCABULARY
    if not path.is_file():
        return "", [Fault(f"neither {VOCABULARY} nor tokenizer.json", str(folder), "fetch the model's tokenizer files")]
    try:
        ranks = tiktoken_file.read_ranks(path)
    except ModelError as error:
        return "", list(error.faults)
    if rows > qwen1.PUBLISHED_VOCABULARY and not tiktoken_file.is_published(path):
        what = "this is not the published vocabulary file (its digest differs)"
        return "", [Fault(what, str(path), "fetch it again from the model's page")]
    first = len(ranks)
    if first > rows:
        what = f"the vocabulary has {first} tokens but the model has only {rows} embedding rows"
        return "", [Fault(what, str(path), "vocabulary and weights belong to two models")]
    added = {token: first + index for index, token in enumerate(tiktoken_file.SPECIALS) if first + index < rows}
    return _stop(added, stops, path, [])
