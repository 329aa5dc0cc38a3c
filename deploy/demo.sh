#!/usr/bin/env bash
# Shows snapferry at work, on one machine, with the real agents: a head node, a mirror box and a client of it, each a network
# namespace; the disks are btrfs images in files. Nothing is left behind, unless --keep is given.
#
#   sudo deploy/demo.sh            the demonstration: a minute, and before that the build
#   sudo deploy/demo.sh --keep     leaves all of it running in the end, and says how to look around
#   sudo deploy/demo.sh --clean    removes what --keep left
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

# There is at most one demonstration at a time: this link names its directory, and making it is the lock.
readonly link=/run/snapferry-demo
readonly head=snapferry-head mirror=snapferry-mirror client=snapferry-client
readonly head_address=10.77.0.1 mirror_address=10.77.0.2
# Clients have a cable of their own to the mirror box. None leads to the head node.
readonly mirror_address_for_clients=10.77.1.2 client_address=10.77.1.3
readonly url=rsync://$mirror_address_for_clients/substitutes/

readonly first_mb=300 added_mb=60
# The slow client's limit: its copy takes half a minute, so that the increment fits into the second half of it.
readonly client_kib_per_second=10000
readonly cable_mbit=1000

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# --- what this script says ---------------------------------------------------------------------------------------------

heading() { printf '\n== %s\n\n' "$*"; }
say() { printf '%s\n' "$@"; }
fail() {
    printf 'demo: %s\n' "$@" >&2
    exit 1
}

# Shows what an agent has logged since this was last called for it, without what would only make the lines longer here: date,
# volume, stage, and in lines about progress the snapshot.
show_log() {
    local who=$1 file=$work/$1.log from
    from=$(cat "$work/$who.shown" 2>/dev/null || echo 1)
    tail -n "+$from" "$file" |
        sed -E "s/^[0-9-]+T/$(printf '%-6s' "$who") /; s/ (volume|stage)=[^ ]*//g; / progress /s/ snapshot=[^ ]*//"
    echo $(($(wc -l <"$file") + 1)) >"$work/$who.shown"
}

show_logs() {
    show_log head
    echo
    show_log mirror
}

# The value of a field in a line of an agent's log.
field() { sed -nE "s/.* $1=([^ ]*).*/\1/p"; }

megabytes() { du -sb --apparent-size "$1" 2>/dev/null | awk '{ printf "%d", $1 / 1e6 }'; }
files() { find "$1" -type f 2>/dev/null | wc -l; }

# --- hosts and processes -----------------------------------------------------------------------------------------------

# Runs a command on a host. Not with `ip netns exec`, which makes a mount namespace, too: the trees that the receiver
# publishes would be seen by nobody else.
on() {
    local host=$1
    shift
    nsenter --net="/run/netns/$host" -- "$@"
}

# Waits until a command succeeds; fails after a minute, or when process $1 has ended before that.
wait_until() {
    local pid=$1 what=$2 tries
    shift 2
    for ((tries = 0; tries < 600; tries++)); do
        if "$@"; then return 0; fi
        kill -0 "$pid" 2>/dev/null || fail "process $pid has ended while this was waited for: $what"
        sleep 0.1
    done
    fail "waited for a minute in vain: $what"
}

# A cable between two hosts: HOST ADDRESS HOST ADDRESS NAME
cable() {
    ip link add "$5" netns "$1" type veth peer name "$5" netns "$3"
    ip -n "$1" addr add "$2/24" dev "$5"
    ip -n "$3" addr add "$4/24" dev "$5"
    ip -n "$1" link set "$5" up
    ip -n "$3" link set "$5" up
}

make_hosts() {
    local host
    for host in "$head" "$mirror" "$client"; do
        ip netns add "$host"
        ip -n "$host" link set lo up
    done
    cable "$head" "$head_address" "$mirror" "$mirror_address" ferry
    cable "$client" "$client_address" "$mirror" "$mirror_address_for_clients" clients
    cable_says="a cable of $cable_mbit Mbit/s"
    tc -n "$head" qdisc add dev ferry root tbf rate "${cable_mbit}mbit" burst 1mb latency 100ms 2>/dev/null ||
        cable_says="a cable (of any speed: this kernel cannot limit it)"
}

