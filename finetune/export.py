"""A finished run's adapter as another program loads it: plain LoRA, with the tokenizer that it was trained with."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from finetune import checkpoint, finished, layouts, manifest
from finetune.errors import EnvironmentFault, ModelError
from finetune.exporters import adapter
from finetune.runfolder import atomic_folder, clear_leftovers_of, json_bytes, write_synced
from finetune.terminal import Terminal


def adapter_for(run: Path, out: Path, target: str, terminal: Terminal) -> None:
    """Write the adapter for ``target`` (peft or vllm) into the new folder ``out``.

    Raises:
        ModelError: no finished run, or the target cannot load this adapter.
        EnvironmentFault: something is in the way, or the disk refuses.
    """
    prepared, files = finished.open_run(run)
    assert prepared.base is not None
    trained = checkpoint.read_adapter(files.adapter)
    if refused := adapter.refusals(trained.config, trained.weights, target):
        what = f"{target} cannot load {' and '.join(refused)}"
        raise ModelError(what, str(files.adapter), "merge it instead: finetune merge")
    if out.exists():
        raise EnvironmentFault("something is there already", str(out), "give another --out, or remove it")
    clear_leftovers_of(out)
    with atomic_folder(out) as temporary:
        config = adapter.plain(trained.config, trained.weights)
        write_synced(temporary / checkpoint.CONFIG, json_bytes(config))
        write_synced(temporary / checkpoint.ADAPTER, save(trained.weights, {"format": "pt"}))
        layouts.copy_tokenizer(prepared.base, temporary)
        manifest.write(temporary, manifest.digests(temporary))
    said = adapter.advice(trained.weights, target)
    terminal.say(f"adapter: {out}" + (f"   {said}" if said else ""))
