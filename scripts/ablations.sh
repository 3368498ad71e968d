#!/usr/bin/env bash
# The tables of docs/results/ablations.md, from nothing; `vit study --dry-run` says how long. Started again, it goes on.
#   scripts/ablations.sh [OUT] [JOBS]
set -euo pipefail
out=${1:-runs/ablations} jobs=${2:-2}
for study in configs/ablations/*.yaml; do
    vit study --config "$study" --out "$out/$(basename "$study" .yaml)" --jobs "$jobs"
done
python scripts/ablation_results.py "$out"
