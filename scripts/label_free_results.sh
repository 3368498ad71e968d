#!/usr/bin/env bash
# The tables of docs/results/without-labels.md, from nothing; `vit sweep --dry-run` says how long. Started again, it goes on.
#   scripts/label_free_results.sh DATA OUT    DATA holds cifar10/ and tiny-imagenet-100/ (tar shards)
set -euo pipefail
data=$1 out=$2
for start in mae masked-patch tiny-imagenet; do
    vit pretrain --config "configs/$start.yaml" "data.source=shards:$data/tiny-imagenet-100" train.examples=1_000_000 --out "$out/$start"
    vit eval --ckpt "$out/$start" --dataset cifar10 --data-root "$data" --fewshot 5,100 --linear --json >"$out/probes-$start.json"
done
for labels in 1000 5000; do
    vit sweep --ckpt "$out/mae" --ckpt "$out/masked-patch" --ckpt "$out/tiny-imagenet" --from-scratch --dataset cifar10 --data-root "$data" \
        --config configs/cifar10-finetune.yaml --lrs 0.0003,0.001,0.003 --seeds 3 --jobs 2 --out "$out/sweep-$labels" \
        "data.examples=$labels" data.dev_fraction=0.2 train.steps=750 log.eval_every_steps=375
done
# four times as long, without the start that had labels; one rate: the one that random weights chose above
vit sweep --ckpt "$out/mae" --ckpt "$out/masked-patch" --from-scratch --dataset cifar10 --data-root "$data" \
    --config configs/cifar10-finetune.yaml --lrs 0.001 --seeds 3 --jobs 2 --out "$out/sweep-1000-long" \
    data.examples=1000 data.dev_fraction=0.2 train.steps=3000 log.eval_every_steps=1500
python scripts/label_free_results.py "$out"
