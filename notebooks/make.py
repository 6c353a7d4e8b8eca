"""Execute the notebooks and write each ``.ipynb`` beside its ``.py``, with the outputs and nothing of this machine.

    python notebooks/make.py             # all of them
    python notebooks/make.py 02          # those whose name begins so

The ``.py`` is what one edits. An ``.ipynb`` is made from it: numbered cells, no times, no paths, no interpreter.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "jupytext": {"formats": "ipynb,py:percent"},
}


def scripts(beginning: str = "") -> list[Path]:
    """The notebooks' scripts; their names begin with a number."""
    return sorted(path for path in HERE.glob("[0-9]*.py") if path.name.startswith(beginning))


def bare(script: Path) -> Any:
    """The notebook that a script is, without outputs: the same bytes every time."""
    import jupytext

    notebook = jupytext.read(script)
    notebook.nbformat, notebook.nbformat_minor, notebook.metadata = 4, 5, METADATA
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"], cell["metadata"] = f"cell-{number:02}", {}
    return notebook


def execute(notebook: Any) -> None:
    """Run all cells in the notebooks' folder and keep what they show. Raises where a cell fails."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell["metadata"] = {}
        for output in cell.get("outputs", ()):
            output.get("metadata", {}).clear()


def strangers(text: str) -> list[str]:
    """What a notebook must not hold: places of the machine that it was executed on."""
    places = ("/home/", "/root/", "/tmp/", "/Users/", "site-packages", str(HERE.parent))
    return re.findall(r"(?:" + "|".join(map(re.escape, places)) + r")[^\s\"]*", text)


def main(beginning: str = "") -> int:
    import nbformat

    for script in scripts(beginning):
        notebook = bare(script)
        execute(notebook)
        text = nbformat.writes(notebook) + "\n"
        if found := strangers(text):
            print(f"{script.name}: its outputs name places of this machine: {found[0]}")
            return 1
        script.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        print(f"{script.stem}: executed, {len(text) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
