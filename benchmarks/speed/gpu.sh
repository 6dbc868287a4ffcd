#!/usr/bin/env bash
# Everything that is to be measured on a GPU machine, in stages. README.md beside this says how to use it.
#
#   gpu.sh [--minutes M] [--stage NAME]... [--again] [--list] [--shape NAME] [--device D]
#
# A stage that has ended leaves a stamp in $STATE and is not run again; one that was cut begins again, and its runs that have a
# record are left out. Started again the script goes on where it stopped. --minutes is the time of this call, of which the last is
# kept for packing. --shape NAME makes every stage small, for a machine without a GPU: --shape tiny-llama --device cpu.
#
# Environment: OUT, where what should be kept is packed; STATE, where work is (default /tmp/prunebench-gpu); PYTHON (python3);
# STAGE_SECONDS, the longest that a stage may take at a time (480).
# Ends with 0 when all stages are done, 75 when there is more to do, 1 when a stage failed.
set -u -o pipefail
cd "$(dirname "$0")/../.." || exit 1
SELF=benchmarks/speed/gpu.sh

STAGES=(environment tests kernels 7b-oneshot 7b-gradients served 7b-streaming 30b 70b 7b-perp quality profile)
STATE=${STATE:-/tmp/prunebench-gpu}
OUT=${OUT:-$STATE/out}
PYTHON=${PYTHON:-python3}
STAGE_SECONDS=${STAGE_SECONDS:-480}
WHEELS=${WHEELS:-.gpu/whl}
CARRIED=${CARRIED:-.gpu/state.tar.gz}
SHAPE=${SHAPE:-} DEVICE=${DEVICE:-cuda} MINUTES=9.5 AGAIN= INSIDE= CHOSEN=()
LEAST=45  # seconds that must be left for a stage to begin
PACKING=25  # seconds kept for packing

usage() { sed -n '2,13s/^# \{0,1\}//p' "$SELF"; }

while [ $# -gt 0 ]; do
  case $1 in
    --list) printf '%s\n' "${STAGES[@]}"; exit 0 ;;
    --stage) CHOSEN+=("$2"); shift ;;
    --shape) SHAPE=$2; shift ;;
    --device) DEVICE=$2; shift ;;
    --minutes) MINUTES=$2; shift ;;
    --again) AGAIN=yes ;;
    --inside) INSIDE=$2; shift ;;  # one stage, by this script itself
    *) usage >&2; exit 2 ;;
  esac
  shift
