"""llama.cpp's converters and runtime, where they are: those of FINETUNE_LLAMA_CPP, or those that an export left in the
user's cache. No test fetches them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import llamacpp

WRAPPER = """
import runpy
from conversion import base, llama
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {split!r}
{planted}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def converters() -> Path:
    for package in ("gguf", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed (extra gguf)")
    named = os.environ.get(llamacpp.VARIABLE)
    folder = Path(named) if named else Path("~/.cache/finetune").expanduser() / f"llama.cpp-{llamacpp.VERSION}"
    if not (folder / llamacpp.MODEL).is_file():
        pytest.skip(f"no llama.cpp converters: export to GGUF once, or set {llamacpp.VARIABLE}")
    return folder.absolute()


@pytest.fixture
def knows(converters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the converters know the tiny tokenizers, as splitting like ``split``; ``planted`` is a bug in them."""

    def wrap(split: str = "qwen2", planted: str = "") -> None:
        folder = tmp_path / "llama.cpp"
        folder.mkdir(exist_ok=True)
        for name in ("conversion", "gguf-py"):
            if not (folder / name).exists():
                (folder / name).symlink_to(converters / name)
        for name in (llamacpp.MODEL, llamacpp.ADAPTER):
            text = WRAPPER.format(split=split, planted=planted, script=str(converters / name))
            (folder / name).write_text(text)
        monkeypatch.setenv(llamacpp.VARIABLE, str(folder))

    wrap()
    return wrap


@pytest.fixture(scope="session")
def runtime() -> str:
    """Why a GGUF cannot be run here; empty where it can."""
    return llamacpp.unusable()
