#!/usr/bin/env bash
# Proves the CUDA and Triton code on a CUDA machine: builds, tests, sanitizes, measures, and writes the table of who
# takes what (choice.json). One command, no downloads, ten minutes at most:
#
#     VITKD_OUT=results benchmarks/gpu.sh [STAGE...]
#
# It uses the python3 it finds (PYTHON=... for another), with its torch, triton and pytest. Logs, JSON records and the
# summary go to VITKD_OUT (default: benchmarks/results). A failed stage does not stop the later ones, but the exit
# status. Stages, all by default: gpu_tests sanitize attention kd_loss attention_graph kd_loss_graph profile sweep tune
# models choose. What must not be missed comes first; sweep and models take what time is left. VITKD_LIMIT=300 gives all
# of it 300 seconds. --rehearse does what can be done without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

ALL=(gpu_tests sanitize attention kd_loss attention_graph kd_loss_graph profile sweep tune models choose)
REHEARSE=0
STAGES=()
for argument; do
  if [[ $argument == --rehearse ]]; then
    REHEARSE=1
  elif [[ " ${ALL[*]} " == *" $argument "* ]]; then
    STAGES+=("$argument")
  else
    echo "usage: [VITKD_OUT=folder] [PYTHON=python3] $0 [--rehearse] [STAGE...]; stages: ${ALL[*]}" >&2
    exit 2
  fi
done
if ((${#STAGES[@]} == 0)); then STAGES=("${ALL[@]}"); fi
PYTHON=${PYTHON:-python3}
OUT=${VITKD_OUT:-benchmarks/results}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
SECONDS=0
LIMIT=${VITKD_LIMIT:-575}  # of all stages together, in seconds; the last one, choose, has 15 more
if ((REHEARSE)); then
  LIMIT=1800
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}  # as on a machine with a Hopper, not one build per chip
fi
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
export PYTHONUNBUFFERED=1

# stage NAME SECONDS COMMAND...: runs it under its time limit (or what is left of the script's), logs, notes the result.
stage() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  local left=$((LIMIT - SECONDS))
  if [[ $name == choose ]]; then left=$((left + 15)); fi
  if ((limit > left)); then limit=$left; fi
  if ((limit <= 5)); then
    note "$name" FAIL 0 "no time left"
    return 1
  fi
  STAGE_SECONDS=$limit timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  local took=$((SECONDS - start))
  case $status in
    0) note "$name" ok "$took" "$(tail -n 1 "$OUT/$name.log")" ;;
    124 | 137) note "$name" FAIL "$took" "stopped at its limit of $limit s" ;;
    *) note "$name" FAIL "$took" "exit status $status: $(tail -n 1 "$OUT/$name.log")" ;;
  esac
  return "$status"
}

wanted() {
  [[ " ${STAGES[*]} " == *" $1 "* ]]
}

note() {
  printf '%-20s %-5s %4s s  %s\n' "$1" "$2" "$3" "${4:0:120}" | tee -a "$SUMMARY"
}

environment() {
  date -u +%FT%TZ
  git rev-parse HEAD 2> /dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null
  nvcc --version 2> /dev/null | tail -n 2
  "$PYTHON" - "$REHEARSE" << 'END'
import platform, sys
import pytest, torch, triton
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, pytest {pytest.__version__}")
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
elif sys.argv[1] == "0":
    sys.exit("torch sees no CUDA device")
END
}

# In place, with the torch that is here. Where pip cannot (a setuptools too old for pyproject.toml): the same libraries
# by ninja, and a link that stands for the package_dir mapping of vitkd_fast.triton until the script ends.
build() {
  if command -v nvcc > /dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
    export VITKD_CUDA=${VITKD_CUDA:-1}
  fi
  "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation --disable-pip-version-check -e . && return
  echo "pip could not; building without it" >&2
  "$PYTHON" - << 'END' || return
import sys, sysconfig
from pathlib import Path
sys.path.insert(0, "_build")
import native
root = Path.cwd()
found = native.libraries(root, root / "build/native")
suffix = {"_facts": sysconfig.get_config_var("EXT_SUFFIX")}
targets = {name: root / "vitkd_fast" / (name + suffix.get(name, ".so")) for name in found}
native.build(targets, found, root / "build/native", verbose=False)
END
  ln -sfn ../kernels/triton vitkd_fast/triton
  echo "built without pip"
}

