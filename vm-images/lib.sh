# What every guest script can use.
# shellcheck shell=bash

# say TEXT…: prints a line on the console, wherever standard output goes.
say() {
    echo "$*" >/dev/console
}

# must COMMAND…: runs the command, and ends the script with its status if it fails (not the script but
# only a part of it, in a pipeline or in parentheses).
must() {
    local status=0
    "$@" || status=$?
    if ((status)); then
        say "failed with status $status: $*"
        exit "$status"
    fi
}

# host_say LINE: sends a line to the host, waiting for the host to connect.
host_say() {
    : "${HOST_CHANNEL:?this guest was started without --host-channel}"
    printf '%s\n' "$*" >&9
}

# host_wait [EXPECTED]: waits for a line from the host and prints it. Fails if it is not EXPECTED.
host_wait() {
    : "${HOST_CHANNEL:?this guest was started without --host-channel}"
    local line='' part
    # Reading ends early while nobody is connected on the host's side.
    until IFS= read -r part <&9; do
        line+=$part
        usleep 20000
    done
    line+=$part
    printf '%s\n' "$line"
    if (($#)) && [[ $line != "$1" ]]; then
        say "host_wait: expected '$1', got '$line'"
        return 1
    fi
}
