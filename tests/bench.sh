#!/usr/bin/env bash
# The benchmark in one command: installs what is missing, builds in release, measures, prints tables and the goals, and leaves
# nothing behind. Takes some ten minutes and up to 12 GB of memory; wants a machine that does nothing else.
#
#   sudo tests/bench.sh [--quick] [--rounds N] [--sets ABCD] [--rows pipe,ssh,zstd,snapferry]
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

# Everything is mounted in a mount namespace of its own: when the last program in it has ended, however that came about, the
# mounts, the loop devices and the memory are gone. /run is ours in there because sshd insists on a /run/sshd.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rmdir "$TMPDIR"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# shellcheck disable=SC2016 # the inner shell expands it
unshare --mount -- bash -euc '
    mount -t tmpfs -o mode=755,size=90% snapferry-bench "$TMPDIR"
    mount -t tmpfs -o mode=755 snapferry-bench-run /run
    mkdir /run/sshd
    exec "$@"' bash "$release/examples/bench" "$@"
