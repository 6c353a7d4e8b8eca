"""A process's place in its job: what a launcher says, and each way in which it may not be what was asked for."""

from __future__ import annotations

import pytest

from finetune.errors import EnvironmentFault
from finetune.jobplace import Place, find

TORCH = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


def test_where_a_process_stands() -> None:
    assert find(None, {}) is None
    assert find(1, {}) is None
    assert find(4, TORCH) == Place(rank=3, world=4, local_rank=1)
    assert find(2, SLURM) == Place(rank=1, world=2, local_rank=0)
    assert find(None, SLURM) is None, "a shell inside an allocation is no job of several"


@pytest.mark.parametrize(
    ("asked", "variables", "what", "fix"),
    [
        (None, TORCH, "4 processes were launched, and nothing says that they are one job", "add --world 4"),
        (2, {}, "2 processes were asked for, and the launcher has started 1", "nothing was begun"),
        (2, TORCH, "2 processes were asked for, and the launcher has started 4", "nothing was begun"),
        (1, TORCH, "1 processes were asked for, and the launcher has started 4", "nothing was begun"),
        (4, SLURM, "4 processes were asked for, and the launcher has started 2", "nothing was begun"),
        (4, {**TORCH, "ACCELERATE_USE_FSDP": "true"}, "set up for FSDP", "launch without it"),
        (4, {**TORCH, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "set up for FSDP", "set train.shard: fsdp"),
        (4, {**TORCH, "ACCELERATE_USE_DEEPSPEED": "1"}, "set up for DeepSpeed", "launch without it"),
        (4, {key: value for key, value in TORCH.items() if key != "RANK"}, "does not say which process", "--processes"),
        (4, {**TORCH, "RANK": "4"}, "does not say which process", "--processes"),
        (4, {**TORCH, "RANK": "-1"}, "does not say which process", "--processes"),
        (4, {key: value for key, value in TORCH.items() if key != "MASTER_PORT"}, "where the first", "--processes"),
    ],
)
def test_what_does_not_hold_is_refused(asked: int | None, variables: dict[str, str], what: str, fix: str) -> None:
    with pytest.raises(EnvironmentFault) as refused:
        find(asked, variables)
    (fault,) = refused.value.faults
    assert what in fault.what
    assert fix in fault.fix


def test_a_launcher_for_fsdp_2_serves_a_recipe_in_shards() -> None:
    fsdp = {**TORCH, "ACCELERATE_USE_FSDP": "true"}
    assert find(4, {**fsdp, "FSDP_VERSION": "2"}, shard="fsdp") == Place(rank=3, world=4, local_rank=1)
    assert find(4, TORCH, shard="fsdp") == Place(rank=3, world=4, local_rank=1)
    with pytest.raises(EnvironmentFault, match=r"set up for FSDP 1, and train.shard is FSDP 2"):
        find(4, fsdp, shard="fsdp")
    with pytest.raises(EnvironmentFault, match="set up for DeepSpeed"):
        find(4, {**TORCH, "ACCELERATE_USE_DEEPSPEED": "true"}, shard="fsdp")
