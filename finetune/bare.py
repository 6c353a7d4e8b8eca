"""A bare model's folder, merged or a base: whole, and held in the number format that this machine computes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import base as bases
from finetune import hardware, manifest, model, objectives, recipe, source, tokenizer
from finetune.base import Base
from finetune.errors import ModelError
from finetune.loading import BaseForm
from finetune.model import Policy
from finetune.objectives import Objective
from finetune.recipe.sections import Evaluate
from finetune.renderer import Renderer
from finetune.terminal import ByteBar, Terminal


@dataclass(frozen=True, kw_only=True)
class Bare:
    """A model that is not loaded yet."""

    base: Base
    form: BaseForm

    def identity(self, terminal: Terminal) -> dict[str, Any]:
        """What it is: the digests of its files, and its form."""
        bar = ByteBar.over(terminal, "verifying the model", self.base.files())
        return {"base": self.base.digests(bar.more), "form": asdict(self.form)}

    def wanted(self, overrides: Sequence[str]) -> Evaluate:
        """How it is judged: by loss and, where it writes text, exact match, and what is overridden."""
        return recipe.evaluation(overrides, ("loss",) if self.base.shape.scored else ("loss", "exact_match"))

    def objective(self, metrics: Sequence[str]) -> Objective | None:
        """What judges its pairs where it is a reward model, without a margin. Raises ModelError for other metrics."""
        if not self.base.shape.scored:
            return None
        for metric in metrics:
            if metric != "loss":
                bases.refuse_scorer(self.base.folder, f"the metric {metric}")
        return objectives.get("reward", {"margin": 0.0, "centre_rewards_coefficient": 0.0})

    def renderer(self) -> Renderer:
        return Renderer(tokenizer.of(self.base), self.base.stop_token, piecewise=self.base.piecewise)

    def load(self, terminal: Terminal) -> Policy:
        return model.load_base(self.base, self.form, ByteBar(terminal, "loading the model").at)


def find(folder: Path) -> Path | None:
    """Where a model lies, by its folder or its id on the hub; None where no model of that name is on this disk."""
    here = source.find(str(folder), None)
    place = here.folder if here else folder
    return place if (place / "config.json").is_file() else None


def inspect(folder: Path, form: BaseForm | None = None) -> Bare:
    """The model in a folder, in ``form`` or in what this machine computes in.

    Raises:
        ModelError: it is damaged, or holds not just what its own manifest says.
    """
    if faults := manifest.faults(folder) if (folder / manifest.NAME).is_file() else []:
        raise ModelError(faults[0], str(folder), "fetch it, or merge again")
    machine = hardware.detect()
    compute = "bf16" if machine.bf16 else "fp32"
    own = BaseForm(weights=compute, double=False, compute=compute, device=machine.device)
    return Bare(base=bases.inspect(folder), form=form or own)
