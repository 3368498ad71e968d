#!/usr/bin/env bash
# The studies of docs/results/scale-vs-inductive-bias.md, from nothing, with every seed; hours on 2 CPU cores. Started again, it goes on.
#   scripts/study_results.sh DATA OUT    DATA holds cifar10/ and tiny-imagenet-100/ (tar shards)
# OUT/study-*/ then hold what docs/results/study-*/ shows: study.md, results.csv and figures/. --jobs 2 is for 2 cores.
set -euo pipefail
data=$1 out=$2
full=$out/study-full/cells/plain
for study in full controls; do
    vit study --config "configs/study-$study.yaml" --out "$out/study-$study" --jobs 2
done
vit study --config configs/study-tiny-imagenet.yaml --out "$out/study-tiny-imagenet" --jobs 2 \
    "base.data.source=shards:$data/tiny-imagenet-100" "base.data.root=$data"

# How the rates of study-full.yaml's fine-tuning were chosen: four for each family, on layouts that nothing else is measured on.
for family in "vit 1e-3,2e-3,4e-3,8e-3" "resnet 4e-3,8e-3,1.6e-2,3.2e-2"; do
    read -r name rates <<<"$family"
    vit sweep --ckpt "$full/$name/n000800000/s0/run" --dataset mosaic:200 --lrs "$rates" --seeds 1 --no-early-stop \
        --out "$out/rates-$name" data.mosaic.train_examples=10000 data.mosaic.val_examples=10000 augment.crop=resize \
        augment.flip=false optim.name=muon train.epochs=4 train.batch_size=64
done

# The same weights on other layouts of the same parts, features frozen; 100 images of each new class to learn from.
for family in vit resnet; do
    for seed in 0 1 2; do
        for step in 00003125 00012500; do
            vit eval --ckpt "$full/$family/n000800000/s$seed/run/checkpoints/step_$step" --dataset mosaic:100 \
                --linear --json data.mosaic.train_examples=10000 data.mosaic.val_examples=4000 >"$out/other-layouts-$family-$seed-$step.json"
        done
    done
done
