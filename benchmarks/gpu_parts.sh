# Sourced by benchmarks on GPUs that come in parts, each with its own output, and one archive of all. OUT is a folder.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COLUMNS=220
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink multicast wants rights that containers lack
failed=0

begin() { # NAME MODULES: the archive's name, and what the later parts need, before minutes are spent on the earlier ones
    mkdir -p "$OUT"
    ARCHIVE=$(cd "$OUT" && pwd)/$1.tar.gz
    "$PYTHON" -c "import $2" || exit 1
    WORK=$(mktemp -d)
    OUT=$WORK/out
    mkdir "$OUT"
    trap 'rm -rf "$WORK"' EXIT
}

part() { # NAME SECONDS COMMAND…: its output in OUT/NAME.txt and OUT/NAME.log
    local name=$1 seconds=$2 began=$SECONDS code
    shift 2
    timeout --signal=INT --kill-after=60 "$seconds" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.log"
    code=$?
    echo "$name: exit code $code after $((SECONDS - began)) s"
    if [ $code -ne 0 ]; then
        failed=$((failed + 1))
        tail -n 25 "$OUT/$name.txt" "$OUT/$name.log"
    fi
    pack
}

pack() { # what there is by now: the whole may be cut short; parts may run side by side
    tar -czf "$ARCHIVE.$BASHPID" -C "$OUT" .; mv "$ARCHIVE.$BASHPID" "$ARCHIVE"
}

end() { # NAME…: prints these parts' tables; the exit code is the number of those that failed
    local name
    for name in "$@"; do
        echo
        echo "== $name"
        tail -n 60 "$OUT/$name.txt"
    done
    pack
    exit $failed
}
