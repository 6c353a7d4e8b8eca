"""A hook of mkdocs: links that leave docs/ become the path that they name, for the site holds docs/ alone.

That those files are there is checked in the repository itself, by tests/test_docs.py.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text."""

    def shown(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[2]))
        if path.startswith("docs/"):
            return found[0]
        return f"{found[1]} (`{path}`)" if found[1].strip("`") != path else f"`{path}`"

    return _LINK.sub(shown, markdown)
