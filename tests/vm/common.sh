# What the scripts in this folder share.
# shellcheck shell=bash

# fail TEXT…: ends the script.
fail() {
    say "failed: $*"
    exit 1
}

# sectors_of FILE [START]: prints the sectors of a file's blocks of 4096 bytes, as A-B for each extent. START is
# the file system's first sector on the disk.
sectors_of() {
    filefrag -b4096 -v "$1" | awk -v start="${2:-0}" '$1 ~ /^[0-9]+:$/ {
        gsub(/[.:]+/, " "); print start + $4 * 8 "-" start + ($5 + 1) * 8 - 1
    }'
}

# journal_of DEVICE [START]: the first MiB of ext4's journal, which begins there after every mount.
journal_of() {
    local first
    first=$(debugfs -R 'blocks <8>' "$1" 2>/dev/null | awk '{print $1}')
    echo $((${2:-0} + first * 8))-$((${2:-0} + first * 8 + 2047))
}

# inodes_of DEVICE [START]: ext4's inode tables.
inodes_of() {
    dumpe2fs "$1" 2>/dev/null | sed -nE 's/^ *Inode table at ([0-9]+)-([0-9]+).*/\1 \2/p' |
        while read -r first last; do echo $((${2:-0} + first * 8))-$((${2:-0} + last * 8 + 7)); done
}

# files FOLDER: 200 files of up to 8 KiB in ten folders FOLDER0 to FOLDER9, flushed now and then. Each is a part
# of the same random text, as a process for each file would take most of a guest's time.
files() {
    local i text
    text=$(head -c 12000 /dev/urandom | base64 -w 0)
    for ((i = 0; i < 200; i++)); do
        ((i >= 10)) || must mkdir "$1$i"
        printf '%s' "${text:i * 41:i * 37 + 1}" >"$1$((i % 10))/$i" || fail "$1$((i % 10))/$i: not written"
        ((i % 50)) || must sync
    done
}

# The kernel has seen no error of the disk, and no file system has complained.
must_see_no_error() {
    local errors
    errors=$(dmesg | grep -E 'I/O error|critical|EXT4-fs (error|warning)|XFS .*(rror|orrupt)|blocked for more') || return 0
    fail "the kernel complains: $errors"
}

# Nothing is changed by this.
must_be_consistent() {
    case $1 in
        ext4) must e2fsck -fn /dev/vda ;;
        xfs) must xfs_repair -n /dev/vda ;;
    esac
}
