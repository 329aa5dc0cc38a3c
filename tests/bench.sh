#!/usr/bin/env bash
# The benchmark in one command: installs what is missing, builds in release, measures, prints tables and the goals, and leaves
# nothing behind. Takes some ten minutes and up to 12 GB of memory; wants a machine that does nothing else.
#
#   sudo tests/bench.sh [--quick] [--rounds N] [--sets ABCDEF] [--rows pipe,ssh,ssh-aes,zstd,snapferry]
#
# SNAPFERRY_PROGRAMS=DIR measures the two programs of that directory instead of building them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

deploy/prerequisites.sh --bench

# The agents for themselves: built together with the tests they would get the tests' features, too.
release=$(readlink -f "${CARGO_TARGET_DIR:-target}")/release
[[ -n ${SNAPFERRY_PROGRAMS-} ]] || deploy/cargo.sh build --release --locked -p snapferry-sender -p snapferry-receiver
export SNAPFERRY_PROGRAMS=${SNAPFERRY_PROGRAMS-$release}
deploy/cargo.sh build --release --locked -p snapferry-tests --example bench

# Everything is mounted in a mount namespace and runs in a process namespace of its own. When its first process has ended, however
# that came about, so have all others, and the mounts, the loop devices and the memory are gone. /dev/shm and /run are places that
# exist: a directory made for the purpose would have to be removed, and if it is removed from outside while something is still
# mounted there, the kernel keeps that for ever (the image holds the mount of the tmpfs that holds the image). sshd insists on
# /run/sshd.
# shellcheck disable=SC2016 # the inner shell expands it
TMPDIR=/dev/shm exec unshare --mount --pid --fork --kill-child --mount-proc -- bash -euc '
    mount -t tmpfs -o mode=755,size=90% snapferry-bench "$TMPDIR"
    [[ -d /run/sshd ]] || { mount -t tmpfs -o mode=755 snapferry-bench /run && mkdir /run/sshd; }
    # Not exec: signals that nobody handles do not reach the first process of a namespace.
    "$@" || exit' bash "$release/examples/bench" "$@"
