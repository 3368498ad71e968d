#!/bin/bash
# Train on several machines without a scheduler: over ssh, one torchrun per machine, one process per GPU.
#
#     scripts/launch_nodes.sh node1,node2 pretrain --config configs/jft-like.yaml --out /shared/runs/big
#     scripts/launch_nodes.sh --dry-run node1,node2 pretrain ...      print what would be run
#
# The words after the hosts are `vit`'s. Every host needs ssh without a password, this directory under the same path and the same
# Python, a way to reach the first host's PORT, and the data. The run directory must lie on a disk that all hosts share: one
# process writes it, not always on the same host. A process that dies is restarted with the others, from the last checkpoint.
# Ctrl-C or SIGTERM here ends the run everywhere, after a checkpoint; the same command goes on from it.
#
# Environment: PYTHON (python; a path, if ssh finds another one), NPROC (processes per machine; gpu), PORT (29500), RESTARTS (3)
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
    dry_run=1
    shift
fi
if (($# < 2)); then
    echo "launch_nodes.sh: expected hosts and a vit command, such as: node1,node2 pretrain --config configs/jft-like.yaml" >&2
    exit 2
fi
IFS=, read -r -a hosts <<<"$1"
shift

id=vit-$$-$(date +%s)
torchrun=(
    "${PYTHON:-python}" -m torch.distributed.run
    --nnodes="${#hosts[@]}" --nproc-per-node="${NPROC:-gpu}" --max-restarts="${RESTARTS:-3}"
    --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:${PORT:-29500}" --rdzv-id="$id"
    -m vitcli "$@"
)
printf -v quoted '%q ' "${torchrun[@]}"
printf -v here '%q' "$PWD"

begin=() end=() clean=() # what each host runs: the shell that writes its number down becomes torchrun
for rank in "${!hosts[@]}"; do
    number=/tmp/$id.$rank
    begin+=("cd $here && echo \$\$ >$number && exec $quoted")
    end+=("kill -TERM \"\$(cat $number)\"")
    clean+=("rm -f $number")
done
if [[ -n $dry_run ]]; then
    for rank in "${!hosts[@]}"; do
        printf 'ssh %s %q\n' "${hosts[rank]}" "${begin[rank]}"
    done
    exit
fi

# shellcheck disable=SC2329 # `trap` calls it
stop() {
    for rank in "${!hosts[@]}"; do
        ssh -o BatchMode=yes "${hosts[rank]}" "${end[rank]}" || true
    done
}
trap stop INT TERM

sessions=()
for rank in "${!hosts[@]}"; do
    setsid ssh -o BatchMode=yes "${hosts[rank]}" "${begin[rank]}" </dev/null & # apart, so that Ctrl-C reaches this shell alone
    sessions+=("$!")
done
code=0
for session in "${sessions[@]}"; do
    while :; do
        own=0
        wait "$session" || own=$?
        kill -0 "$session" 2>/dev/null || break # else a signal ended `wait`, not the session
    done
    ((own == 0)) || code=$own
done
for rank in "${!hosts[@]}"; do
    ssh -o BatchMode=yes "${hosts[rank]}" "${clean[rank]}" || true
done
exit "$code"
