"""original ⇄ native, streamed over the shards: the layout changes, the numbers do not. Adapters too.

A folder appears whole or not at all: everything is written under a temporary name and renamed last, so that the same
command after an interruption starts afresh and nothing half-written ever loads.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune import adapter_layout, hardware, layouts, pickles, shards, tokenizer
from finetune import base as bases
from finetune.base import Base
from finetune.errors import EnvironmentFault, ModelError
from finetune.headers import INDEX, PICKLES, SINGLE
from finetune.runfolder import atomic_folder, clear_leftovers_of, make_folder, remove
from finetune.terminal import Progress, Terminal


def convert(source: Path, out: Path, layout: str, terminal: Terminal) -> None:
    """Write the model or adapter in ``source`` to the new folder ``out`` in the wanted layout.

    Raises:
        ModelError: what the source is, or what the layout cannot express.
        EnvironmentFault: something is at ``out`` already, or the disk is too small.
    """
    if not source.is_dir():
        raise ModelError("no such folder", str(source), "name a model folder or an adapter's")
    if out.exists():
        raise EnvironmentFault("something is there already", str(out), "give another folder, or remove it")
    clear_leftovers_of(out)
    if (source / "adapter_config.json").is_file():
        with atomic_folder(out) as temporary:
            adapter_layout.convert(source, temporary, layout, terminal)
        terminal.say(f"adapter in the {layout} layout: {out}")
        return
    if not _has_safetensors(source) and any(path.suffix in PICKLES for path in source.iterdir()):
        _from_pickles(source, out, layout, terminal)
    else:
        base = bases.inspect(source, weights_only=True)
        if base.layout == layout:
            raise ModelError(
                f"this model is in the {layout} layout already", str(source), "there is nothing to convert"
            )
        with atomic_folder(out) as temporary:
            _write(base, temporary, layout, terminal)
    terminal.say(f"model in the {layout} layout: {out}")


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def _from_pickles(source: Path, out: Path, layout: str, terminal: Terminal) -> None:
    """The pickled shards become safetensors beside the output first, one by one in a child process."""
    sizes = sum(path.stat().st_size for path in source.iterdir() if path.suffix in PICKLES)
    _check_room(out, 2 * sizes)
    unpacked = out.with_name(f"{out.name}.tmp-{os.getpid()}-unpacked")
    make_folder(unpacked)
    try:
        pickles.unpack(source, unpacked, Progress(terminal, "unpacking shard"))
        for path in source.iterdir():
            if path.is_file() and path.suffix not in PICKLES and not path.name.endswith(".index.json"):
                shutil.copyfile(path, unpacked / path.name)
        try:
            base = bases.inspect(unpacked, weights_only=True)
        except ModelError as error:
            moved = [fault._replace(where=fault.where.replace(str(unpacked), str(source))) for fault in error.faults]
            raise ModelError.of(moved) from None
        with atomic_folder(out) as temporary:
            _write(base, temporary, layout, terminal, consumed=True)
    finally:
        remove(unpacked)


def _write(base: Base, out: Path, layout: str, terminal: Terminal, *, consumed: bool = False) -> None:
    layouts.refuse_impossible(base, layout)
    if base.shape.packing:
        what = f"a {base.shape.packing.kind} base has one layout alone"
        raise ModelError(what, str(base.folder), "train over it as it is; a merge dequantises it")
    if not consumed:
        _check_room(out, bases.stored_bytes(base.tensors))
    for note in base.notes:
        terminal.say(note)
    layouts.write(base, out, layout)
    shards.rewrite(base, out, layout, None, Progress(terminal, "writing tensor"), consume=consumed)
    if not base.stop_token:
        terminal.say("no vocabulary file here: only the weights were converted; add the tokenizer's files by hand")
    elif layout == "native":
        _check_tokenizer(out, terminal)


def _check_tokenizer(out: Path, terminal: Terminal) -> None:
    """Reload as anyone would; say so where transformers makes another tokenizer of the file than the file says."""
    from transformers import AutoTokenizer

    if not tokenizer.agrees(AutoTokenizer.from_pretrained(out, local_files_only=True), out):
        terminal.say(
            "plain AutoTokenizer rebuilds this tokenizer with the model type's own split pattern and gives other ids: "
            "load it with PreTrainedTokenizerFast (finetune itself does)"
        )


def _check_room(out: Path, needed: int) -> None:
    free = hardware.free_disk(out.absolute())
    if free < needed + 50_000_000:
        what = f"{free / 1e9:.1f} GB free, the converted model needs {needed / 1e9:.1f} GB"
        raise EnvironmentFault(what, str(out), "free some space or name a folder on another disk")
