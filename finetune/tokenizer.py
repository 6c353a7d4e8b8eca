"""The base's tokenizer, from its own files; loading it needs no model code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from finetune import layouts
from finetune.base import Base
from finetune.errors import ModelError
from finetune.runfolder import json_bytes, write_synced

_PROBES = (
    "The year 2019, 15.02.2019 and 007",
    "  two  blanks\n\n\ttabs\r\n and a line\n",
    "don't WE'LL l'été naïve Å A\u030a ﬁ",
    "日本語 한국어 русский עברית العربية ไทย हिन्दी",
    'x=y[3:10]!=z&&f(`a`)+{"k":1.5e-3}…–\u200d🧑\u200d💻',
)


def of(base: Base) -> Any:
    """The tokenizer of a base in either layout; an original vocabulary file is turned into a native one first."""
    if base.layout == "native":
        return load_tokenizer(base.folder)
    with tempfile.TemporaryDirectory(prefix="finetune-tokenizer-") as scratch:
        folder = Path(scratch)
        layouts.write_tokenizer(base, folder)
        write_synced(folder / "config.json", json_bytes(base.config))
        return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that ``tokenizer.json`` describes.

    For some model types transformers rebuilds a tokenizer with that type's own split pattern, whatever the file says;
    where the two give other ids the file is right.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not agrees(found, folder):
            found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer does not load: {error}", str(folder), "fetch it again") from None
    return found


def agrees(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer gives the ids that the folder's ``tokenizer.json`` gives (true where there is none)."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return True
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return all(
        tokenizer.encode(text, add_special_tokens=False) == file.encode(text, add_special_tokens=False).ids
        for text in _PROBES
    )
