#!/usr/bin/env bash
# Measures the rows of the CPU suite again, all of them or those named, into docs/benchmarks/cpu.*; run it on idle cores.
# With LOCK=FILE every row waits for that lock, so that measurements of several programs do not disturb each other.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
rows=("$@")
if [ ${#rows[@]} -eq 0 ]; then
    mapfile -t rows < <(hybridvl bench suite cpu --list)
fi
for row in "${rows[@]}"; do
    command=(hybridvl bench suite cpu --rows "$row" --threads "$OMP_NUM_THREADS" --out docs/benchmarks)
    if [ -n "${LOCK:-}" ]; then
        flock "$LOCK" "${command[@]}"
    else
        "${command[@]}"
    fi
done
