# unreadable.sh: one block of a file cannot be read until it is written again.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
blocks=32 bad=13

# Prints the numbers of the blocks of /mnt/file that cannot be read, and fails if one that can is not as in /tmp/file.
unreadable_blocks() {
    local i
    for ((i = 0; i < blocks; i++)); do
        if dd if=/mnt/file of=/tmp/block bs=4096 skip=$i count=1 iflag=direct 2>/tmp/error; then
            dd if=/tmp/file bs=4096 skip=$i count=1 2>/dev/null | cmp - /tmp/block >&2 || return 1
        else
            grep -q 'Input/output error' /tmp/error || return 1
            echo "$i"
        fi
    done
}

must mkfs.ext4 -q -b 4096 /dev/vda
must mount /dev/vda /mnt
must dd if=/dev/urandom of=/tmp/file bs=4096 count=$blocks 2>/dev/null
must dd if=/tmp/file of=/mnt/file bs=64k conv=fsync 2>/dev/null
extents=$(sectors_of /mnt/file)
[[ $extents != *$'\n'* ]] || fail "the file is not in one piece: $extents"
start=$((${extents%-*} + bad * 8))
host_say "block $start-$((start + 7))"
host_wait go >/dev/null || exit 1

found=$(unreadable_blocks) || fail "a block that can be read is not what was written"
[[ $found == "$bad" ]] || fail "block $bad is bad, these cannot be read: $found"
host_say read
host_wait go >/dev/null || exit 1

must dd if=/tmp/file of=/mnt/file bs=4096 skip=$bad seek=$bad count=1 conv=notrunc oflag=direct 2>/dev/null
found=$(unreadable_blocks) || fail "a block that can be read is not what was written"
[[ ! $found ]] || fail "after rewriting, these cannot be read: $found"
must umount /mnt
must mount /dev/vda /mnt
must cmp /tmp/file /mnt/file
must umount /mnt
must_be_consistent ext4
