#!/usr/bin/env bash
# Gluon's kernels for 192 dimensions of queries and keys on one Hopper GPU, in one call of some minutes, most of which
# are compiling: benchmarks/gpu_wide.sh OUT [PART…]
#
# Parts, all of them unless some are named:
#   tests   the kernels alone, then forward and backward pass, against float64 and Triton's kernels
#   bench   `shoal bench nsa-wide`: both ways at 64k, whole and in parts
# OUT gets a log of each and the JSON. The exit code is the number of parts that failed; bench is run either way, and
# its figures are worth nothing where tests fail.
#
# Environment: PYTHON.
set -u
OUT=${1:?usage: benchmarks/gpu_wide.sh OUT [PART…]}
shift
PARTS=${*:-tests bench}
PYTHON=${PYTHON:-python}

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COLUMNS=200
failed=0

tests() {
    "$PYTHON" -m pytest -q -m gpu -k 192 --durations=5 -p no:cacheprovider tests/kernels/test_nsa_gluon_*.py \
        tests/kernels/test_nsa_triton_forward.py tests/kernels/test_nsa_triton_backward.py
}

bench() {
    "$PYTHON" -m shoal.jobs.cli.main bench nsa-wide --out "$OUT"
}

for each in $PARTS; do
    began=$SECONDS
    timeout --signal=INT --kill-after=20 280 bash -c "$(declare -f "$each"); PYTHON='$PYTHON' OUT='$OUT' $each" \
        >"$OUT/$each.txt" 2>&1
    code=$?
    tail -n 45 "$OUT/$each.txt"
    echo "$each: exit code $code after $((SECONDS - began)) s"
    [ $code -eq 0 ] || failed=$((failed + 1))
done
exit $failed