doctor() {
  (cd / && "$PYTHON" -c "
import vitkd_fast, vitkd_fast.backends as backends
print(vitkd_fast.doctor())
broken = {name: why for name, why in backends.libraries().items() if why}
if broken and $REHEARSE == 0:
    raise SystemExit(f'missing: {broken}')
")
}

gpu_tests() {
  local files workers=()
  mapfile -t files < <(grep -rl --include "test_*.py" "mark\.gpu" tests)  # what others import may not be here
  # Most of the time goes into compiling Triton kernels, on the CPU. A run stopped at its limit names what failed (-v).
  if "$PYTHON" -c "import xdist" 2> /dev/null; then workers=(-n 10); fi
  "$PYTHON" -m pytest -m gpu -v -p no:cacheprovider --junitxml="$OUT/gpu_tests.xml" "${workers[@]}" "${files[@]}" || return
  "$PYTHON" - "$OUT/gpu_tests.xml" "$REHEARSE" << 'END'
import sys
import xml.etree.ElementTree as ET
suites = list(ET.parse(sys.argv[1]).getroot().iter("testsuite"))
total, skipped = (sum(int(suite.get(key)) for suite in suites) for key in ("tests", "skipped"))
print(f"{total - skipped} GPU tests passed, {skipped} skipped")
if sys.argv[2] == "0" and total == skipped:
    sys.exit("no GPU test ran")
END
}

sanitizer() {
  local found
  found=$(command -v compute-sanitizer || true)
  for folder in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda /opt/cuda; do
    for path in "$folder/bin/compute-sanitizer" "$folder/compute-sanitizer/compute-sanitizer"; do
      if [[ -z $found && -x $path ]]; then found=$path; fi
    done
  done
  echo "$found"
}

# A missing tool, or one that did not attach, must not look like a clean run: its own summary line has to be there.
sanitize() {
  local tool=$1 program
  program=$(sanitizer)
  if [[ -z $program ]]; then
    echo "compute-sanitizer was not found on PATH, in CUDA_HOME or in /usr/local/cuda"
    return 1
  fi
  # Without torch's caching allocator every tensor is an allocation of its own, whose bounds the tool knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 99 --print-limit 20 \
    "$PYTHON" benchmarks/sanitize.py --device cuda || return
  grep -q '^sanitized [1-9]' "$OUT/sanitize_$tool.log" || { echo "the driver did not finish"; return 1; }
  grep -qE 'ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards' "$OUT/sanitize_$tool.log" ||
    { echo "$tool printed no clean summary"; return 1; }
}

# A benchmark that starts nothing new a while before its stage is stopped still writes its record.
benchmark() {
  "$PYTHON" "benchmarks/$1.py" --out "$OUT" --limit $((STAGE_SECONDS - 20)) "${@:2}"
}

# What the hardware's counters say of every kernel at the issue's shapes; Nsight Compute where it is.
profile() {
  local program
  program=$(command -v ncu || ls /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu 2> /dev/null | head -n 1)
  if [[ -z $program ]]; then
    echo "ncu was not found on PATH, in /usr/local/cuda or in /opt/nvidia/nsight-compute"
    return 1
  fi
  "$program" --clock-control none --nvtx --nvtx-include "measured/" --section SpeedOfLight --section Occupancy \
    --section WarpStateStats --section SchedulerStats --section MemoryWorkloadAnalysis \
    --section MemoryWorkloadAnalysis_Tables --section InstructionStats --section LaunchStats \
    "$PYTHON" benchmarks/profiled.py --device cuda > "$OUT/profile.txt" || { tail -n 3 "$OUT/profile.txt"; return 1; }
  grep '^profiled' "$OUT/profile.txt"
}

choose() {  # from this run's records, not from what was here before
  local records=("$OUT"/attention-*.json "$OUT"/attention_sweep-*.json "$OUT"/kd_loss-*.json) found=()
  for path in "${records[@]}"; do
    if [[ -e $path && $path -nt $OUT/environment.log ]]; then found+=("$path"); fi
  done
  "$PYTHON" benchmarks/choose.py "${found[@]}" --out "$OUT/choice.json"
}

export -f environment build doctor gpu_tests sanitizer sanitize benchmark profile choose
export PYTHON OUT REHEARSE

stage environment 60 bash -c environment
if ! stage build 200 bash -c build; then
  # What is red here stays red; Triton can still be proved.
  VITKD_CUDA=0 stage build_without_cuda 100 bash -c build
fi
if [[ -L vitkd_fast/triton ]]; then
  trap 'rm -f vitkd_fast/triton' EXIT
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
stage doctor 60 bash -c doctor

if ((REHEARSE)); then
  stage gpu_tests 120 bash -c gpu_tests
  stage sanitize_driver 60 "$PYTHON" benchmarks/sanitize.py --device cpu
  stage attention 120 bash -c "benchmark attention --device cpu --shapes 2,2,17,32 --seconds 0.05 --rounds 1 --skip compile"
  stage kd_loss 120 bash -c "benchmark kd_loss --device cpu --shapes 16,10 --seconds 0.05 --rounds 1 --skip compile"
  # The tool has nothing to attach to here; what must work is that its absence is a failure.
  if [[ -z $(sanitizer) ]] && bash -c "sanitize memcheck" > "$OUT/sanitize_memcheck.log" 2>&1; then
    note sanitize_missing FAIL 0 "a missing compute-sanitizer passed for a clean run"
  else
    note sanitize_missing ok 0 "a missing compute-sanitizer is a failure"
  fi
  if bash -c choose > "$OUT/choose.log" 2>&1; then
    note choose FAIL 0 "a CPU's records passed for a GPU's"
  else
    note choose ok 0 "refused: $(tail -n 1 "$OUT/choose.log")"
  fi
else
  # Nothing is timed here, so the tests and the sanitizer's four tools share the GPU.
  if wanted gpu_tests; then stage gpu_tests 200 bash -c gpu_tests & fi
  if wanted sanitize; then
    for tool in memcheck racecheck initcheck synccheck; do
      stage "sanitize_$tool" 200 bash -c "sanitize $tool" &
    done
  fi
  wait
  # The issue's shapes: 6 of them compiled twice by torch.compile, which is most of the time.
  if wanted attention; then stage attention 170 bash -c "benchmark attention --device cuda --seconds 0.15 --rounds 2"; fi
  if wanted kd_loss; then stage kd_loss 60 bash -c "benchmark kd_loss --device cuda --seconds 0.15 --rounds 2"; fi
  if wanted attention_graph; then  # without what moves N x N matrices or has just been compiled to SDPA
    stage attention_graph 60 bash -c \
      "benchmark attention --device cuda --seconds 0.15 --rounds 2 --graph --skip compile formula math"
  fi
  if wanted kd_loss_graph; then
    stage kd_loss_graph 45 bash -c \
      "benchmark kd_loss --device cuda --seconds 0.15 --rounds 2 --graph --shapes 256,10 256,1000 4096,1000"
  fi
  if wanted profile; then stage profile 60 bash -c profile; fi
  if wanted sweep; then stage sweep 90 bash -c "benchmark sweep --device cuda"; fi
  if wanted tune; then  # every candidate tile is compiled and measured once
    stage tune 60 bash -c \
      "VITKD_TRITON_TUNE=1 benchmark attention --device cuda --seconds 0.05 --rounds 1 --skip sdpa formula native"
  fi
  if wanted models; then stage models "$LIMIT" bash -c "benchmark models --device cuda --seconds 0.6"; fi
  if wanted choose; then stage choose 15 bash -c choose; fi
fi

echo
cat "$OUT"/{attention,kd_loss,attention_graph,kd_loss_graph,sweep,tune,models,choose}.log 2> /dev/null
echo
cat "$SUMMARY"
echo "$SECONDS s; logs and records in $OUT"
! grep -q ' FAIL ' "$SUMMARY"
