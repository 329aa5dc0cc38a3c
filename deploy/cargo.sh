#!/usr/bin/env bash
# cargo, also under sudo: sudo resets PATH, and the Rust toolchain is that of the user who called it. What is built by root
# meanwhile is given back to that user in the end, who could not remove it otherwise.
#
#   deploy/cargo.sh ARGUMENTS...      as `cargo ARGUMENTS...`
set -euo pipefail

user_home=
if [[ $EUID == 0 && -n ${SUDO_USER-} && $SUDO_USER != root ]]; then
    user_home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    export CARGO_HOME=${CARGO_HOME:-$user_home/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$user_home/.rustup}
fi
PATH=${CARGO_HOME:-${HOME-/root}/.cargo}/bin:$PATH:/usr/local/cargo/bin

give_back() {
    local target=${CARGO_TARGET_DIR:-$(dirname "${BASH_SOURCE[0]}")/../target} dir
    for dir in "$target" "$CARGO_HOME"; do
        [[ ! -d $dir ]] || find "$dir" -xdev -user root -exec chown -h "$SUDO_UID:$SUDO_GID" {} +
    done
}

[[ -z $user_home ]] || trap give_back EXIT
trap : INT TERM # they are for cargo, which ends; then we do
cargo "$@"
