#!/usr/bin/env bash
# Compiles every *_harness.cpp here, with its kernels csrc/<stem>/<stem>*_cpu.cpp where it has any, and runs it:
#
#   run.sh address   under AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set of this machine
#   run.sh thread    under ThreadSanitizer, for the best of them
#   run.sh neon      for Arm's NEON, without a sanitizer, under qemu-user where this machine is no Arm
#                    (on Debian: g++-aarch64-linux-gnu and qemu-user)
#
# Further arguments: stems; none means all. CXX and BUILD (a folder) may be set.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
what="${1:?address, thread or neon}"
shift
build="${BUILD:-$root/build/harness}"
cxx="${CXX:-g++}"
mkdir -p "$build"

common=(-std=gnu++20 -g -Wall -Wextra -Wno-unused-function -Wno-psabi
  -Wno-maybe-uninitialized -fno-math-errno -fno-trapping-math
  -ffp-contract=fast -I "$root/csrc" -I "$here" -pthread)
declare -A flags=([baseline]="" [avx2]="-mavx2 -mfma -mf16c" [neon]=""
  # csrc/<stem>/<stem>*_amx.cpp on any machine: without the compiler's flags its instructions are loops.
  [amx]="-DFASTGAN_VECTOR_BYTES=64 -DHARNESS_AMX"
  [avx512]="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512")
runner=()

has() { grep -qw "$1" /proc/cpuinfo; }
isas=(baseline)
case "$(uname -m)" in
  x86_64)
    if has avx2 && has fma && has f16c; then isas+=(avx2); fi
    if has avx512f && has avx512bw && has avx512dq && has avx512vl; then isas+=(avx512); fi
    ;;
  aarch64) isas=(neon) ;;
esac

case "$what" in
  address) common+=(-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all) ;;
  thread)
    common+=(-O1 -fno-omit-frame-pointer -fsanitize=thread)
    isas=("${isas[-1]}")
    # The sanitizer's shadow memory does not fit every layout of the address space.
    if command -v setarch >/dev/null; then runner=(setarch "$(uname -m)" -R); fi
    ;;
  neon)
    isas=(neon)
    common+=(-O2 -static)
    if [ "$(uname -m)" != aarch64 ]; then
      cxx="${CXX:-aarch64-linux-gnu-g++}"
      runner=(qemu-aarch64)
    fi
    ;;
  *)
    echo "run.sh takes address, thread or neon, not $what" >&2
    exit 2
    ;;
esac

status=0
for harness in "$here"/*_harness.cpp; do
  stem="$(basename "$harness" _harness.cpp)"
  if [ $# -gt 0 ] && [[ " $* " != *" $stem "* ]]; then continue; fi
  sources=("$harness")
  for kernel in "$root/csrc/$stem/$stem"*_cpu.cpp; do
    if [ -f "$kernel" ]; then sources+=("$kernel"); fi
  done
  tiles=("$root/csrc/$stem/$stem"*_amx.cpp)
  here_on=("${isas[@]}")
  if [ -f "${tiles[0]}" ] && [ "$what" != neon ] && [ "$(uname -m)" = x86_64 ]; then
    if [ "${#sources[@]}" = 1 ]; then here_on=(); fi # there is no other kernel
    here_on+=(amx)
  fi
  for isa in "${here_on[@]}"; do
    own=()
    kernels="$isa"
    if [ "$isa" = amx ]; then
      own=("${tiles[@]}")
      kernels=baseline
    fi
    program="$build/${stem}_${isa}_$what"
    # shellcheck disable=SC2086  the flags are several words
    "$cxx" "${common[@]}" ${flags[$isa]} -DFASTGAN_ISA="$kernels" "${sources[@]}" "${own[@]}" -o "$program"
    echo "== $stem, $isa, $what"
    if ! ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
      "${runner[@]}" "$program"; then
      echo "FAILED: $stem, $isa, $what"
      status=1
    fi
  done
done
exit $status
