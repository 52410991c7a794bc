#!/bin/bash
# Trains on all GPUs of one or several nodes. On one node:
#   configs/torchrun.sh configs/node_full.yaml --data.train_files LOG.jsonl
# On two, the first on node0 and the second on the other:
#   NNODES=2 NODE_RANK=0 HEAD=node0 configs/torchrun.sh configs/nodes_full.yaml --data.train_files LOG.jsonl
#   NNODES=2 NODE_RANK=1 HEAD=node0 configs/torchrun.sh configs/nodes_full.yaml --data.train_files LOG.jsonl
# The first argument is a config; more options may follow, such as --trainer.strategy fsdp2. With several nodes run_folder
# has to be a folder that all of them see. The same command with --ckpt_path auto goes on with a run that was stopped.
set -euo pipefail

NNODES=${NNODES:-1}        # number of nodes
NODE_RANK=${NODE_RANK:-0}  # 0 on the first node, 1 on the second ...
HEAD=${HEAD:-127.0.0.1}    # name or address of the first node, as the others see it
PORT=${PORT:-29500}        # a free port there
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}  # processes of this node, one for each GPU; the same on all nodes

# Threads of each process: an even share of the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > GPUS ? $(nproc) / GPUS : 1))}

exec torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
    --master_addr "$HEAD" --master_port "$PORT" \
    -m bco_lightning fit --config "$@" --trainer.num_nodes "$NNODES" --trainer.devices "$GPUS"
