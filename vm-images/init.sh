# What the first processes of all guests share: gets the machine ready, runs the host's script and reports
# its exit status to vm-images/run on the second serial port. The first is the console. Each guest's own
# init brings the programs.
# shellcheck shell=bash

export HOME=/ TERM=dumb

mount_all() {
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    ln -sf /proc/self/fd /dev/fd
}

# The channel to the host, where the machine has one: a virtio console, of which the driver learns the ports some
# time after it has found it. It is held open: closing it would drop what was not read yet.
open_channel() {
    local port tries
    grep -qsx 0x0003 /sys/bus/virtio/devices/*/device || return 0
    modprobe virtio_console
    for ((tries = 0; tries < 500; tries++)); do
        for port in /sys/class/virtio-ports/*; do
            if [[ -e $port/name && $(<"$port/name") == host ]]; then
                exec 9<>"/dev/${port##*/}"
                export HOST_CHANNEL=9
                return
            fi
        done
        usleep 20000
    done
}

# No unmount, no sync: the guest ends as with a power cut, and QEMU ends with it.
cut_off() {
    echo 0 >/proc/sys/kernel/printk
    reboot -f -n
}

# run_script FOLDER: runs the script that the host has handed in there, and ends the machine.
run_script() {
    local host=$1 status
    if [[ ! -e $host/vm/script ]]; then
        # Started by hand, so that somebody is at the console.
        setsid -c bash --rcfile /vm/lib.sh -i </dev/ttyS0 &>/dev/ttyS0
        cut_off
    fi
    # Line ends as the host writes them.
    stty -F /dev/ttyS0 -onlcr
    stty -F /dev/ttyS1 raw
    echo started >/dev/ttyS1
    cd "$host/files" || exit
    bash -c ". /vm/lib.sh; . $host/vm/args; . $host/vm/script" script </dev/null
    status=$?
    # Setting a terminal waits until it has sent everything; what the console still holds would be lost.
    stty -F /dev/ttyS0 -onlcr
    echo "status $status" >/dev/ttyS1
    cut_off
}
