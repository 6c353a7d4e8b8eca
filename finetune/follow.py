"""What the processes of a job do that do not lead it: take the first one's state, and their share of its steps.

They write nothing, judge nothing and decide nothing. What the first process holds they hold too, which it asks for
before every save.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune import fallback, identity, prepare, sharding, state
from finetune import train as training
from finetune.errors import RecipeError
from finetune.identity import Identity
from finetune.interrupts import stop_requests
from finetune.peers import COMPARE, OVER, PASS, PeerLost, Peers
from finetune.prepare import Prepared
from finetune.run import Run
from finetune.terminal import Terminal

_GRACE = 2.0
"""Seconds that a process stays whose leader is gone: a launcher tells of who ended first."""


def follow(recipe: Path, overrides: Sequence[str], peers: Peers) -> None:
    """Take part in the run of the first process until that says that it is over.

    Raises:
        RecipeError, DataError, ModelError: recipe, data or base are others here.
        Interrupted: stopped on request, or the first process has ended.
    """
    try:
        peers.barrier()  # what the first one reads and fetches for all is there
        _follow(prepare.prepare(recipe, overrides, processes=peers.world), peers)
    except PeerLost:
        with contextlib.suppress(KeyboardInterrupt):  # the launcher, which ends all that are left
            time.sleep(_GRACE)
        raise


def _follow(prepared: Prepared, peers: Peers) -> None:
    with stop_requests() as stop:
        peers.stopping = lambda: stop.requested
        said = peers.send()
        if not said:  # nothing to do
            return
        theirs = Identity(**json.loads(said))
        digests = None if peers.local_rank == 0 else theirs.base  # a machine's first process looks at its base
        run = Run(prepared, Terminal(silent=True), digests=digests, peers=peers)
        identity.compare(theirs, run.identity, run.folder.root, extend=False)
        if theirs.recipe["train.shard"] != run.identity.recipe["train.shard"]:
            what = f"the first process has train.shard: {theirs.recipe['train.shard']}"
            raise RecipeError(what, prepared.located.where("train.shard"), "give all processes one recipe")
        run.identity = theirs
        torch.set_num_threads(int(theirs.environment["threads"]))
        policy = training.attach(run, run.load())
        optimizer, scaler = training.optimizer_of(run, policy)
        saved = state.take(peers)
        if saved:
            state.put_back(policy, optimizer, scaler, saved, run.folder.checkpoints)
        start = saved.step if saved else 0
        events = fallback.steps(run, policy, run.course(), optimizer, start, scaler)
        with stop.deferred(), contextlib.closing(events), peers.noticing():
            while (word := peers.hear()) != OVER:
                if word == COMPARE:
                    peers.compare(lambda: state.fingerprint(policy, optimizer), "the state")
                elif word == PASS:
                    sharding.pass_along(policy)
                else:
                    next(events)
