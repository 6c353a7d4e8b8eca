"""Is this installation sound, and what does this machine have? One line for each thing, with its mend.

Nothing is fetched and nothing written. A *fault* breaks a run or changes its numbers; a *note* is worth knowing.
"""

from __future__ import annotations

import os
import platform
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from finetune import __version__, conflicts, hardware, store
from finetune.errors import FinetuneError
from finetune.fetch import access, disk
from finetune.hardware import Hardware
from finetune.terminal import clean, size

DISTRIBUTION = "finetune-qwen"
_FULL, _QWEN = 1e9, 30e9
"""Bytes free below which a run may fail, and that the download of a 14B model takes."""
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. ``state``: ok, note or fault."""

    what: str
    said: str
    state: str = "ok"
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:<7}{self.what:<18}{clean(self.said, 400)}{f'; {self.fix}' if self.fix else ''}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """All findings. Where torch does not load, those that need none."""
    found = [*packages(), *known_conflicts(hardware.cpu_flags())]
    try:
        machine = hardware.detect()
    except (ImportError, OSError) as error:  # not there, or a library below it is not
        said = f"cannot be loaded: {error}"
        found.append(Finding(what="torch", said=said, state="fault", fix="install torch again, in a new environment"))
    else:
        found += [*device(machine), *memory(machine), *environment(machine)]
    return [*found, *disks(), *extras()]


def packages() -> Iterator[Finding]:
    """Each package that the project names: there, within its bounds, and content with the others' versions."""
    yield Finding(what="finetune", said=f"{__version__}, Python {platform.python_version()}")
    python, core = required()
    if python and not Requirement(f"python{python}").specifier.contains(platform.python_version(), prereleases=True):
        yield Finding(what="python", said=f"{platform.python_version()} is outside {python}", state="fault",
                      fix="make the environment with a newer Python")  # fmt: skip
    for requirement in core:
        yield _judged(requirement, DISTRIBUTION)
    names = {requirement.name for requirement in core}
    for name in sorted(names):
        for wanted in _wants(name):
            found = _judged(wanted, name)
            if found.state == "fault":
                yield found


def required(extra: str | None = None) -> tuple[str, list[Requirement]]:
    """(Python's bounds, packages) that the project names, or that an ``extra`` adds: from pyproject.toml where this is
    a checkout, else from what pip installed."""
    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == DISTRIBUTION:
            listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
            return project["requires-python"], [Requirement(text) for text in listed]
    except (OSError, ValueError, KeyError):
        pass
    try:
        made = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "", []
    every = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    return str(made.json.get("requires_python", "")), [one for one in every if _applies(one, extra or "")
                                             and bool(extra) != _applies(one, "")]  # fmt: skip


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _wants(name: str) -> list[Requirement]:
    """What an installed package itself requires here."""
    try:
        listed = metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return []  # told already
    return [wanted for text in listed if _applies(wanted := Requirement(text))]


def _judged(requirement: Requirement, by: str) -> Finding:
    bounds = str(requirement.specifier)
    fix = f"pip install '{requirement.name}{bounds}'"
    found = _version(requirement.name)
    if found is None:
        return Finding(what=requirement.name, said=f"not installed, {by} needs it", state="fault", fix=fix)
    if not requirement.specifier.contains(found, prereleases=True):
        said = f"{found} is outside what {by} asks for ({bounds})"
        return Finding(what=requirement.name, said=said, state="fault", fix=fix)
    return Finding(what=requirement.name, said=f"{found} ({bounds or 'any version'})")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def known_conflicts(flags: frozenset[str]) -> Iterator[Finding]:
    """The table's entries that these versions and this processor meet, and what is known of the C library."""
    for conflict in conflicts.CONFLICTS:
        if conflict.flag and conflict.flag not in flags:
            continue
        found = {name: _version(name) for name in conflict.packages}
        asked = {name: Requirement(f"{name}{bounds}").specifier for name, bounds in conflict.packages.items()}
        if all((have := found[name]) and bounds.contains(have, prereleases=True) for name, bounds in asked.items()):
            said = ", ".join(f"{name} {version}" for name, version in found.items())
            yield Finding(what="conflict" if conflict.fault else "known", said=f"{said}: {conflict.what}",
                          state="fault" if conflict.fault else "note", fix=conflict.fix)  # fmt: skip
    name, version = platform.libc_ver()
    if name != "glibc":
        yield Finding(what="C library", said="not glibc: free memory is not given back between steps", state="note",
                      fix="leave room above the plan's memory")  # fmt: skip
    elif Version(version).release < conflicts.OLD_GLIBC:
        yield Finding(what="C library", said=f"glibc {version} seldom finds a freed block again", state="note",
                      fix="nothing to do: what is free is given back between steps")  # fmt: skip


def device(machine: Hardware) -> Iterator[Finding]:
    """Cards and driver as torch sees them, and the processor with its units for bf16."""
    import torch

    built, driver = torch.version.cuda, hardware.nvidia_driver()
    for card in hardware.cards():
        able = ".".join(map(str, card["capability"]))
        said = f"{card['name']}, {size(card['memory'])}, compute capability {able}, driver {driver}, CUDA {built}"
        yield Finding(what="GPU", said=said)
    if machine.device == "cuda":
        if not machine.bf16:
            yield Finding(what="GPU", said="no bf16 below capability 8.0", state="note",
                          fix="nothing to do: `compute: auto` takes fp16 with loss scaling")  # fmt: skip
    elif driver:
        why = f"is built for CUDA {built} and finds no card" if built else "is built without CUDA"
        said = f"driver {driver} is here, and torch {torch.__version__} {why}"
        mend = (
            "see nvidia-smi and CUDA_VISIBLE_DEVICES, or update the driver" if built else "install torch's CUDA build"
        )
        yield Finding(what="GPU", said=said, state="fault", fix=mend)
    else:
        yield Finding(what="GPU", said="none: training runs on the CPU", state="note",
                      fix="for a card that is elsewhere: `finetune plan RECIPE --card GB`")  # fmt: skip
    units = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in hardware.cpu_flags()]
    with_units = f"bf16 units: {', '.join(units)}" if units else "no bf16 units: products are in fp32"
    said = f"{hardware.cpu_name()}, {os.cpu_count()} processors, {machine.threads} threads, {with_units}"
    yield Finding(what="CPU", said=said)


