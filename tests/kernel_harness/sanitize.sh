#!/usr/bin/env bash
# Compiles every *_harness.cpp here, with its kernels csrc/<stem>/<stem>*_cpu.cpp where it has any, under AddressSanitizer
# and UndefinedBehaviorSanitizer, once for each instruction set that this machine runs, and runs it.
# Arguments: stems; none means all. CXX and BUILD (a folder) may be set.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
build="${BUILD:-$root/build/sanitize}"
cxx="${CXX:-g++}"
mkdir -p "$build"

common=(-std=gnu++20 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
  -Wall -Wextra -Wno-unused-function -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=fast
  -I "$root/csrc" -I "$here" -pthread)

declare -A flags=([baseline]="" [avx2]="-mavx2 -mfma -mf16c" [neon]=""
  [avx512]="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512")
has() { grep -qw "$1" /proc/cpuinfo; }
case "$(uname -m)" in
  x86_64)
    isas=(baseline)
    if has avx2 && has fma && has f16c; then isas+=(avx2); fi
    if has avx512f && has avx512bw && has avx512dq && has avx512vl; then isas+=(avx512); fi
    ;;
  aarch64) isas=(neon) ;;
  *) isas=(baseline) ;;
esac

status=0
for harness in "$here"/*_harness.cpp; do
  stem="$(basename "$harness" _harness.cpp)"
  if [ $# -gt 0 ] && [[ " $* " != *" $stem "* ]]; then continue; fi
  sources=("$harness")
  for kernel in "$root/csrc/$stem/$stem"*_cpu.cpp; do
    if [ -f "$kernel" ]; then sources+=("$kernel"); fi
  done
  for isa in "${isas[@]}"; do
    program="$build/${stem}_$isa"
    # shellcheck disable=SC2086  the flags are several words
    "$cxx" "${common[@]}" ${flags[$isa]} -DFASTGAN_ISA="$isa" "${sources[@]}" -o "$program"
    echo "== $stem, $isa"
    if ! ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 "$program"; then
      echo "FAILED: $stem, $isa"
      status=1
    fi
  done
done
exit $status
