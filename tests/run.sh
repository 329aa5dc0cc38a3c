#!/usr/bin/env bash
# Every check and test there is, in one command; CI runs this, too:
#
#   sudo tests/run.sh
#
# Needs root: the tests mount btrfs images and make network namespaces. They skip nothing: what is missing is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

cargo=deploy/cargo.sh
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR-auto}

step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n==> %s\n' "$name"
    if ! "$@"; then
        printf '\nFAILED: %s\n' "$name" >&2
        exit 1
    fi
    passed+=("$name ($((SECONDS - start)) s)")
}

rustdoc() {
    RUSTDOCFLAGS="-D warnings" "$cargo" doc --workspace --no-deps --document-private-items --locked --quiet
}

# Each suite's result stands together once more at the end: there are thousands of lines between them.
tests() {
    "$cargo" test --workspace --locked --no-fail-fast 2>&1 | tee "$log"
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=()
echo "snapferry: prerequisites, format, lints, documentation, build, then all tests on real btrfs images (needs root)"
step "prerequisites" deploy/prerequisites.sh
step "format" "$cargo" fmt --all --check
step "lints" "$cargo" clippy --workspace --all-targets --locked --quiet -- -D warnings
step "documentation" rustdoc
step "build" "$cargo" build --workspace --locked --quiet
step "tests" tests

printf '\n==> results\n'
grep -aE '^ *(Running|Doc-tests) |^test result: ' "$log"
printf '\nPASSED:'
printf ' %s' "${passed[@]/%/,}" | sed 's/,$//'
printf '\n'
