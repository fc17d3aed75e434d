#!/usr/bin/env bash
# Several machines, by hand: run this on each of them, with the same HOST (one of them, reachable from all) and NODES.
# The output_dir of run.yaml is read and written by the first rank alone; data and rewards have to be on every machine.
# Run on two hosts that network namespaces faked (tests/faults/test_network.py); never on two machines.
set -euo pipefail
: "${NODES:?how many machines}" "${HOST:?host:port of one of them}" "${GPUS:=1}"
# else processes that start again wait for the dead (torch 2.13)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HOST" --rdzv-id "${RUN_ID:-klimb}" \
  -m klimb climb -c "${1:-run.yaml}"
