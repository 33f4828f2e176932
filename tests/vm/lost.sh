# lost.sh: blocks of a file of which the host makes some sectors unreadable, and which take no writes. A sector
# is written, in its block the unreadable rest is lost, and comes back as it is written again.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
blocks=32 whole=5 part=20

# write SECTOR COUNT: new content for sectors of the file.
write() {
    must dd if=/dev/urandom of=/tmp/file bs=512 seek="$1" count="$2" conv=notrunc 2>/dev/null
    must dd if=/tmp/file of=/mnt/file bs="$((512 * $2))" skip="$(($1 / $2))" seek="$(($1 / $2))" count=1 conv=notrunc \
        oflag=direct 2>/dev/null
}

# same SIZE SKIP COUNT: reads a part of the file from the disk and compares it. Fails if it cannot be read, and ends
# the script if it is not what was written.
same() {
    dd if=/mnt/file of=/tmp/part bs="$1" skip="$2" count="$3" iflag=direct 2>/tmp/error || return
    dd if=/tmp/file bs="$1" skip="$2" count="$3" 2>/dev/null | cmp - /tmp/part >&2 ||
        fail "$3 times $1 bytes after $2 can be read and are not what was written"
}

# Sets `found` to the numbers of the file's sectors that cannot be read; none outside of the two blocks.
find_unreadable() {
    local block i
    found=''
    must same 4096 0 $whole
    must same 4096 $((whole + 1)) $((part - whole - 1))
    must same 4096 $((part + 1)) $((blocks - part - 1))
    for block in $whole $part; do
        for ((i = block * 8; i < block * 8 + 8; i++)); do
            same 512 $i 1 && continue
            grep -q 'Input/output error' /tmp/error || fail "sector $i: $(</tmp/error)"
            found+=" $i"
        done
    done
}

# expect SECTOR…: just these sectors of the file cannot be read.
expect() {
    find_unreadable
    [[ ${found# } == "$*" ]] || fail "sectors $* should be unreadable, these are:$found"
}

must mkfs.ext4 -q -b 4096 /dev/vda
must mount /dev/vda /mnt
must dd if=/dev/urandom of=/tmp/file bs=4096 count=$blocks 2>/dev/null
must dd if=/tmp/file of=/mnt/file bs=64k conv=fsync 2>/dev/null
extents=$(sectors_of /mnt/file)
[[ $extents != *$'\n'* ]] || fail "the file is not in one piece: $extents"
start=${extents%-*}
host_say "whole $((start + whole * 8))-$((start + whole * 8 + 7))"
host_say "part $((start + part * 8))-$((start + part * 8 + 7))"
host_wait go >/dev/null || exit 1

# The host has made all of the first block unreadable, and sectors 1, 5 and 6 of the second.
write $((whole * 8 + 2)) 1
write $((part * 8 + 5)) 1
expect 40 41 43 44 45 46 47 161 166
host_say lost
host_wait go >/dev/null || exit 1

write 44 1
expect 40 41 43 45 46 47 161 166
write 40 8
write 161 1
expect 166
host_say rewritten
host_wait go >/dev/null || exit 1

# The host has made it readable again, and nothing has been written there since.
expect
must umount /mnt
must mount /dev/vda /mnt
must cmp /tmp/file /mnt/file
must umount /mnt
must_be_consistent ext4
