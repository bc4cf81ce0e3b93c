#!/usr/bin/env bash
# Training over shared sequences on two GPUs: benchmarks/gpu_sequence.sh OUT [PART…]
#
# Parts, all of them unless some are named:
#   context   steps of nsa-64k-small at 64k, NSA beside ring attention, on two GPUs and on one; steps of 512k (5 minutes)
#   train     `shoal train` itself on two GPUs, on packed documents (2 minutes)
#   sequence  an attention layer from 32k to 512k, with its picture (4 minutes)
# OUT gets one archive of JSON, records, pictures and logs, sequence.tar.gz, which grows with each part; the tables are
# printed last. A part that fails does not stop the others; the exit code is the number of those that failed.
#
# Environment: PYTHON, STEPS of a case; without GPUs all of it is tried at small sizes.
set -u
OUT=${1:?usage: benchmarks/gpu_sequence.sh OUT [PART…]}
shift
PARTS=${*:-context train sequence}
STEPS=${STEPS:-12}

. "$(dirname "$0")/gpu_parts.sh"
export PYTHONWARNINGS=ignore::FutureWarning
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # 512k tokens leave little room for gaps
begin sequence "ray, pyarrow, tokenizers, tensorboard, matplotlib"
GPUS=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")

context() {
    part context 420 "$PYTHON" -m shoal.jobs.bench.context --out "$OUT/context" --data-dir "$WORK/data" --steps "$STEPS"
    cat "$OUT/context.log"
}

train() { # a step has two sequences, one after another
    local sets="train.batch=2 train.accumulate=2 train.eval_tokens=131072 checkpoint.every=4" each options=()
    if [ "$GPUS" -lt 2 ]; then
        sets="$sets model.layers=2 model.hidden=64 model.heads=4 model.head_dim=16 model.dense_hidden=64 moe.experts=4
              moe.top_k=2 moe.expert_hidden=32 model.vocab=2048 attention.window=64 model.context=4096
              train.sequence=2048 train.eval_tokens=4096 parallel.device=cpu"
    else
        sets="$sets parallel.device=cuda"
    fi
    for each in $sets; do options+=(--set "$each"); done
    unset PYTORCH_ALLOC_CONF
    part train 240 "$PYTHON" -m shoal.jobs.cli.main train --recipe nsa-64k-small --name shared --steps 4 \
        --runs-dir "$WORK/runs" --data-dir "$WORK/data" "${options[@]}"
    cp "$WORK"/runs/shared/*.jsonl "$OUT" 2>/dev/null
}

sequence() {
    unset PYTORCH_ALLOC_CONF
    part sequence 330 "$PYTHON" -m shoal.jobs.cli.main bench sequence --out "$OUT" --plots "$OUT"
}

for each in $PARTS; do
    $each
done
end $PARTS
