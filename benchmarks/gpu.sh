#!/bin/sh
# Everything that needs a GPU, unattended and without network, in under 9 minutes:
#   sh benchmarks/gpu.sh
# 1. build the kernels and check them against float64; a failure stops here, nothing is timed
# 2. time them; results go to benchmarks/results/<device>.json after every case
# 3. print one table
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=. TOKENIZERS_PARALLELISM=false
results=benchmarks/results/$(python -c 'from benchmarks.gpu_head import default_path; print(default_path().name)')

timeout 210 python -m pytest -q -x -m gpu -p no:cacheprovider tests/kernels/test_kernels_gpu.py
timeout 300 python -m benchmarks.gpu_head --minutes 4 --json "$results" > /dev/null ||
    echo "benchmarks.gpu_head ended early with code $?: the table has what was done by then"
# Further GPU benchmarks go here, one line each, with a timeout, writing a key of their own to $results.

python -m benchmarks.gpu_head --table "$results"