def memory(machine: Hardware) -> Iterator[Finding]:
    import psutil

    found = psutil.virtual_memory()
    yield Finding(what="memory", said=f"{size(found.available)} free of {size(found.total)}")
    limit = _limit()
    if machine.device == "cpu" and limit is not None and limit < found.available:
        yield Finding(what="memory", said=f"this container may use {size(limit)}, plans count what the system has free",
                      state="note", fix="keep a plan's memory below that limit")  # fmt: skip


def _limit() -> int | None:
    """The memory that the container may use, where it is bounded."""
    for path in _CGROUP:
        try:
            return int(path.read_text())
        except (OSError, ValueError):  # "max", or another kind of system
            continue
    return None


def disks() -> Iterator[Finding]:
    """Free space where runs, models and tokenised rows lie."""
    free_some = "free some space, or set"
    places = {
        "runs": (Path("runs").absolute(), f"{free_some} `output:` to another disk"),
        "hub cache": (disk.cache(), f"{free_some} HF_HOME"),
        "rows' cache": (store.cache_folder(), f"{free_some} XDG_CACHE_HOME"),
    }
    for name, (path, mend) in places.items():
        there = next(one for one in (path, *path.parents) if one.exists())
        free = hardware.free_disk(path)
        said = f"{size(free)} free at {path}"
        if not os.access(there, os.W_OK | os.X_OK):
            yield Finding(what=name, said=f"{there} cannot be written", state="fault", fix=mend)
        elif free < _FULL:
            yield Finding(what=name, said=said, state="fault", fix=mend)
        elif name == "hub cache" and free < _QWEN:
            yield Finding(what=name, said=f"{said}: Qwen-14B takes 28.3 GB", state="note", fix=mend)
        else:
            yield Finding(what=name, said=said)


def environment(machine: Hardware) -> Iterator[Finding]:
    """Variables that change results, speed or where things are looked for."""
    env = os.environ
    yield Finding(what="OMP_NUM_THREADS", said=f"{env.get('OMP_NUM_THREADS', 'not set')}: {machine.threads} threads; "
                  "bits hang on their number, a resumed run keeps its own")  # fmt: skip
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if machine.threads > usable:
        yield Finding(what="threads", said=f"{machine.threads} on {usable} processors slow each other down",
                      state="note", fix=f"set OMP_NUM_THREADS to at most {usable}")  # fmt: skip
    for name, usual in hardware.LIBRARIES.items():
        if env.get(name, usual) != usual:
            yield Finding(what=name, said=f"{clean(env[name])}, the command would set {usual}", state="note",
                          fix="unset it: memory is planned for that")  # fmt: skip
    for name, values in conflicts.LOWERED.items():
        if env.get(name, "").upper() in values:
            said = f"{env[name]}: products in fp32 may be computed in fewer bits"
            yield Finding(what=name, said=said, state="note", fix="unset it")
    for name in conflicts.ISA:
        if env.get(name):
            yield Finding(what=name, said=f"{env[name]}: bits differ from those of a run without it", state="note",
                          fix="unset it, or keep it for the whole of a run")  # fmt: skip
    yield from _reach(env.get("WORLD_SIZE", "1"))


def _reach(processes: str) -> Iterator[Finding]:
    if processes != "1":
        yield Finding(what="WORLD_SIZE", said=f"{processes}: a launcher's: `finetune train` begins with --world alone",
                      state="fault", fix="start `finetune train` alone")  # fmt: skip
    if access.offline():
        yield Finding(what="hub", said="offline: nothing is fetched", state="note",
                      fix="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to fetch a model")  # fmt: skip
    try:
        asked = access.open_access("Qwen/Qwen-14B", "main")
    except FinetuneError as error:
        what, where, fix = error.faults[0]
        yield Finding(what=where, said=what, state="fault", fix=fix)
    else:
        host = asked.where.removesuffix(f"/{asked.repo}")
        yield Finding(what="hub", said=f"{host}, {'with a token' if asked.token else 'no token (HF_TOKEN)'}")


def extras() -> Iterator[Finding]:
    """Each optional extra: there and within its bounds, or what it would bring."""
    told = set[str]()
    for extra, brings in conflicts.EXTRAS.items():
        _, wanted = required(extra)
        absent = [requirement.name for requirement in wanted if _version(requirement.name) is None]
        for requirement in wanted:
            found = _judged(requirement, f"the extra {extra}")
            if found.state == "fault" and found.what not in (*absent, *told):
                told.add(found.what)
                yield found
        if absent:
            said = f"{', '.join(absent)} missing" if len(absent) < len(wanted) else "not installed"
            fix = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield Finding(what=f"extra {extra}", said=f"{said}: it brings {brings}", state="note", fix=fix)
        else:
            yield Finding(what=f"extra {extra}", said=brings)


def holds(findings: Sequence[Finding]) -> bool:
    return not any(one.state == "fault" for one in findings)


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"holds": holds(findings), "findings": [one.to_dict() for one in findings]}