done
[ ${#CHOSEN[@]} -gt 0 ] || CHOSEN=("${STAGES[@]}")
for name in "${CHOSEN[@]}"; do
  [[ " ${STAGES[*]} " == *" $name "* ]] || { echo "no stage is called $name; --list names them" >&2; exit 2; }
done

export OUT STATE PYTHON SHAPE DEVICE WHEELS STAGE_SECONDS CARRIED
export PYTHONPATH=$PWD/harness:$PWD/pruners:$STATE/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PRUNEBENCH_CACHE=$STATE/cache
export PRUNEBENCH_ARTEFACTS_GIB=${PRUNEBENCH_ARTEFACTS_GIB:-0}  # 26 GB of gradients on disk would cost more than they save
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
RESULTS=$STATE/results

# ---- what stages are made of

session() { "$PYTHON" benchmarks/speed/session.py "$@"; }
prunebench() { "$PYTHON" -m prunebench.cli "$@"; }

# The path of a suite, made small where a shape was asked for.
suite() {
  if [ -z "$SHAPE" ]; then
    echo "benchmarks/$1.toml"
  else
    local dtype=bfloat16
    [ "$DEVICE" = cpu ] && dtype=float32
    session small "benchmarks/$1.toml" "$STATE/$1.toml" "$SHAPE" "$dtype" && echo "$STATE/$1.toml"
  fi
}

# Run methods of a suite: sweep RESULTS SUITE METHOD...
sweep() {
  local results=$1 suite ended=0 asked=() began
  suite=$([ -f "$2" ] && echo "$2" || suite "$2") || return 1
  shift 2
  for method in "$@"; do asked+=(--method "$method"); done
  began=$(date +%s)
  prunebench run "$suite" "${asked[@]}" --results "$results" --device "$DEVICE" || ended=$?
  settled "$results" $ended "$began"
}

# Where some runs of a stage failed their records say why, and it is done all the same; where all did, or the command itself, it failed.
settled() { [ "$2" -eq 0 ] || { [ "$2" -eq 1 ] && session failed "$1" "$3"; }; }

perp() { if [ -z "$SHAPE" ]; then echo 'magnitude + perp[subset=mask_lora,steps=55,batch=1]'; else echo 'magnitude + perp[subset=mask_lora,steps=3,batch=1]'; fi; }

# ---- the stages

stage_environment() {
  mkdir -p "$STATE/site"
  if ! "$PYTHON" -c 'import importlib.metadata as m; m.version("prunebench")' 2>/dev/null; then
    if [ -d "$WHEELS" ]; then
      "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$STATE/site" \
        "$WHEELS"/*.whl || return 1
    fi
    session register "$STATE/site" || return 1
  fi
  command -v nvidia-smi >/dev/null && nvidia-smi && nvidia-smi -q -d CLOCK,POWER,TEMPERATURE
  "$PYTHON" --version
  session versions
  prunebench list
  prunebench list --json | "$PYTHON" -c 'import json, sys; sys.exit(bool(json.load(sys.stdin)["broken"]))'
}

stage_tests() {
  # Only files that have such tests: others import what is not there.
  grep -lZ 'mark\.gpu' tests/test_*.py | xargs -0 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --durations=10
}

stage_kernels() {
  # Of 70B matrices the PyTorch sweeps alone take minutes.
  "$PYTHON" benchmarks/speed/gpu_kernels.py --device "$DEVICE" --json "$STATE/logs/kernels.json" --shape "${SHAPE:-llama-2-7b}"
}

stage_7b-oneshot() { sweep "$RESULTS" speed-7b random magnitude wanda sparsegpt; }
stage_7b-gradients() { sweep "$RESULTS" speed-7b wanda++ gblm; }
stage_7b-perp() { sweep "$RESULTS" speed-7b "$(perp)"; }

# Blocks and activations from pinned host memory. Runs are the same as without the limit, so their records have a folder of theirs.
stage_7b-streaming() {
  session limited "$(suite speed-7b)" "$STATE/speed-7b-8gib.toml" 8 &&
    sweep "$STATE/results-8gib" "$STATE/speed-7b-8gib.toml" wanda sparsegpt wanda++
}

stage_served() { sweep "$RESULTS" speed-served dense magnitude; }

# Retraining keeps to 80 GB, as published: the limit is 74 GiB.
stage_30b() {
  sweep "$RESULTS" speed-30b wanda sparsegpt wanda++ &&
    session limited "$(suite speed-30b)" "$STATE/speed-30b-80gb.toml" 74 &&
    sweep "$RESULTS" "$STATE/speed-30b-80gb.toml" "$(perp)"
}

stage_70b() { sweep "$RESULTS" speed-70b wanda sparsegpt; }

# A real model with its texts, which travel with the repository; the wiki7m suite too where its data sets were carried.
stage_quality() {
  local only=()
  [ -n "$SHAPE" ] && only=(--method magnitude --only 0.5)
  local ended=0 began
  began=$(date +%s)
  prunebench run quickstart "${only[@]}" --results "$RESULTS" --device "$DEVICE" || ended=$?
  if [ -z "$SHAPE" ] && [ -d .gpu/data ]; then
    PRUNEBENCH_MIRROR=$PWD/.gpu/data prunebench run wiki7m --only 2:4 --results "$RESULTS" --device "$DEVICE" || ended=$?
  fi
  settled "$RESULTS" $ended "$began"
}

stage_profile() {
  local method
  method=$(session slowest "$RESULTS")
  [ -n "$method" ] || { echo "nothing was measured, so nothing is profiled"; return 1; }
  session profile "$(suite speed-7b)" "$method" "$DEVICE" "$STATE/logs/profile.txt" && head -60 "$STATE/logs/profile.txt"
}

# ---- one stage, in a process of its own

if [ -n "$INSIDE" ]; then
  "stage_$INSIDE"
  exit
fi

# ---- all of them

mkdir -p "$STATE/stamps" "$STATE/logs" "$STATE/cut" "$OUT"
if [ -f "$CARRIED" ] && [ -z "$(ls -A "$STATE/stamps")" ]; then
  tar xzf "$CARRIED" -C "$STATE" && rm -f "$STATE/stamps/environment" && echo "going on from $CARRIED"
fi

BEGAN=$(date +%s)
DEADLINE=$("$PYTHON" -c "print(int($BEGAN + 60 * $MINUTES) - $PACKING)")

# Records, logs and stamps in one file for $OUT, in pieces that may travel; nothing is in it that can be made again.
pack() {
  rm -f "$OUT"/state.tar.gz*
  (cd "$STATE" && tar czf - --exclude='*/.journal' stamps logs $(ls -d results* *.toml 2>/dev/null)) |
    split -b 15m -d -a 1 - "$OUT/state.tar.gz."
  [ -e "$OUT/state.tar.gz.1" ] || mv "$OUT/state.tar.gz.0" "$OUT/state.tar.gz"
}

in_order() {
  local name
  for name in "${CHOSEN[@]}"; do [ -e "$STATE/cut/$name" ] || echo "$name"; done
  for name in "${CHOSEN[@]}"; do [ ! -e "$STATE/cut/$name" ] || echo "$name"; done
}

# Read whole before it begins: the file may be written anew meanwhile.
run_all() {
  local more=0 failed=0 name stamp now limit ended took
  # What took too long before comes last: it may hang.
  for name in $(in_order); do
    stamp=$STATE/stamps/$name
    [ -n "$AGAIN" ] && rm -f "$stamp"
    if [ -f "$stamp" ]; then
      echo "== $name: $(cat "$stamp") (before)"
      grep -q '^failed' "$stamp" && failed=1
      continue
    fi
    now=$(date +%s)
    limit=$((DEADLINE - now))
    if [ $limit -lt $LEAST ]; then
      more=1
      echo "== $name: not begun, $limit seconds are left of this call"
      continue
    fi
    [ $limit -gt "$STAGE_SECONDS" ] && limit=$STAGE_SECONDS
    echo "== $name: at most $limit seconds"
    timeout --signal=INT --kill-after=15 "$limit" bash "$SELF" --inside "$name" 2>&1 | tee -a "$STATE/logs/$name.txt" | tail -n 40
    ended=${PIPESTATUS[0]}
    took=$(($(date +%s) - now))
    case $ended in
      0) echo "done in $took s" >"$stamp" ;;
      124 | 130 | 137)
        more=1
        echo "== $name: cut after $took s, to be gone on with"
        [ $limit -eq "$STAGE_SECONDS" ] && touch "$STATE/cut/$name"
        ;;
      *) failed=1 && echo "failed with $ended after $took s" >"$stamp" ;;
    esac
    [ -f "$stamp" ] && echo "== $name: $(cat "$stamp")"
    pack
    [ "$name" = environment ] && [ $failed -eq 1 ] && break  # nothing else can go well
  done
  pack
  session summary "$STATE"/results* | tee "$OUT/summary.txt"
  [ $failed -eq 1 ] && return 1
  [ $more -eq 1 ] && return 75
  return 0
}

run_all; exit
