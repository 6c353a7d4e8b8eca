"""Model families: one file each, named as ``model_type`` in a checkpoint's config.json.

A family says what cannot be read from the checkpoint itself: which linear layers an adapter goes on by default, which
tokens end a turn, and which licences its known models carry. No file here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from finetune.errors import ModelError


class Licence(NamedTuple):
    """The terms of a known model. ``duties`` is what whoever passes a derivative on must do, in one line.

    ``id`` is what a model card says; one that the hub does not know goes by ``other`` there. ``notice`` is the sentence
    that must be passed on, in a file called ``notice_file``. ``text`` is the file beside this one that has the licence.
    """

    id: str
    name: str
    duties: str
    on_hub: bool = False
    notice: str = ""
    notice_file: str = "NOTICE"
    text: str = ""


APACHE = Licence(
    "apache-2.0", "Apache License 2.0", "pass the licence text and any NOTICE on, and say what was changed",
    on_hub=True, text="apache-2.0.txt",
)  # fmt: skip

TONGYI = Licence(
    "tongyi-qianwen",
    "Tongyi Qianwen licence agreement",
    "pass the agreement and its Notice sentence on, mark changed files; ask for a licence above 100 million users a "
    "month; do not use the model or its output to improve another LLM",
    # Sections 3c and 4 of the agreement: the sentence, and what the file must be called.
    notice="Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. "
    "All Rights Reserved.",
    notice_file="Notice",
)


class Family(Protocol):
    """What a file of this folder offers."""

    TARGET_MODULES: tuple[str, ...]
    """The linear layers of one block, by the last part of their names."""
    STOP_TOKENS: tuple[str, ...]
    """Tokens that end a turn. Those that the tokenizer has as one token count; the first of them is trained."""
    TEMPLATE: str
    """How a turn is written, in words; the checkpoint's own chat template decides."""
    LICENSES: Mapping[str, Licence]
    """Known models by name, without the publisher. A name not listed here has terms that must be looked up."""


_FILES = {"qwen": "qwen1"}
"""Where the file is not named as the ``model_type``: the first Qwen calls itself just that."""


def names() -> tuple[str, ...]:
    """Every family there is, in the order of the alphabet."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(model_type: str, where: Path | str = "config.json: model_type") -> Family:
    """The family of that ``model_type``; ModelError, at the place ``where``, when there is none."""
    name = _FILES.get(model_type, model_type) if isinstance(model_type, str) else ""
    if name in names() and model_type not in _FILES.values():
        return cast(Family, importlib.import_module(f"{__name__}.{name}"))
    known = ", ".join(names())
    close = difflib.get_close_matches(str(model_type), names(), n=1)
    fix = f"known ones: {known}" + (f"; did you mean {close[0]!r}?" if close else "")
    raise ModelError(f"unknown model_type {model_type!r}", str(where), fix)


def licence(model: str) -> Licence | None:
    """The licence of a known model of any family, by the last part of its name; None when it is not a known one."""
    found = (licence_of(cast(Family, importlib.import_module(f"{__name__}.{name}")), model) for name in names())
    return next((one for one in found if one is not None), None)


def licence_of(family: Family, model: str) -> Licence | None:
    """The licence of a model named as a hub id, a folder or a bare name; None when it is not a known one."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((licence for known, licence in family.LICENSES.items() if known.lower() == name), None)
