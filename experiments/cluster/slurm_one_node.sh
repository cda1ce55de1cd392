#!/usr/bin/env bash
# One node, one task per GPU. Submit with: sbatch experiments/cluster/slurm_one_node.sh flow/mnist run.name=mnist
#SBATCH --job-name=ndeflow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
source .venv/bin/activate
srun python train.py "$@" trainer.accelerator=gpu trainer.devices=8
code=$?

# 85 means: saved and preempted, the same command goes on. The run directory says so too, in its file `state`.
[ "$code" -eq 85 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
