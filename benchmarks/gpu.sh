#!/usr/bin/env bash
# All that wants a GPU, in less than nine minutes: kernel tests, launches, loss and step. Needs `pip install -e ".[test]"`;
# peers of the extra `bench` that are not there are left out. Results go to $1 (default: benchmarks/results), each as soon
# as it is known: a part that fails or takes too long stops neither the next nor loses what it has.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
results=${1:-benchmarks/results}
mkdir -p "$results"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
parallel=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
OKD_TEST_DEVICE=cuda timeout --signal=INT 110 "$python" -m pytest -q --tb=short --maxfail=20 $parallel \
    tests/test_gpu.py tests/test_numerics.py tests/test_options.py tests/test_masking.py tests/test_autograd.py \
    tests/test_sparse.py tests/test_sparse_rows.py
timeout -k 5 80 "$python" -m benchmarks.tune --output "$results/gpu-tune.json"
timeout -k 5 160 "$python" -m benchmarks.loss --device cuda --preset "llama-1b<-8b" --divergence okd,forward_kl,jsd \
    --workspace-mib 2048 --repeats 3 --output "$results/gpu-loss.json"
timeout -k 5 180 "$python" -m benchmarks.step --device cuda --batch-size 8 --length 512 --rounds 1 --steps 3 --warmup 1 \
    --methods forward_kd okd forward_kd:teacher_cache=new okd:online_layers=0.125,teacher_cache=new --eager --output "$results/gpu-step.json"
