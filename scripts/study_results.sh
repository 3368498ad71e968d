#!/usr/bin/env bash
# The studies of docs/results/scale-vs-inductive-bias.md, from nothing, with every seed; hours on 2 CPU cores. Started again, it goes on.
#   scripts/study_results.sh DATA OUT    DATA holds cifar10/ and tiny-imagenet-100/ (tar shards)
# OUT/study-*/ then hold what docs/results/study-*/ shows: study.md, results.csv and figures/. --jobs 2 is for 2 cores.
set -euo pipefail
data=$1 out=$2
for study in full controls; do
    vit study --config "configs/study-$study.yaml" --out "$out/study-$study" --jobs 2
done
vit study --config configs/study-tiny-imagenet.yaml --out "$out/study-tiny-imagenet" --jobs 2 \
    "base.data.source=shards:$data/tiny-imagenet-100" "base.data.root=$data"

# The same weights on other layouts of the same parts, features frozen; 100 images of each new class to learn from.
for family in vit resnet; do
    for seed in 0 1 2; do
        for step in 00003125 00012500; do
            vit eval --ckpt "$out/study-full/cells/plain/$family/n000800000/s$seed/run/checkpoints/step_$step" --dataset mosaic:100 \
                --linear --json data.mosaic.train_examples=10000 data.mosaic.val_examples=4000 >"$out/other-layouts-$family-$seed-$step.json"
        done
    done
done
