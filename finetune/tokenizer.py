"""The base's tokenizer, from its own files; loading it needs no model code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import ModelError


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer does not load: {error}", str(folder), "fetch it again") from None
