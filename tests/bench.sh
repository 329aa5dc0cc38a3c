#!/bin/sh
# The benchmark, one command: installs what is missing, builds in release, measures, prints a table, leaves nothing behind.
#   sudo tests/bench.sh [--quick] [--rounds N] [--sets ABCD] [--rows pipe,ssh,zstd,snapferry]
set -eu
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || { echo "bench.sh: it mounts btrfs images: run it as root (sudo tests/bench.sh)" >&2; exit 1; }
if [ -x deploy/prerequisites.sh ]; then deploy/prerequisites.sh; fi
for tool in cargo cc btrfs mkfs.btrfs ssh ssh-keygen /usr/sbin/sshd zstd setpriv unshare; do
    command -v "$tool" >/dev/null || { echo "bench.sh: $tool is missing; install it first" >&2; exit 1; }
done

cargo build --release --locked -p snapferry-sender -p snapferry-receiver
cargo build --release --locked -p snapferry-tests --example bench
bench=$(readlink -f "${CARGO_TARGET_DIR:-target}/release/examples/bench")

# Everything is mounted in a mount namespace of its own: when the last program in it has ended, however that came about, the
# mounts, the loop devices and the memory are gone. /run is ours in there because sshd insists on /run/sshd.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rmdir "$TMPDIR"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# shellcheck disable=SC2016 # the inner shell expands it
unshare --mount -- sh -euc '
    mount -t tmpfs -o mode=755,size=90% snapferry-bench "$TMPDIR"
    mount -t tmpfs -o mode=755 snapferry-bench-run /run
    mkdir /run/sshd
    exec "$@"' sh "$bench" "$@"
