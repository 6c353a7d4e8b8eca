"""Text shaped like a credential: recipes are copied into run folders and shown on dashboards, so none may hold one."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PREFIXED = r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{16,} | sk-[A-Za-z0-9_-]{20,} | gh[opsur]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
      | AKIA[0-9A-Z]{16} | wandb_v1_[A-Za-z0-9_]{20,} | xox[abprs]-[A-Za-z0-9-]{10,} | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY
    )"""
# A 40-digit hexadecimal word counts only when it stands alone: as part of a path it is a commit, not a key.
_SHAPES = re.compile(rf"{_PREFIXED} | (?<![A-Za-z0-9/\\_.-])[0-9a-fA-F]{{40}}(?![A-Za-z0-9/\\_.-])", re.VERBOSE)
# … and so it is as a `revision:`.
_REVISION = re.compile(r"(?:^|[\s,{])revision\s*[:=]\s*[\"']?\Z")
# Faults join words with dots and dashes, so hiding looks less closely at what stands beside it.
_HIDDEN = re.compile(rf"{_PREFIXED} | (?<![A-Za-z0-9/\\])[0-9a-fA-F]{{40}}(?![A-Za-z0-9/\\])", re.VERBOSE)


def spots(text: str) -> Iterator[int]:
    """Offsets at which something shaped like a credential starts."""
    for found in _SHAPES.finditer(text):
        if not _REVISION.search(text, 0, found.start()):
            yield found.start()


def mask(text: str) -> str:
    """The text with every credential-shaped part replaced, fit for a screen or a log."""
    return _HIDDEN.sub("(secret)", text)
