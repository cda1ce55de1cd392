#!/usr/bin/env bash
# Any number of nodes without a job scheduler. On each node, with its own RANK_OF_NODE (0, 1, …):
#
#   NODES=2 RANK_OF_NODE=0 MASTER=node0 PROCESSES=8 experiments/cluster/torchrun.sh flow/mnist run.name=mnist
#
# torchrun exits with 1 whatever its workers return: whether the run was preempted or has finished stands in the
# file `state` of the run directory.
set -u
NODES=${NODES:-1} RANK_OF_NODE=${RANK_OF_NODE:-0} MASTER=${MASTER:-127.0.0.1} PROCESSES=${PROCESSES:-2}
PORT=${PORT:-29500} ACCELERATOR=${ACCELERATOR:-gpu}
exec torchrun --nnodes="$NODES" --node_rank="$RANK_OF_NODE" --nproc_per_node="$PROCESSES" \
    --master_addr="$MASTER" --master_port="$PORT" \
    train.py "$@" trainer.accelerator="$ACCELERATOR" trainer.devices="$PROCESSES" trainer.num_nodes="$NODES"
