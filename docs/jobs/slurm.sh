#!/bin/bash
# sbatch docs/jobs/slurm.sh: one process a GPU, on one node or several; put back in the queue until it is done.
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

# Where the processes find the first one: Slurm does not say it in torch's words.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Each process refuses to begin unless there are as many as --world says. It ends with code 6, saved, before the time is over.
srun .venv/bin/finetune train recipes/qwen14b-qlora-24gb.yaml --world "$SLURM_NTASKS" --max-time 3h50m --quiet
code=$?

if [ "$code" -eq 6 ]; then # interrupted, and the same command goes on
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