make_disk() {
    truncate -s 4G "$1.image"
    mkfs.btrfs -q "$1.image" >/dev/null # in spite of -q it has something to say
    mkdir "$1"
    mount -t btrfs -o loop,noatime "$1.image" "$1"
}

# --- the pair ----------------------------------------------------------------------------------------------------------

build() {
    # What cargo says is for whoever waits for it.
    deploy/cargo.sh build --release --locked -p snapferry-sender -p snapferry-receiver
    deploy/cargo.sh build --release --locked -p snapferry-tests --example nar-cache
    local target
    target=$(deploy/cargo.sh metadata --format-version 1 --no-deps --offline --locked |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
    programs=$target/release
}

configure() {
    local sender_is receiver_is
    sender_is=$("$programs/snapferry-sender" keygen "$work/head")
    receiver_is=$("$programs/snapferry-receiver" keygen "$work/mirror")
    cat >"$work/head/sender.toml" <<END
[agent]
name = "head"
state_dir = "state"

[tls]
certificate = "sender.crt"
private_key = "sender.key"
peers = ["$receiver_is"]

[receiver]
address = "$mirror_address:7440"

[[volume]]
name = "substitutes"
source = "disk/publish"
snapshot_dir = "disk/.snapferry"
interval = "1m"

[log]
progress_interval = "500ms"
END
    cat >"$work/mirror/receiver.toml" <<END
[agent]
name = "mirror"
state_dir = "state"

[tls]
certificate = "receiver.crt"
private_key = "receiver.key"
peers = ["$sender_is"]

[listen]
address = "$mirror_address:7440"

[[volume]]
name = "substitutes"
store = "disk/substitutes"
publish = "publish"

[rsync]
address = "0.0.0.0"

[log]
progress_interval = "500ms"
END
}

sender() { on "$head" "$programs/snapferry-sender" --config "$work/head/sender.toml" "$@"; }
receiver() { on "$mirror" "$programs/snapferry-receiver" --config "$work/mirror/receiver.toml" "$@"; }

# In sessions of their own: a Ctrl-C is for this script, which then ends them in order.
start_receiver() {
    setsid nsenter --net="/run/netns/$mirror" -- \
        "$programs/snapferry-receiver" --config "$work/mirror/receiver.toml" run 2>>"$work/mirror.log" &
    receiver_pid=$!
    wait_until "$receiver_pid" "the receiver listens" grep -q " listening" "$work/mirror.log"
}

start_sender() {
    setsid nsenter --net="/run/netns/$head" -- \
        "$programs/snapferry-sender" --config "$work/head/sender.toml" run "$@" 2>>"$work/head.log" &
    sender_pid=$!
}

cycle() {
    start_sender --once
    wait "$sender_pid" || fail "the cycle failed"
    snapshot=$(tail -n1 "$work/head.log" | field snapshot)
}

row() {
    printf '%-10s %-28s %9s %8s %11s %8s\n' "$@"
}

summary() {
    local line kind
    row "" snapshot bytes time rate swap
    while read -r line; do
        kind=increment
        [[ $line != *" base=none "* ]] || kind=full
        row "$kind" "$(field snapshot <<<"$line")" "$(field bytes <<<"$line")" "$(field seconds <<<"$line")" \
            "$(field average_rate <<<"$line")" "$(field swap_us <<<"$line")"
    done < <(grep " cycle finished " "$work/head.log")
}

# --- clients -----------------------------------------------------------------------------------------------------------

half_way() {
    [[ $(megabytes "$work/client-1") -ge $(($1 / 2)) ]]
}

# How two trees differ, down to owners, times, links and extended attributes; content by checksum.
differences() {
    rsync --dry-run --checksum --archive --hard-links --acls --xattrs --numeric-ids --delete --itemize-changes "$1/" "$2/"
}

assert_equal() {
    local differences
    differences=$(differences "$2" "$3")
    [[ -z $differences ]] || fail "$1 is not equal to ${2##*/}:" "$(head -n20 <<<"$differences")"
    printf '%-15s = %s: %d files, content, owners, modes, times and all\n' "$1" "${2##*/}" "$(files "$3")"
}

# --- cleaning up -------------------------------------------------------------------------------------------------------
#
# This also runs from a trap, where a bare `return` means the status from before the trap: it is `return 0` here.

processes() {
    local host
    for host in "$head" "$mirror" "$client"; do ip netns pids "$host" 2>/dev/null || true; done
}

# Ends everything that runs on the hosts: first politely, the agents end what they started.
end_processes() {
    local tries pids
    for ((tries = 0; tries < 100; tries++)); do
        mapfile -t pids < <(processes)
        [[ ${#pids[@]} -gt 0 ]] || return 0
        if ((tries == 0)); then kill "${pids[@]}" 2>/dev/null || true; fi
        if ((tries == 80)); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
        sleep 0.1
    done
    say "demo: these processes do not end: ${pids[*]}" >&2
}

unmount() {
    local tries
    for ((tries = 0; tries < 50; tries++)); do
        if ! mountpoint -q "$1" || umount "$1" 2>/dev/null; then return 0; fi
        sleep 0.1
    done
    say "demo: somebody is inside $1; it goes when they leave" >&2
    umount -l "$1" || true
}

clean() {
    local dir host mount
    dir=$(readlink "$link") || return 0
    end_processes
    for mount in "$dir"/mirror/publish/*/tree "$dir/mirror/disk" "$dir/head/disk"; do unmount "$mount"; done
    for host in "$head" "$mirror" "$client"; do ip netns del "$host" 2>/dev/null || true; done
    rm -rf --one-file-system "$dir"
    rm -f "$link"
}

finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP # this must come to its end
    case $status in
    0) ;;
    130 | 143) say "" "demo: stopped" >&2 ;;
    *) say_why >&2 ;;
    esac
    if ((keep && status == 0)); then
        look_around
    else
        say "" "cleaning up: agents, mounts, namespaces, $work"
        clean
    fi
    exit "$status"
}

say_why() {
    local host
    for host in head mirror; do
        [[ ! -s $work/$host.log ]] || say "" "the last lines of $host.log:" "$(tail -n 15 "$work/$host.log")"
    done
    say "" "demo: FAILED"
}

# Short commands for whoever looks around.
write_shortcuts() {
    shortcut sender nsenter "--net=/run/netns/$head" "$programs/snapferry-sender" --config "$work/head/sender.toml"
    shortcut receiver nsenter "--net=/run/netns/$mirror" "$programs/snapferry-receiver" --config "$work/mirror/receiver.toml"
    shortcut client nsenter "--net=/run/netns/$client"
    shortcut grow "$programs/examples/nar-cache" "$work/head/disk/publish"
}

shortcut() {
    local file=$work/$1
    shift
    printf '#!/bin/sh\nexec %s "$@"\n' "${*@Q}" >"$file"
    chmod +x "$file"
}

look_around() {
    cat <<END

== Left running

The sender takes a snapshot every minute and ferries it. As root:

  cd $link/
  tail -f head.log mirror.log
  less head/sender.toml mirror/receiver.toml
  ls head/disk/publish mirror/publish/live/tree     # the source, and what clients see of it
  ./grow 50 4                                       # 50 MB more at the source; another number than 4 the next time
  ./sender plan
  ./sender snapshots
  ./receiver snapshots
  ./client rsync $url

Remove it with: sudo deploy/demo.sh --clean
END
}

# --- the demonstration -------------------------------------------------------------------------------------------------

prepare() {
    heading "Build"
    deploy/prerequisites.sh
    build

    work=$(mktemp -d -t snapferry-demo.XXXXXX)
    ln -s "$work" "$link" 2>/dev/null || {
        rmdir "$work"
        refuse
    }
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    local free
    free=$(df --output=avail -B1M "$work" | tail -n1)
    ((free > 3000)) || fail "3 GB are needed for a while in ${work%/*}, $free MB are free; set TMPDIR to another place"
}

refuse() {
    fail "there is a demonstration already ($(readlink "$link" || echo "network namespaces $head, $mirror, $client"))" \
        "sudo deploy/demo.sh --clean removes it"
}

set_up() {
    heading "Two hosts, $cable_says, two btrfs disks"
    mkdir "$work/head" "$work/mirror"
    make_disk "$work/head/disk"
    make_disk "$work/mirror/disk"
    btrfs -q subvolume create "$work/head/disk/publish"
    mkdir "$work/head/disk/.snapferry" "$work/mirror/publish"
    configure
    "$programs/examples/nar-cache" "$work/head/disk/publish" "$first_mb" 1 >"$work/nar-cache.log"
    say "head node   $head_address   source: $(cat "$work/nar-cache.log"), as guix publish keeps them"
    say "mirror box  $mirror_address   $mirror_address_for_clients for clients"
    start_receiver
}

publish_first() {
    heading "Snapshot one: everything"
    cycle
    first=$work/head/disk/.snapferry/$snapshot
    show_logs
}

start_slow_client() {
    local size
    heading "A slow client begins to copy: rsync -a --bwlimit=$client_kib_per_second $url"
    size=$(megabytes "$first")
    # Without the daemon's greeting; an error still goes to stderr.
    on "$client" rsync -a "--bwlimit=$client_kib_per_second" "$url" "$work/client-1/" >/dev/null &
    client_pid=$!
    wait_until "$client_pid" "the slow client is half-way" half_way "$size"
    say "it is half-way: $(files "$work/client-1") of $(files "$first") files, $(megabytes "$work/client-1") of $size MB"
}

publish_second() {
    local source=$work/head/disk/publish
    heading "Meanwhile the source changes, and snapshot two is ferried: the difference only"
    say "removed: $("$programs/examples/nar-cache" "$source" --remove 20 2)"
    say "added: $("$programs/examples/nar-cache" "$source" "$added_mb" 3)"
    local rewritten
    mapfile -t rewritten < <(find "$source" -name '*.narinfo' | sort | awk 'NR % 10 == 0')
    sed -i 's/^Signature: 1;farm/Signature: 1;other-farm/' "${rewritten[@]}"
    say "rewritten: ${#rewritten[@]} narinfos" ""
    cycle
    second=$work/head/disk/.snapferry/$snapshot
    show_logs
    kill -0 "$client_pid" 2>/dev/null ||
        fail "the slow client was done before snapshot two was published: this machine is too busy to show what was to be shown"
    say "" "the slow client is still at work: $(files "$work/client-1") of $(files "$first") files"
}

compare_clients() {
    heading "What the clients have"
    on "$client" rsync -a "$url" "$work/client-2/" >/dev/null
    assert_equal "a new client" "$second" "$work/client-2"
    say "(now the slow client takes its time to the end)"
    wait "$client_pid" || fail "the slow client failed"
    assert_equal "the slow client" "$first" "$work/client-1"
    say "(the two snapshots differ in $(differences "$first" "$second" | wc -l) places)"
}

demonstrate() {
    prepare
    make_hosts
    set_up
    publish_first
    start_slow_client
    publish_second
    compare_clients
    wait_until "$receiver_pid" "snapshot one is retired" grep -q "last client has left" "$work/mirror.log"
    echo
    show_log mirror
    heading "In numbers"
    summary
    if ((keep)); then
        write_shortcuts
        start_sender
        disown -a
    fi
}

keep=0
case "${1-}" in
'') ;;
--keep) keep=1 ;;
--clean) ;;
*) fail "unknown argument $1; usage: deploy/demo.sh [--keep | --clean]" ;;
esac
[[ $EUID == 0 ]] || fail "it mounts btrfs images and makes network namespaces: run it as root, with sudo"
if [[ ${1-} == --clean ]]; then
    clean
    exit
fi
for host in "$head" "$mirror" "$client"; do
    [[ ! -e /run/netns/$host ]] || refuse
done
[[ ! -L $link ]] || refuse
demonstrate
