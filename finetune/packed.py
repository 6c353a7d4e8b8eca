"""A folder whose linears lie in 4 bits: its stored tensors judged, and taken for the matrices that they stand for.

Names, dtypes and shapes only; no torch.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from finetune import forms
from finetune.decoder import LINEARS, DecoderShape
from finetune.errors import Fault
from finetune.headers import Tensor

MERGED = "BF16"
"""What a packed matrix is written as once it is merged."""
_LEFT_OVER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors of older libraries that every model computes for itself."""


def as_matrices(folder: Path, shape: DecoderShape, stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Fault]]:
    """The model's tensors by their names in a full-precision folder, and every fault, each naming its tensor."""
    assert shape.packing is not None
    form, kind = forms.stored(shape.packing.kind), shape.packing.kind
    found: dict[str, Tensor] = {}
    faults: list[Fault] = []
    known: set[str] = set()
    for name, size in shape.tensors().items():
        module, _, last = name.rpartition(".")
        if last != "weight" or module.rpartition(".")[2] not in LINEARS:
            found |= {name: stored[name]} if name in stored else {}
            known.add(name)
            continue
        try:
            wanted = form.parts(size[0], size[1], shape.packing)
        except ValueError as error:
            faults.append(Fault(f"{name} cannot be {kind}: {error}", str(folder), "use the full-precision model"))
            continue
        names = {last: f"{module}.{last}" for last in wanted}
        parts = {last: replace(stored[one], stored=one) for last, one in names.items() if one in stored}
        known |= set(names.values())
        if fault := _fault(folder, module, name in stored, wanted, parts, kind):
            faults.append(fault)
            known.add(name)
            continue
        shard = parts["qweight"].shard
        found[name] = Tensor(shard=shard, dtype=MERGED, shape=size, parts=parts)
    for name in sorted(set(stored) - known):
        if not _LEFT_OVER.search(name):
            what = f"tensor {name} belongs to no part of this model in {kind}"
            faults.append(Fault(what, str(folder / stored[name].shard), "use the folder as published"))
    return found, faults[:20]


def _fault(
    folder: Path, module: str, dense: bool, wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]],
    parts: dict[str, Tensor], kind: str,
) -> Fault | None:  # fmt: skip
    """What is wrong with one linear; its first fault says enough."""
    if dense:
        what = f"tensor {module}.weight is not packed, and in a {kind} base every linear of a layer must be"
        return Fault(what, str(folder), "use the full-precision model")
    for last, (dtypes, size) in wanted.items():
        name = f"{module}.{last}"
        if last not in parts:
            return Fault(
                f"tensor {name} is missing: {kind} has it of every linear", str(folder), "fetch the base again"
            )
        place = str(folder / parts[last].shard)
        if parts[last].dtype not in dtypes:
            what = f"tensor {name} is stored as {parts[last].dtype}, {kind} has {' or '.join(dtypes)} there"
            return Fault(what, place, "use the full-precision model")
        if parts[last].shape != size:
            what = (
                f"tensor {name} is {list(parts[last].shape)} where config.json says {list(size)} for {kind} in 4 bits"
            )
            return Fault(what, place, "config.json and weights belong to two models, or to another form")
    return None
