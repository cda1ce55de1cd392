#!/usr/bin/env bash
# Two nodes, one task per GPU; data.batch_size is global, so it is the same experiment as on one.
#SBATCH --job-name=ndeflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
source .venv/bin/activate
srun python train.py "$@" trainer.accelerator=gpu trainer.devices=8 trainer.num_nodes=2
code=$?

# 85 means: saved and preempted, the same command goes on. The run directory says so too, in its file `state`.
[ "$code" -eq 85 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
