"""Several processes of one run, started by a launcher that exists: its command line, printed or run, and its end.

Nothing of a launcher is written here. Each process is told how many there are (``--world``) and refuses to begin where
its launcher did something else; what it then says and its exit code are the job's.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault, Interrupted
from finetune.runfolder import user_cache
from finetune.terminal import Terminal
from finetune.timelimit import TimeLimit

_SHUTDOWN = 120
"""Seconds that processes have for the step that they are in and its checkpoint, once they were asked to stop."""
_GO_ON = "the same command goes on from the last checkpoint"
_DEEPSPEED = re.compile(r"\bzero_optimization\b|\bdistributed_type\W+DEEPSPEED\b")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be started: ``processes`` of ``finetune`` with these words, by that engine on this machine.

    ``config``: accelerate's own; ``job``: submitit's settings, ``key=value`` each.
    """

    engine: str
    processes: int
    words: tuple[str, ...]
    config: Path | None = None
    job: tuple[str, ...] = ()

    def command(self, limit: TimeLimit | None = None, port: int = 29500) -> list[str]:
        """The launcher's command line. ``limit``: what is left of it is the processes'.

        Raises:
            EnvironmentFault: accelerate's settings are DeepSpeed's, which would hold the loop.
        """
        if self.config and _DEEPSPEED.search(self.config.read_text(encoding="utf-8", errors="replace")):
            fix = "take settings of FSDP or of several GPUs: finetune plan --fsdp-config, and train.shard: fsdp"
            raise EnvironmentFault("these settings are for DeepSpeed, which is not used here", str(self.config), fix)
        time = [] if limit is None else ["--max-time", f"{max(1, int(limit.remaining()))}s"]
        own = ["-m", "finetune", *self.words, "--world", str(self.processes), *time]
        if self.engine == "torchrun":
            # The static rendezvous: its store holds no pickles, unlike that of --standalone.
            return [
                "torchrun", "--nnodes=1", f"--nproc-per-node={self.processes}", "--master-addr=127.0.0.1",
                f"--master-port={port}", "--max-restarts=0", f"--shutdown-timeout={_SHUTDOWN}", *own,
            ]  # fmt: skip
        if self.engine == "accelerate":
            settings = ["--config_file", str(self.config)] if self.config else ["--multi_gpu", "--num_machines=1"]
            return [
                "accelerate", "launch", *settings, f"--num_processes={self.processes}",
                f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no", *own,
            ]  # fmt: skip
        return [sys.executable, "-m", "finetune.jobtask", *own[2:]]


def start(order: Order, limit: TimeLimit | None, folder: Path, terminal: Terminal) -> int:
    """Start what was ordered and wait for its end; the job's exit code, whose reason its processes have told.

    Raises:
        EnvironmentFault: the launcher is not installed, or is not set up.
        Interrupted: stopped on request, or a process was killed.
    """
    command = order.command(limit, _free_port())
    terminal.say(f"launching: {shlex.join(command)}")
    if order.engine == "slurm":
        return _slurm(order, command, folder, terminal)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // order.processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: what the processes say stays on it
    os.environ["PYTHONSAFEPATH"] = "1"  # a file torch.py in the working folder is not torch
    if order.engine == "torchrun":
        from torch.distributed.run import main

        return _ended(lambda: main(command[1:]))
    from accelerate.commands.launch import launch_command, launch_command_parser

    asked = launch_command_parser().parse_args(command[2:])
    return _ended(lambda: launch_command(asked))


def _ended(run: Callable[[], Any]) -> int:
    """How a launcher ended that is called in this process."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # the processes say what was wrong; a launcher adds a page to it
    try:
        run()
    except ChildFailedError as error:
        return verdict({rank: failure.exitcode for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        return verdict({0: error.returncode})
    except SignalException:
        raise Interrupted("stopped on request", fix=_GO_ON) from None
    except (RuntimeError, ValueError, OSError) as error:
        raise EnvironmentFault(
            f"the launcher failed: {str(error).splitlines()[0]}", "--launch", "see docs/scale.md"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return 0


def verdict(codes: dict[int, int]) -> int:
    """The job's exit code, of those of the processes that failed: a fault comes before an interruption by it.

    Raises:
        Interrupted: they were killed, all that failed.
    """
    told = [code for code in codes.values() if code > 0]
    if faults := [code for code in told if code != Interrupted.exit_code]:
        return max(faults)
    if told:
        return max(told)
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    if killed:
        rank, number = next(iter(killed.items()))
        raise Interrupted(f"process {rank} of the job was killed (signal {number})", fix=_GO_ON)
    return 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---- Slurm


def _slurm(order: Order, command: Sequence[str], folder: Path, terminal: Terminal) -> int:
    """Submit one job of so many tasks, or with ``cluster=local`` run it here and wait (decision 0024)."""
    if find_spec("submitit") is None:
        raise EnvironmentFault(
            "the package submitit is not installed", "--launch slurm", 'pip install "finetune-qwen[slurm]"'
        )
    import submitit

    wanted = dict(_settings(order.job))
    cluster = wanted.pop("cluster", "slurm")
    nodes = int(wanted.get("nodes", 1))
    if order.processes % nodes:
        raise EnvironmentFault(
            f"{order.processes} processes do not divide into {nodes} nodes", "--job nodes", "mend one"
        )
    logs = _own_folder(user_cache() / "jobs" / folder.name)
    try:
        executor = submitit.AutoExecutor(folder=str(logs), cluster=cluster)
        executor.update_parameters(name=folder.name, tasks_per_node=order.processes // nodes, **wanted)
        # All that its pickle holds is this list of words; no file of submitit's is read here.
        submitted = executor.submit(submitit.helpers.CommandFunction(list(command)))
    except Exception as error:  # noqa: BLE001 — submitit tells what Slurm refuses by errors of many kinds
        raise EnvironmentFault(f"no job could be submitted: {error}", "--launch slurm", "mend --job") from None
    terminal.say(f"job {submitted.job_id}: logs in {logs}")
    if cluster != "local":
        return 0
    submitted.wait()
    codes = (logs / f"{submitted.job_id}_{rank}_code" for rank in range(order.processes))
    return verdict({rank: _ended_task(path) for rank, path in enumerate(codes)})


def _ended_task(kept: Path) -> int:
    """The exit code that a task has kept; one that kept none was killed."""
    return int(kept.read_text()) if kept.exists() else -signal.SIGKILL


def _own_folder(folder: Path) -> Path:
    """A folder in which nobody else can write: a job runs what lies in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in (folder, folder.parent):
        found = one.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            what, fix = "others can write into this folder, and a job runs what lies in it", "chmod go-w, or remove it"
            raise EnvironmentFault(what, str(one), fix)
    return folder


def _settings(words: Iterable[str]) -> Iterable[tuple[str, Any]]:
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise EnvironmentFault("must look like key=value", f"--job {word}", "see docs/scale.md")
        yield key, int(value) if value.isdecimal() else value
