#!/bin/bash
# `sbatch --nodes 2 cluster/deploy/slurm.sh serve /models/NAME --ranks 4`: one Ray cluster per job, by `ray symmetric-run`.
#
# Every node runs the same line: it starts Ray; the first node waits until all are there, runs `switchgear ARGUMENTS
# --ray-address ...`, and Ray ends everywhere when that ends. Ranks on several nodes send tokens between them in the
# clear (gloo), so the job says --trusted-network: use it where only the job's nodes reach that network.
#
# Settings by environment: SWITCHGEAR (the command, default `switchgear`), RAY (default `ray`), RAY_PORT (default 6379).
#
# Run: on one node, `ray symmetric-run` and all below it for real, with scontrol and srun replaced by programs that
#   answer for one node (tests/cluster/deploy).
# Not run: under a real Slurm; on several nodes.
#SBATCH --job-name=switchgear
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "usage: sbatch [--nodes N] $0 serve MODEL [flags of switchgear serve]" >&2
  exit 2
fi

switchgear=${SWITCHGEAR:-switchgear}
ray=${RAY:-ray}
port=${RAY_PORT:-6379}
nodes=${SLURM_JOB_NUM_NODES:-1}
head_name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(srun --nodes=1 --ntasks=1 --nodelist="$head_name" hostname --ip-address | awk '{print $1}')

network=()
if [ "$nodes" -gt 1 ]; then
  network=(--trusted-network)
fi

# A token for this job alone: Ray lets whoever reaches its ports run code.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')

# SWITCHGEAR and RAY may be several words, so they are not quoted.
# shellcheck disable=SC2086
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL \
  $ray symmetric-run --address "$head_address:$port" --min-nodes "$nodes" --num-cpus "${SLURM_CPUS_PER_TASK:-8}" \
  --include-dashboard=false -- $switchgear "$@" --ray-address "$head_address:$port" ${network[@]+"${network[@]}"}
