#!/bin/bash
#SBATCH --job-name=vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
#
# Train on the nodes that SLURM gives: one torchrun per node, one process per GPU.
#
#     sbatch [--nodes N ...] scripts/launch_slurm.sh pretrain --config configs/jft-like.yaml --out /shared/runs/big
#     bash scripts/launch_slurm.sh --dry-run pretrain ...      print what would be run, anywhere
#
# The words after the script are `vit`'s. The run directory must lie on a disk that all nodes share: one process writes it, not
# always on the same node. A process that dies is restarted with the others, from the last checkpoint. Five minutes before the
# time is up, or when the job is preempted, the run saves a checkpoint and the job goes back to the queue.
#
# Environment: PYTHON (python), NPROC (processes per node; gpu), PORT (29500), RESTARTS (3)
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
    dry_run=1
    shift
fi
if (($# == 0)); then
    echo "launch_slurm.sh: expected a vit command, such as: pretrain --config configs/jft-like.yaml --out /shared/runs/big" >&2
    exit 2
fi

if [[ -n ${SLURM_JOB_ID-} ]]; then
    nodes=$SLURM_JOB_NUM_NODES
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
elif [[ -n $dry_run ]]; then
    SLURM_JOB_ID=4711 nodes=2 head=node1
else
    echo "launch_slurm.sh: not a SLURM job; start it with sbatch, or give --dry-run first" >&2
    exit 2
fi

step=(
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60
    "${PYTHON:-python}" -m torch.distributed.run
    --nnodes="$nodes" --nproc-per-node="${NPROC:-gpu}" --max-restarts="${RESTARTS:-3}"
    --rdzv-backend=c10d --rdzv-endpoint="$head:${PORT:-29500}" --rdzv-id="$SLURM_JOB_ID"
    -m vitcli "$@"
)
if [[ -n $dry_run ]]; then
    printf '%q ' "${step[@]}"
    echo
    exit
fi

again=
# shellcheck disable=SC2329 # `trap` calls it
leave() {
    again=1
    scancel --signal=TERM "$SLURM_JOB_ID" # to the processes of the step, not to this shell: they save and end
}
trap leave USR1 TERM

"${step[@]}" &
while :; do
    code=0
    wait "$!" || code=$?
    kill -0 "$!" 2>/dev/null || break # else a signal ended `wait`, not the step
done
if [[ -n $again && $code -ne 0 ]]; then # 0: it had just finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
