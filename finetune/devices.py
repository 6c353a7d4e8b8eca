"""Plan → accelerate: the device, and the trackers. The only file that knows them.

One process and one device for now; a launcher that started several is told so instead of training twice in one folder.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault

_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
PROJECT = "finetune"


@dataclass(frozen=True)
class Session:
    """An accelerator and whether it logs anywhere besides the run folder's own metrics file."""

    accelerator: Any
    tracker: str
    prefix: str = ""
    """Stands before every name that is logged: several adapters share one tracked run."""

    @property
    def tracking(self) -> bool:
        return self.tracker != "none"

    def log(self, values: dict[str, float], step: int) -> None:
        if self.tracking:
            self.accelerator.log({f"{self.prefix}{name}": value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        if self.tracking:
            with contextlib.redirect_stdout(io.StringIO()):
                self.accelerator.end_training()
                if self.tracker == "trackio":
                    # accelerate ends the run but leaves it current: trackio would end it again at exit, and say so.
                    import trackio

                    trackio.finish()


def start(tracker: str, folder: Path, run_name: str, config: dict[str, Any], device: str) -> Session:
    """Start accelerate and the recipe's tracker.

    Raises:
        EnvironmentFault: several processes were launched, or the tracker's package is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EnvironmentFault(
            "several processes were launched, one is supported so far", "WORLD_SIZE", "start `finetune train` alone"
        )
    refuse_missing(tracker, f"tracker: {tracker}")
    _place(tracker, folder)
    from accelerate import Accelerator

    names = [] if tracker == "none" else [tracker]
    accelerator = Accelerator(cpu=device == "cpu", log_with=names or None, project_dir=str(folder / "trackers"))
    if names:
        # trackio greets on standard output with advice that `finetune dashboard` replaces.
        with contextlib.redirect_stdout(io.StringIO()) if tracker == "trackio" else contextlib.nullcontext():
            settings = {tracker: _settings(tracker, folder, run_name)}
            accelerator.init_trackers(PROJECT, config=config, init_kwargs=settings)
    return Session(accelerator, tracker)


def refuse_missing(tracker: str, where: str) -> None:
    """Raise EnvironmentFault where the tracker's package is not installed."""
    if tracker in _PACKAGES and find_spec(_PACKAGES[tracker]) is None:
        what, fix = f"the package {_PACKAGES[tracker]} is not installed", f'pip install "finetune-qwen[{tracker}]"'
        raise EnvironmentFault(what, where, fix)


def _place(tracker: str, folder: Path) -> None:
    """Keep every tracker's files beside the runs, and what it would tell its makers here.

    These libraries take both from the environment only.
    """
    if tracker == "trackio":
        os.environ["TRACKIO_DIR"] = str(trackio_folder(folder.parent))
    elif tracker == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(folder.parent / 'mlflow.db').absolute()}")
    elif tracker == "wandb":  # it sends its own errors and timings even of a run that it keeps offline
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def trackio_folder(runs: Path) -> Path:
    return runs.absolute() / "trackio"


def _settings(tracker: str, folder: Path, run_name: str) -> dict[str, Any]:
    if tracker == "trackio":
        return {"name": run_name, "resume": "allow", "embed": False}
    if tracker == "wandb":
        mode = "online" if wandb_key() else "offline"
        return {"name": run_name, "mode": mode, "dir": str(folder), "id": run_name, "resume": "allow"}
    return {}


def wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or stored by its own login."""
    netrc = Path.home() / ".netrc"
    stored = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
    return bool(os.environ.get("WANDB_API_KEY")) or stored
