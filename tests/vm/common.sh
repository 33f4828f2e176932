# What the scripts in this folder share.
# shellcheck shell=bash

# fail TEXT…: ends the script.
fail() {
    say "failed: $*"
    exit 1
}

# Prints the sectors of a file's blocks of 4096 bytes, as A-B for each extent.
sectors_of() {
    filefrag -b4096 -v "$1" | awk '$1 ~ /^[0-9]+:$/ {
        gsub(/[.:]+/, " "); print $4 * 8 "-" ($5 + 1) * 8 - 1
    }'
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
