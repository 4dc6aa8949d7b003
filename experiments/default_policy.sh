#!/usr/bin/env bash
# The shipped policy and its tables: trains it, judges it on held-out runs of one family that it has trained on and of two
# that it has not, and keeps the figures. A few hours of one core at most.
#
#   bash experiments/default_policy.sh [OUT]        OUT: runs/default_policy
#
# To ship the result: rm -r policies/bundled/default && cp -r OUT/train/policy policies/bundled/default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/default_policy}
trimtab() { .venv/bin/trimtab "$@"; }

trimtab train mlp-mix --timesteps 700000 --seed 0 --out "$out/train"
for scenario in digits-mlp tabular-mlp digits-mlp-tanh; do
    trimtab bench --policies "$out/train/policy" constant step exponential cosine warmup-cosine cosine-restarts wsd one-cycle \
        plateau greedy random --scenarios "$scenario" --runs 160 --seed 0 --tuned --out "$out/bench/$scenario"
done
