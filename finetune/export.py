"""A finished run for other programs: its adapter as plain LoRA, or its merged model as a GGUF file or for Ollama."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save

from finetune import base as bases
from finetune import certify, checkpoint, layouts, manifest, trained
from finetune.base import Base
from finetune.errors import EnvironmentFault, ModelError
from finetune.exporters import adapter, gguf, ollama
from finetune.runfolder import atomic_folder, clear_leftovers_of, json_bytes, remove, write_synced
from finetune.terminal import Terminal
from finetune.trained import Trained


def export(
    run: Path, out: Path, to: str, terminal: Terminal, *, target: str, quantise: str | None, adapter_only: bool
) -> dict[str, Any]:
    """One of the three below, by its name: "adapter", "gguf" or "ollama"."""
    if to == "adapter":
        return adapter_for(run, out, target, terminal)
    if to == "gguf":
        return gguf_for(run, out, quantise, terminal, adapter_only=adapter_only)
    return ollama_for(run, out, quantise, terminal)


def adapter_for(run: Path, out: Path, target: str, terminal: Terminal) -> dict[str, Any]:
    """Write the adapter for ``target`` (peft or vllm) into the new folder ``out``; → its digests and what to type.

    Raises:
        ModelError: no finished run and no adapter, or the target cannot load this adapter.
        EnvironmentFault: something is in the way, or the disk refuses.
    """
    given = trained.of(run, terminal)
    read = checkpoint.read_adapter(given.folder)
    if refused := adapter.refusals(read.config, read.weights, target):
        what = f"{target} cannot load {' and '.join(refused)}"
        raise ModelError(what, str(given.folder), "merge it instead: finetune merge")
    _refuse_place(out)
    with atomic_folder(out) as temporary:
        _write_plain(given, temporary)
        layouts.copy_tokenizer(given.base, temporary)
        found = manifest.digests(temporary)
        manifest.write(temporary, found)
    said = adapter.advice(read.weights, target)
    terminal.say(f"adapter: {out}" + (f"   {said}" if said else ""))
    return {"target": target, "sha256": found, "advice": said or None}


def gguf_for(
    run: Path, out: Path, quantise: str | None, terminal: Terminal, *, adapter_only: bool = False
) -> dict[str, Any]:
    """Write the merged model, or the adapter alone, as the GGUF file ``out``; → what was written and compared.

    ``run``: a finished run, an adapter's folder, or a merged model's. ``quantise``: of ``exporters.gguf.KINDS``.

    Raises:
        ModelError: what was written differs from the model, or GGUF cannot hold it; nothing is left behind.
        EnvironmentFault: a package is missing, something is in the way, or the disk refuses.
    """
    bases.refuse_scorer(run, "a GGUF file")
    _refuse_place(out)
    if adapter_only:
        if quantise:
            raise ModelError("an adapter alone keeps its numbers", "--quantize", "leave it out")
        given = trained.of(run, terminal)
        base = _native(given.base)
        with tempfile.TemporaryDirectory(prefix="finetune-adapter-") as scratch:
            _write_plain(given, Path(scratch))
            found = gguf.adapter(Path(scratch), base, out, terminal.status)
    else:
        gguf.ready(out, quantise, terminal.status)
        with _merged(run, out, terminal) as folder:
            found = gguf.merged(folder, out, quantise, terminal.status, _called(run))
    _say(out, found, terminal)
    return found


def ollama_for(run: Path, out: Path, quantise: str | None, terminal: Terminal) -> dict[str, Any]:
    """Write the merged model as GGUF and its Modelfile into the new folder ``out``. Raises as ``gguf_for``."""
    bases.refuse_scorer(run, "Ollama")
    _refuse_place(out)
    gguf.ready(out, quantise, terminal.status)
    with _merged(run, out, terminal) as folder, atomic_folder(out) as temporary:
        found = gguf.merged(folder, temporary / "model.gguf", quantise, terminal.status, _called(run))
        text, said = ollama.modelfile(folder, temporary / "model.gguf")
        write_synced(temporary / "Modelfile", text.encode())
    for note in said["notes"]:
        terminal.say(f"Modelfile: {note}")
    _say(out, found, terminal)
    terminal.say(f"stops at {', '.join(said['stops'])}; next: ollama create {_called(run)} -f {out / 'Modelfile'}")
    return found | {"modelfile": said}


def _say(out: Path, found: dict[str, Any], terminal: Terminal) -> None:
    ran = found["llama.cpp"]
    if "not_compared" in ran:
        compared = f"its answers were not compared: {ran['not_compared']}"
    else:
        ties = f", {ran['near_ties']} of them near ties" if ran.get("near_ties") else ""
        before = "before it was quantised " if found["kind"] in gguf.QUANTISED else ""
        compared = f"{before}llama.cpp answers as transformers does: {ran['tokens']} greedy tokens{ties}"
    terminal.say(f"{found['kind']}: {found['tensors']} tensors read back and compared; {compared}")
    terminal.say(f"GGUF: {out}   sha-256 {found['sha256'][:16]}")


def _write_plain(given: Trained, folder: Path) -> None:
    read = checkpoint.read_adapter(given.folder)
    write_synced(folder / checkpoint.CONFIG, json_bytes(adapter.plain(read.config, read.weights)))
    write_synced(folder / checkpoint.ADAPTER, save(read.weights, {"format": "pt"}))


def _native(base: Base) -> Path:
    if base.layout != "native":
        fix = f"make a native one: finetune convert {base.folder} OUT --to native"
        raise ModelError("llama.cpp's converter reads a native base only", str(base.folder), fix)
    return base.folder


def _called(run: Path) -> str:
    return run.resolve().name


def _refuse_place(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise EnvironmentFault("something is there already", str(out), "give another --out, or remove it")
    clear_leftovers_of(out)


@contextlib.contextmanager
def _merged(run: Path, out: Path, terminal: Terminal) -> Iterator[Path]:
    """The merged model's folder: the one that is there, or one beside ``out`` for as long as it is needed.

    It stays where a command is cut off or the machine refuses, and the same command goes on with it.
    """
    if (run / "config.json").is_file():
        if faults := manifest.faults(run) if (run / manifest.NAME).is_file() else []:
            raise ModelError(faults[0], str(run), "merge again")
        yield run
        return
    folder = out.with_name(f".{out.name}.merged")
    try:
        certify.merge(trained.of(run, terminal), folder, certify.Asked(), terminal)
        yield folder
    except (EnvironmentFault, KeyboardInterrupt):
        raise
    except BaseException:
        remove(folder)
        raise
    remove(folder)
