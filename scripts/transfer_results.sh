#!/usr/bin/env bash
# The CIFAR-10 transfer table of docs/results/transfer.md, from nothing: about 2 hours on 2 CPU cores. Started again, it goes on.
#   scripts/transfer_results.sh DATA OUT    DATA holds cifar10/ and tiny-imagenet-100/ (tar shards)
set -euo pipefail
data=$1 out=$2
vit pretrain --config configs/jft-like.yaml --out "$out/jft-like"
vit pretrain --config configs/tiny-imagenet.yaml "data.source=shards:$data/tiny-imagenet-100" --out "$out/tiny-imagenet"
for start in jft-like tiny-imagenet; do
    vit eval --ckpt "$out/$start" --dataset cifar10 --data-root "$data" --fewshot 1,5,10,25 --linear --knn 20 --json >"$out/probes-$start.json"
done
vit sweep --ckpt "$out/jft-like" --ckpt "$out/tiny-imagenet" --from-scratch --dataset cifar10 --data-root "$data" \
    --lrs 0.003,0.01,0.03,0.1 --trial-steps 75 --seeds 3 --jobs 2 --out "$out/sweep" \
    train.steps=300 train.batch_size=128 log.eval_every_steps=150
