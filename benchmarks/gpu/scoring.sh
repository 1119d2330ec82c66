#!/bin/sh
# Runs benchmarks/scoring.py on one CUDA GPU in bf16 and fp32, after the tests that compare the two.
#     sh benchmarks/gpu/scoring.sh [PYTHON]
set -eu
python=${1:-.venv/bin/python}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA GPU here"'
"$python" -m pytest tests/scoring/test_cuda.py
exec "$python" benchmarks/scoring.py --device cuda --per-set 512 --rounds 5 --pools 100 \
    --target benchmarks/results/scoring-cuda.json
