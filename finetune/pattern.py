"""Regular expressions that end: a pattern that would search an answer for ever is stopped after a second.

By the package ``regex``, which transformers brings; it reads what ``re`` reads. Some patterns backtrack exponentially
on some texts, and the texts here are a model's.
"""

from __future__ import annotations

from typing import Any

import regex

SECONDS = 1.0
"""For one pattern on one text; an honest one needs microseconds."""


def compiled(pattern: str) -> Any:
    """The pattern, ready to use; a dot matches no newline unless it says ``(?s)``. Raises ValueError."""
    try:
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def search(pattern: Any, text: str) -> Any:
    """The first match or None. Raises TimeoutError."""
    return pattern.search(text, timeout=SECONDS)
