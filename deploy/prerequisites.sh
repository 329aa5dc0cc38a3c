#!/usr/bin/env bash
# Sees to it that this machine can build snapferry and run its demonstration and tests: installs the programs that are missing
# (with apt-get, where there is one), and checks what cannot be installed. Says nothing but what it does or what is wrong.
#
#   sudo deploy/prerequisites.sh [--bench]      --bench: also what the benchmark compares with, ssh and zstd
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null # nothing in here may ask

# What is needed, as PROGRAM PACKAGE. The compiler is for two crates that contain C: ring and zstd.
needed='
btrfs        btrfs-progs
mkfs.btrfs   btrfs-progs
rsync        rsync
ip           iproute2
setcap       libcap2-bin
setfattr     attr
openssl      openssl
cc           gcc
mount        mount
losetup      mount
nsenter      util-linux
setpriv      util-linux
'
bench='
ssh          openssh-client
sshd         openssh-server
zstd         zstd
'

# A user's PATH may lack where sbin programs are.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

fail() {
    printf 'prerequisites: %s\n' "$@" >&2
    exit 1
}

# The packages whose programs are missing, one a line.
missing() {
    local program package
    while read -r program package; do
        [[ -z $program ]] || command -v "$program" >/dev/null || echo "$package"
    done <<<"$needed" | sort -u
    # A compiler without the C library's headers compiles nothing.
    if command -v cc >/dev/null && ! echo '#include <stdlib.h>' | cc -E -o /dev/null - 2>/dev/null; then echo libc6-dev; fi
}

install() {
    local packages=("$@")
    command -v apt-get >/dev/null ||
        fail "install these first (names as in Debian): ${packages[*]}" "this machine has no apt-get that could do it"
    # With the compiler come the headers that Debian only recommends.
    [[ " ${packages[*]} " != *" gcc "* ]] || packages+=(libc6-dev)
    echo "prerequisites: installing ${packages[*]}"
    local log
    log=$(mktemp)
    # shellcheck disable=SC2064 # the name of now
    trap "rm -f '$log'" EXIT
    export DEBIAN_FRONTEND=noninteractive
    # An update may fail for somebody else's repository; whether the packages are there is what counts.
    apt-get -qq update >"$log" 2>&1 || echo "prerequisites: apt-get update had errors; going on" >&2
    # "$log" is only of interest if this fails. policy-rc.d is not ours to touch: an sshd or rsync service may start.
    apt-get -qq install -y --no-install-recommends "${packages[@]}" >>"$log" 2>&1 || {
        cat "$log" >&2
        fail "apt-get could not install: ${packages[*]}"
    }
}

check_btrfs() {
    grep -qw btrfs /proc/filesystems && return
    if command -v modprobe >/dev/null; then modprobe -q btrfs || true; fi
    grep -qw btrfs /proc/filesystems ||
        fail "this kernel ($(uname -r)) knows no btrfs, and loading the module btrfs did not help" \
            "in a container: load it on the host; else use a kernel with CONFIG_BTRFS_FS"
}

check_loop_devices() {
    if [[ ! -e /dev/loop-control ]] && command -v modprobe >/dev/null; then modprobe -q loop || true; fi
    losetup --find >/dev/null 2>&1 ||
        fail "no loop device can be had; in a container: run it with access to /dev/loop-control and /dev/loop*"
}

# Which Rust is needed stands in Cargo.toml.
check_cargo() {
    local need have advice
    need=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    advice="install Rust $need or newer, for instance with https://rustup.rs"
    have=$(deploy/cargo.sh --version 2>/dev/null) || fail "there is no cargo, neither in PATH nor in ~/.cargo/bin; $advice"
    have=$(cut -d' ' -f2 <<<"$have")
    [[ $(printf '%s\n' "$need" "$have" | sort -V | head -n1) == "$need" ]] || fail "cargo is $have, too old; $advice"
}

case "${1-}" in
--bench) needed+=$bench ;;
'') ;;
*) fail "unknown argument $1; usage: deploy/prerequisites.sh [--bench]" ;;
esac
[[ $EUID == 0 ]] || fail "btrfs images are to be mounted and network namespaces to be made: run it as root, with sudo"
mapfile -t packages < <(missing)
[[ ${#packages[@]} == 0 ]] || install "${packages[@]}"
mapfile -t packages < <(missing)
[[ ${#packages[@]} == 0 ]] || fail "still missing after the installation: ${packages[*]}"
check_btrfs
check_loop_devices
check_cargo
