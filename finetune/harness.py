"""Tasks of lm-evaluation-harness, run on the very model that is judged: 4-bit base, live adapter or merged folder.

A task is a YAML file with its rows beside it, or one that the package brings (whose rows are on the hub). Such a file
is a program: it may name functions and templates that run here, so that it needs the trust that a script needs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from finetune import hardware, manifest
from finetune.errors import EnvironmentFault
from finetune.kernels import frozen_linear
from finetune.model import Policy
from finetune.terminal import Terminal, clean

_PACKAGE = "lm-eval"
_SEED = 1234
"""The package's own, of the examples that a question is given, and of what a task draws."""
_BOOTSTRAPS = 1000
"""Draws behind the standard error of a metric that has no formula for it."""


class Tasks:
    """Chosen tasks with their rows, loaded. ``chat``: each question goes through the model's chat template."""

    def __init__(self, names: Sequence[str], folder: Path | None, *, chat: bool) -> None:
        """
        Raises:
            EnvironmentFault: the package is absent, a task is unknown or broken, or its rows cannot be had.
        """
        self.names, self.chat = list(names), chat
        if folder is not None and not folder.is_dir():
            raise EnvironmentFault("this is not a folder", str(folder), "name the folder of the tasks' YAML files")
        try:
            self.version = version(_PACKAGE)
            with _quiet():
                from lm_eval.tasks import TaskManager
        except (PackageNotFoundError, ImportError) as error:
            what = f"tasks need lm-evaluation-harness, which cannot be imported ({clean(str(error), 200)})"
            raise EnvironmentFault(what, "--tasks", 'pip install "finetune-qwen[eval]"') from None
        with _quiet(), _told(names), contextlib.redirect_stderr(io.StringIO()):
            self.manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
            known = self.manager.all_tasks
            if unknown := [name for name in names if name not in known]:
                some = f"one of {', '.join(known[:8])}" if folder else "see `lm-eval ls tasks`"
                where = str(folder) if folder else "lm-eval"
                raise EnvironmentFault(f"there is no task {unknown[0]!r}", where, some)
            self.loaded = self.manager.load(self.names)["tasks"]

    def digest(self) -> str:
        """Of the tasks' settings and of all their rows, and of the package that asks them."""
        said: list[Any] = [self.version, self.names, self.chat]
        with _quiet(), _told(self.names), contextlib.redirect_stderr(io.StringIO()):
            for name, task in sorted(self.loaded.items()):
                said += [name, task.dump_config(), [dict(row) for row in task.eval_docs]]
                if task.config.num_fewshot:
                    said.append([dict(row) for row in task.fewshot_docs()])
        return manifest.digest_bytes(json.dumps(said, sort_keys=True, default=_named).encode())

    def run(self, policy: Policy, batch_rows: int, terminal: Terminal, *, adapter: bool) -> dict[str, dict[str, float]]:
        """Task → metric → number, with ``…_stderr`` beside it where there is one.

        Raises:
            EnvironmentFault: a task fails.
        """
        with _quiet(), _told(self.names):
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            loaded = self.manager.load(self.names)  # anew: tasks keep what they asked the last model
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=_SEED)
                if task.config.num_fewshot is None:
                    task.set_config(key="num_fewshot", value=0)

            dense = frozen_linear.held_dense(policy.model) if policy.device.type == "cpu" else contextlib.nullcontext()
            terminal.say(f"asking {', '.join(map(clean, self.names))} by lm-eval {self.version}")
            with policy.evaluating(adapter=adapter), dense, torch.random.fork_rng(), _shown(terminal):
                torch.manual_seed(_SEED)
                asked = HFLM(
                    pretrained=policy.causal_lm, tokenizer=policy.tokenizer, backend="causal", batch_size=batch_rows,
                    max_length=policy.positions,
                )  # fmt: skip
                found = lm_eval.evaluate(
                    asked, loaded, bootstrap_iters=_BOOTSTRAPS, log_samples=False, apply_chat_template=self.chat,
                    fewshot_as_multiturn=self.chat,
                )  # fmt: skip
        hardware.trim()
        return {task: _numbers(values) for task, values in (found or {}).get("results", {}).items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` → ``acc``; a filter's name is kept. What is no number is left out."""
    named = {}
    for key, value in values.items():
        metric, _, how = str(key).partition(",")
        if how and isinstance(value, int | float) and not isinstance(value, bool):
            named[metric if how == "none" else f"{metric} ({how})"] = float(value)
    return named


def _named(value: Any) -> str:
    """A function of a task by its name: its address differs from run to run."""
    return str(getattr(value, "__qualname__", type(value).__name__))


@contextlib.contextmanager
def _told(names: Sequence[str]) -> Iterator[None]:
    """Whatever goes wrong inside the package or a task file, as one fault."""
    try:
        yield
    except (EnvironmentFault, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - task files are programs, and fail in any way
        what = f"lm-eval cannot do this: {type(error).__name__}: {clean(str(error), 400)}"
        raise EnvironmentFault(what, ", ".join(map(clean, names)), "mend the task, or leave it out") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's own chatter; its warnings are of other ways to start it."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _shown(terminal: Terminal) -> contextlib.AbstractContextManager[Any]:
    """The package's bars, where there is a terminal to draw them on."""
    drawn = terminal.live and not (terminal.quiet or terminal.silent)
    return contextlib.nullcontext() if drawn else contextlib.redirect_stderr(io.StringIO())
