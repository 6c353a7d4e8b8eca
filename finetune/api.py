"""finetune from Python: the functions that the command line calls, with paths as text or ``Path``.

Nothing is printed unless ``progress=True``; whatever is wrong is raised as a ``finetune.errors.FinetuneError`` that
carries what is wrong, where, and what to do. Importing this module loads no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune import hardware
from finetune.errors import FinetuneError, Interrupted
from finetune.recipe import Recipe
from finetune.terminal import Terminal

if TYPE_CHECKING:
    from finetune.joint_plan import JointPlan
    from finetune.plan import Plan
    from finetune.runfolder import RunFolder

__all__ = [
    "FinetuneError", "Interrupted", "Recipe", "compare", "evaluate", "export", "load_recipe", "merge", "plan",
    "predict", "train", "verify",
]  # fmt: skip

PathLike = str | os.PathLike[str]


def load_recipe(path: PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read and judge a recipe; data and model are not looked at.

    Args:
        path: the YAML file.
        overrides: ``key=value`` texts, as of ``--set``.

    Raises:
        RecipeError: every fault of it, each with its place.
    """
    from finetune import recipe

    return recipe.load(Path(path), overrides)


def plan(
    recipe: PathLike, overrides: Sequence[str] = (), *, card: float | None = None, progress: bool = False
) -> Plan | JointPlan:
    """Check a recipe, its data and its model; → what a run would do and cost.

    Args:
        recipe: the YAML file.
        overrides: ``key=value`` texts, as of ``--set``.
        card: plan for a CUDA card with so many GB instead of for this machine.
        progress: print what the command line prints.

    Raises:
        RecipeError, DataError, ModelError, EnvironmentFault: as the command line says them.
    """
    from finetune import pipeline

    return pipeline.plan(Path(recipe), overrides, _screen(progress), card)


def train(
    recipe: PathLike, overrides: Sequence[str] = (), *,
    extend: bool = False, until: int | None = None, progress: bool = False,
) -> list[RunFolder]:  # fmt: skip
    """Run a recipe to its end, or go on with it where it was interrupted; → its run folder, or one an adapter.

    Args:
        recipe: the YAML file.
        overrides: ``key=value`` texts, as of ``--set``.
        extend: lengthen a run to the recipe's new steps.
        until: judge after this step and pause there.
        progress: print what the command line prints.

    Raises:
        Interrupted: stopped on request (Ctrl-C, SIGTERM); the same call goes on.
        RecipeError, DataError, ModelError, EnvironmentFault: as the command line says them.
    """
    from finetune import pipeline

    return pipeline.train(Path(recipe), overrides, _screen(progress), extend=extend, until=until)


def evaluate(
    model: PathLike, *, data: PathLike | None = None, merged: PathLike | None = None,
    overrides: Sequence[str] = (), fresh: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Judge a finished run's base, adapter and merged model, or a bare model's folder.

    Args:
        model: the run's folder, or the model's.
        data: other rows to judge on; a bare model needs them.
        merged: the merged model, where it is not the run's own ``merged``.
        overrides: ``evaluate.key=value`` texts: judge otherwise than the run did.
        fresh: measure anew what was measured before.
        progress: print what the command line prints.

    Raises:
        RecipeError, DataError, ModelError, EnvironmentFault: as the command line says them.
    """
    from finetune import pipeline

    return pipeline.evaluate(
        Path(model), _screen(progress), data=_path(data), merged=_path(merged), overrides=tuple(overrides), fresh=fresh
    )


def predict(
    model: PathLike, data: PathLike, out: PathLike, *,
    base: bool = False, max_new_tokens: int = 256, batch_rows: int = 16, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Answer every row of a file greedily, or score it where the model is a reward model, into ``out`` as JSON lines; a
    killed call goes on. → what it did.

    Args:
        model: a run's folder, an adapter's or a model's.
        data: the rows, in any format that trains.
        out: the file for the answers.
        base: of a run, ask its bare base.
        max_new_tokens: the longest answer, in tokens.
        batch_rows: rows answered at once.
        progress: print what the command line prints.

    Raises:
        DataError, ModelError, EnvironmentFault: as the command line says them.
    """
    from finetune import pipeline

    how = {"base": base, "max_new_tokens": max_new_tokens, "batch_rows": batch_rows}
    return pipeline.predict(Path(model), Path(data), Path(out), _screen(progress), **how, sampling=None)


def compare(runs: Sequence[PathLike]) -> dict[str, Any]:
    """What differs between runs, how each went, and whether one is better than the first.

    Raises:
        EnvironmentFault: a folder holds no run, or fewer than two runs are named.
    """
    from finetune import compare as comparing

    return comparing.compare([Path(run) for run in runs])


def merge(
    run: PathLike, out: PathLike, *, base: Literal["auto", "replayed", "original"] = "auto",
    layout: Literal["native", "original"] = "native", correct: int = 0, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fold a run's adapter into its base and prove that the result is the trained model; → how, and the proof.

    Args:
        run: a finished run's folder, or an adapter's.
        out: the folder to write, which must not exist.
        base: which base to fold into: what is nearer to the live model, as trained against, or as published.
        layout: plain transformers', or the first Qwen's own.
        correct: rank of a correction of the published base towards the quantised one; 0 for none.
        progress: print what the command line prints.

    Raises:
        FinetuneError: the proof does not hold.
        ModelError, EnvironmentFault: as the command line says them.
    """
    from finetune import pipeline

    asked = {"base": base, "layout": layout, "correct": correct}
    return pipeline.merge(Path(run), Path(out), asked, _screen(progress))


def export(
    run: PathLike, out: PathLike, to: Literal["adapter", "huggingface", "gguf", "ollama", "original"] = "adapter", *,
    target: Literal["peft", "vllm"] = "peft", quantize: str | None = None, adapter_only: bool = False,
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a run's result for another program; → what was written.

    Args:
        run: a finished run's folder.
        out: the folder to write (``gguf``: the file), which must not exist.
        to: plain LoRA, the merged model in a layout, or a GGUF file, for Ollama with its Modelfile.
        target: of ``adapter``, who is to load it.
        quantize: of ``gguf`` and ``ollama``, the form of the weights, such as ``q4_k_m``.
        adapter_only: of ``gguf``, the adapter without its base.
        progress: print what the command line prints.

    Raises:
        ModelError, EnvironmentFault: as the command line says them.
    """
    from finetune import pipeline

    how = {"target": target, "quantise": quantize, "adapter_only": adapter_only}
    return pipeline.export(Path(run), Path(out), to, _screen(progress), **how)


def verify(release: PathLike, *, key: PathLike | None = None) -> list[str]:
    """Check every byte of a release; → what does not hold, empty where all does. Needs no torch.

    Args:
        release: the folder that ``finetune release`` made, or a copy of it.
        key: the public key that it must be signed with.

    Raises:
        ModelError: the folder is no release.
        EnvironmentFault: a signature cannot be checked here.
    """
    from finetune import seal

    return seal.faults(Path(release), _path(key))


def _path(given: PathLike | None) -> Path | None:
    return None if given is None else Path(given)


def _screen(progress: bool) -> Terminal:
    hardware.set_libraries()
    return Terminal(out=sys.stdout, quiet=not progress, silent=not progress)
