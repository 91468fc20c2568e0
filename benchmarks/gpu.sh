#!/usr/bin/env bash
# All that wants a GPU, in about nine minutes: kernel tests, launches, loss and step. Needs
# `pip install -e ".[bench]"`. Results go to $1 (default: benchmarks/results); a part that fails or takes too long does
# not stop the next.
cd "$(dirname "$0")/.." || exit 1
results=${1:-benchmarks/results}
mkdir -p "$results"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
OKD_TEST_DEVICE=cuda timeout 150 python -m pytest -q -x --tb=short tests/test_linear_distillation.py
timeout 90 python -m benchmarks.tune --output "$results/gpu-tune.json"
timeout 200 python -m benchmarks.loss --device cuda --preset "llama-1b<-8b" --divergence okd,forward_kl,jsd \
    --workspace-mib 2048 --repeats 5 --output "$results/gpu-loss.json"
timeout 120 python -m benchmarks.step --device cuda --rounds 1 --output "$results/gpu-step.json"
