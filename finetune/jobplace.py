"""Where a process stands in its job, as its launcher's variables say, held against what was asked for.

Launchers fail silently: one process where two were asked for, whole replicas where shards were, two runs that know
nothing of one another in one folder. So a job says how many processes it is (``--world``), and each of them refuses to
begin where that does not hold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.errors import EnvironmentFault

_FORMS = (("WORLD_SIZE", "RANK", "LOCAL_RANK"), ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"))
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}
_ALONE = "start `finetune train` alone, or with --processes"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Process ``rank`` of ``world``, and ``local_rank`` among those of its machine."""

    rank: int
    world: int
    local_rank: int


def find(asked: int | None, variables: Mapping[str, str] = os.environ, *, shard: str = "none") -> Place | None:
    """This process's place in a job of ``asked`` processes; None where it is alone.

    ``shard``: the recipe's word for what each process holds.

    Raises:
        EnvironmentFault: the launcher has started another number of processes, or set up what is not done here.
    """
    form = next((names for names in _FORMS if _number(variables, names[0])), _FORMS[0])
    started = _number(variables, form[0]) or 1
    if asked is None:
        if form == _FORMS[0] and started > 1:
            what = f"{started} processes were launched, and nothing says that they are one job"
            raise EnvironmentFault(what, form[0], f"add --world {started}; or {_ALONE}")
        return None
    for name, kind in _SHARDING.items():
        if variables.get(name, "").lower() not in ("1", "true", "yes"):
            continue
        if (kind, shard) != ("FSDP", "fsdp"):
            what = f"the launcher is set up for {kind}, and every process here holds the whole model"
            fix = "set train.shard: fsdp, or launch without it" if kind == "FSDP" else "launch without it"
            raise EnvironmentFault(what, name, f"{fix}: see docs/scale.md")
        if variables.get("FSDP_VERSION", "1") != "2":
            what = f"the launcher is set up for FSDP {variables.get('FSDP_VERSION', '1')}, and train.shard is FSDP 2"
            raise EnvironmentFault(what, "FSDP_VERSION", "set fsdp_version: 2")
    if started != asked:
        what = f"{asked} processes were asked for, and the launcher has started {started}"
        raise EnvironmentFault(what, f"--world, {form[0]}", "mend the launcher's settings; nothing was begun")
    if asked == 1:
        return None
    rank, local = _number(variables, form[1]), _number(variables, form[2])
    if rank is None or not rank < asked or "MASTER_ADDR" not in variables or "MASTER_PORT" not in variables:
        missing = form[1] if rank is None or not rank < asked else "MASTER_ADDR, MASTER_PORT"
        raise EnvironmentFault(
            "the launcher does not say which process this is, or where the first one is", missing, _ALONE
        )
    return Place(rank=rank, world=asked, local_rank=local or 0)


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdecimal() else None
