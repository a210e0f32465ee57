#!/usr/bin/env bash
# Everything that a machine with a GPU has to show, in less than ten minutes:
#
#   benchmarks/gpu_session.sh [FOLDER]            # results in FOLDER, by default benchmarks/results
#   benchmarks/gpu_session.sh --dry-run [FOLDER]  # the same stages on the CPU with small sizes
#
# Stages: the tests marked gpu; bench_step.py in float32, with max_autotune_gemm, and with it in TF32 and
# bfloat16; bench_population.py; profile_step.py of each form; time and memory with 1,000,000 rows. Each
# has a time limit, and a stage that fails does not end the others. Compiling takes most of their time:
# with eight processors or more all of them run first at once, beside the tests, to fill the compilers'
# caches (their output is not kept but for logs_CARD/first), and then each alone. FOLDER then holds the
# JSON files, whose names contain the card's, the output of each stage in logs_CARD/, and
# session_CARD.json: which stages passed, their seconds, hardware and versions. The exit status is the
# number of stages that failed.
#
# PYTHON names the interpreter, DEVICE the device (cuda), STAGES a subset of the stages
# (STAGES="tests float32"). No network is used. Of pytest no plugin is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} device=${DEVICE:-cuda} dry=
[ "${1:-}" = --dry-run ] && { dry=1 device=cpu; shift; }
[ "$device" = cpu ] && dry=1
folder=${1:-}
if [ -z "$folder" ]; then
    folder=benchmarks/results
    [ -z "$dry" ] || folder=$(mktemp -d)  # small sizes are no results
fi
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 XLA_PYTHON_CLIENT_PREALLOCATE=false MPLBACKEND=agg
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=$scratch/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

session() { "$python" benchmarks/session_summary.py "$@"; }
card=$(session begin "$folder" "$device") || { echo "no summary could be started"; exit 1; }
logs=$folder/logs_$card
mkdir -p "$logs/first"
failed=0 filling=

stage() {  # NAME SECONDS COMMAND...: at most SECONDS, output to the log
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    case " ${STAGES:-$name} " in *" $name "*) ;; *) return ;; esac
    if [ -n "$filling" ]; then
        timeout --kill-after=5 "$limit" "$@" >"$logs/first/$name.log" 2>&1 &
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
    status=$?
    [ $status = 0 ] || failed=$((failed + 1))
    session add "$folder" "$card" "$name" "$status" $((SECONDS - began)) "$limit"
}

bench() {  # NAME SECONDS FILE OPTIONS...
    local output=$folder
    [ -z "$filling" ] || output=$scratch
    stage "$1" "$2" "$python" "benchmarks/$3" --device "$device" --output "$output" "${@:4}"
}

# files without gpu tests may import what this machine lacks
files=$(grep -rlE 'mark\.gpu' tests --include='test_*.py')
pytest=("$python" -m pytest -o addopts= -p no:cacheprovider -v --durations=15)
rivals="TorchRL eager,ours sequential,JAX scan,floor"
again="ours sequential captured,JAX scan,JAX step,floor of ours graph"
profiled() { [ "$1" = eager ] && echo 16 || echo 64; }  # the profiler takes long for many launches
if [ -n "$dry" ]; then
    small=(--rounds 2) tuned=() again="ours sequential captured,floor"
    step=(--widths 16 --batches 32 --block 4 --captured-updates 2 --limit 400 "${small[@]}")
    sizes=(--width 16 --batch 32 --rows 1000 --captured-updates 2) long=()
    profiled() { echo 8; }
    people=(--members 1,2 --widths 16 --batch 32 --rows 1000 --block 0.02 --captured-updates 2
            "${small[@]}")
    few=1000 many=20000 slow=15  # compilers of CPUs take longer, and more than one may be at work
    # shellcheck disable=SC2086
    stage collect 300 "${pytest[@]}" $files -m gpu --collect-only
    pytest+=(tests/update/test_cuda.py -m "not gpu and not slow" -k "gaussian or seeded_buffer")
else
    step=(--rounds 7 --block 20 --captured-updates 32 --limit 40) long=(--limit 70)
    tuned=(--inductor max_autotune_gemm=True)
    sizes=(--captured-updates 32)
    people=(--members 1,8,64 --widths 256 --rounds 3 --block 0.1 --captured-updates 8)
    few=100000 many=1000000 slow=1
    # shellcheck disable=SC2206
    pytest+=($files -m gpu)
    # most of a test's time is compilation: several at once where pytest-xdist is installed
    "$python" -c "import xdist" 2>/dev/null && pytest+=(-p xdist.plugin -n "$(($(nproc) * 3 / 4))")
fi

timed() {
    bench float32 $((85 * slow)) bench_step.py --rows $few --only "$rivals" \
        --result "${card}_float32" "${step[@]}" "${long[@]}"
    bench autotune $((65 * slow)) bench_step.py --rows $few --only "$again" \
        --result "${card}_float32_autotune" "${step[@]}" "${tuned[@]}"
    bench tf32 $((50 * slow)) bench_step.py --rows $few --only "$again" --result "${card}_tf32" \
        --matmul-precision high "${step[@]}" "${tuned[@]}"
    bench bfloat16 $((50 * slow)) bench_step.py --rows $few --only "$again" \
        --result "${card}_bfloat16" --dtype bfloat16 "${step[@]}" "${tuned[@]}"
    bench population $((100 * slow)) bench_population.py --result "$card" \
        --only "shared captured,single captured,floor batched" "${people[@]}"
    for form in eager compiled captured; do
        bench "profile_$form" $((25 * slow)) profile_step.py --form $form --result "$card" \
            --updates "$(profiled $form)" "${sizes[@]}"
    done
    bench memory $((35 * slow)) bench_step.py --rows $many --result "${card}_memory" \
        --only "TorchRL eager,ours sequential captured" "${step[@]}"
}

if [ -z "$dry" ] && [ "$(nproc)" -ge 8 ]; then
    filling=1
    timed
    filling=
fi
stage tests $((140 * slow)) "${pytest[@]}"
wait
timed

session show "$folder" "$card"
exit $failed
