#!/usr/bin/env bash
# Serving on GPUs, in one call of a few minutes: benchmarks/gpu_serving.sh OUT [GPUS]
#
# On one GPU: paged caches beside a training forward, and CUDA graphs (pytest), the engine alone, then `shoal serve` over
# random weights under load, NSA beside full attention. On two: the same, engine and service side by side, each on a card
# of its own; then graphs of a model over both ranks, and of one with attention and experts apart (pytest), their steps
# beside those without, the service with a model over both, and with attention and experts apart, with graphs and without.
# OUT gets one archive of JSON, pictures and logs, serving.tar.gz, which grows with each part; the tables are printed last.
# A part that fails does not stop the others; the exit code is the number of those that failed.
#
# Environment: PYTHON, and, to try it without a GPU, RECIPE, SETS, CONTEXT, MIX, CONCURRENCY, DURATION, CHUNK, WARMUP.
set -u
OUT=${1:?usage: benchmarks/gpu_serving.sh OUT [GPUS]}
GPUS=${2:-1}
RECIPE=${RECIPE:-deepseekmoe-2b}
# groups of 16 heads share keys and values, as in the NSA paper; 64 experts divide over two ranks
SETS=${SETS:-parallel.device=cuda model.heads=32 model.kv_heads=2 moe.experts=64}
CONTEXT=${CONTEXT:-16384}
CHUNK=${CHUNK:-2048}
MIX=${MIX:-1024:64*3,8192:64*1}
CONCURRENCY=${CONCURRENCY:-1,8,32}
DURATION=${DURATION:-6}
WARMUP=${WARMUP:-4}

. "$(dirname "$0")/gpu_parts.sh"
begin serving "fastapi, uvicorn, grpc_health, grpc_reflection, ray.serve, aiohttp, matplotlib"

untrained() { # KIND
    local sets=(model.context="$CONTEXT" serve.step_tokens="$CHUNK" attention.kind="$1") each
    for each in $SETS; do sets+=("$each"); done
    SHOAL_RUNS=$WORK part "make-$1" 200 "$PYTHON" -m shoal.jobs.bench.untrained "$1" "$RECIPE" "${sets[@]}"
}

serve() { # NAME OPTIONS…
    local name=$1
    shift
    part "$name" 330 "$PYTHON" -m shoal.jobs.cli.main bench serve "$WORK/nsa" --mix "$MIX" --concurrency "$CONCURRENCY" \
        --duration "$DURATION" --warmup "$WARMUP" --out "$OUT/$name" --plot "$OUT/$name/serve.png" "$@"
}

engine() {
    part caches 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/workers/test_gpu.py -k paged
    part graphs 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_few.py tests/workers/test_gpu_graphs.py
    part engine 540 "$PYTHON" -m shoal.jobs.cli.main bench engine --out "$OUT"
}

service() {
    untrained nsa
    untrained full
    serve service --against "$WORK/full"
}

names="caches graphs engine service"
if [ "$GPUS" = 1 ]; then
    engine
    service
else
    (export CUDA_VISIBLE_DEVICES=1; engine; exit $failed) &
    (export CUDA_VISIBLE_DEVICES=0; service; exit $failed)
    failed=$?
    wait $!
    failed=$((failed + $?))
    part ranks 480 "$PYTHON" -m pytest -q -p no:cacheprovider tests/workers/test_gpu_graphs_ranks.py \
        tests/cluster/test_gpu_engines.py
    part decode 420 "$PYTHON" -m shoal.jobs.bench.decode --out "$OUT"
    serve colocated --workers "$GPUS" --against "$WORK/full"
    serve apart --workers "$GPUS" --placement "1A:$((GPUS - 1))F"
    serve apart-plain --workers "$GPUS" --placement "1A:$((GPUS - 1))F" --set serve.cuda_graphs=false
    names="$names ranks decode colocated apart apart-plain"
fi
end $names
