"""Make a tiny random base from a seed, offline (``finetune/tiny_base.py`` says what is in it).

python data/make_tiny_base.py            # writes data/bases/tiny
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune.tiny_base import FAMILIES, build, write_tokenizer

__all__ = ["FAMILIES", "build", "main", "write_tokenizer"]  # benchmarks/ take them from here
TARGET = Path(__file__).resolve().parent / "bases" / "tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Build into a scratch folder, then rename, so that the target is never half-written."""
    parser = argparse.ArgumentParser(description="Make a tiny random base from a seed.")
    parser.add_argument("--into", type=Path, default=TARGET, help="the folder to write (default: data/bases/tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2")
    options = parser.parse_args(argv)
    target: Path = options.into
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=target.parent) as scratch:
        folder = build(Path(scratch) / "base", options.seed, family=options.family)
        if target.exists():
            shutil.move(target, Path(scratch) / "old")
        folder.rename(target)
    print(f"{target.name}: written ({options.family}, seed {options.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
