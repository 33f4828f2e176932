# full.sh fail|hold SLOTS: more blocks of a file take no writes than there are slots for.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
policy=$1 slots=$2 blocks=32

# write BLOCK: new content for a block of /mnt/data; what is there afterwards should be in /tmp/data.
write() {
    must dd if=/dev/urandom of=/tmp/block bs=4096 count=1 2>/dev/null
    dd if=/tmp/block of=/mnt/data bs=4096 seek="$1" conv=notrunc oflag=direct 2>/tmp/error || return
    must dd if=/tmp/block of=/tmp/data bs=4096 seek="$1" conv=notrunc 2>/dev/null
}

# The data are what they should be, on the disk.
must_have_data() {
    must dd if=/mnt/data of=/tmp/read bs=64k iflag=direct 2>/dev/null
    must cmp /tmp/data /tmp/read
}

# All that was flushed is there.
must_have_files() {
    (cd /mnt && sha256sum --quiet -c /tmp/sums >&2) || fail "the sums differ"
}

note_files() {
    (cd /mnt && find before? after? -type f -exec sha256sum {} +) >/tmp/sums
    (($(wc -l </tmp/sums) == 400)) || fail "there are $(wc -l </tmp/sums) files of 400"
}

must mkfs.ext4 -q -b 4096 -J size=4 -N 1024 -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
must mount -o errors=remount-ro /dev/vda /mnt
must dd if=/dev/urandom of=/tmp/data bs=4096 count=$blocks 2>/dev/null
must dd if=/tmp/data of=/mnt/data bs=64k conv=fsync 2>/dev/null
files /mnt/before
must sync
data=$(sectors_of /mnt/data)
[[ $data != *$'\n'* ]] || fail "the file is not in one piece: $data"
host_say "data $data"
host_say "journal $(journal_of /dev/vda)"
host_wait go >/dev/null || exit 1

if [[ $policy == hold ]]; then
    # One write of all blocks, which waits where the slots end.
    must dd if=/dev/urandom of=/tmp/data bs=4096 count=$blocks 2>/dev/null
    dd if=/tmp/data of=/mnt/data bs=4096 conv=notrunc oflag=direct 2>/tmp/error &
    files /mnt/after
    must sync
    note_files
    host_say others
    wait $! || fail "a write that was to wait has failed: $(</tmp/error)"
    must_have_data
    must umount /mnt
    must mount /dev/vda /mnt
    must_have_data
    must_have_files
    must umount /mnt
    must_be_consistent ext4
    must_see_no_error
    exit 0
fi

failed=0
for ((i = 0; i < blocks; i++)); do
    write $i && continue
    grep -q 'Input/output error' /tmp/error || fail "block $i: $(</tmp/error)"
    ((i >= slots)) || fail "block $i failed, and there are $slots slots"
    failed=$((failed + 1))
done
((failed == blocks - slots)) || fail "$failed writes failed, where $((blocks - slots)) had no slot"
# What could not be written is as it was, and what lives in a slot takes writes.
must_have_data
for ((i = 0; i < slots; i++)); do
    write $i || fail "block $i, which has a slot, takes no write: $(</tmp/error)"
done
# The file system goes on.
files /mnt/after
must sync
note_files
must_have_data
! complaints=$(dmesg | grep -E 'EXT4-fs (error|warning)|blocked for more|Aborting journal') ||
    fail "the file system complains: $complaints"
# The kernel does not log all errors where there are many.
elsewhere=$(dmesg | sed -nE 's/.*I\/O error, dev vda, sector ([0-9]+) .*/\1/p' |
    awk -v first="${data%-*}" -v last="${data#*-}" '$1 < first || $1 > last')
[[ ! $elsewhere ]] || fail "errors in sectors where nothing is bad: $elsewhere"
host_say "failed $failed"
host_wait go >/dev/null || exit 1

# The journal takes no writes either now. No slot is left for it, so the file system has to stop.
head -c 5000 /dev/urandom >/mnt/never
! sync -f /mnt/never 2>/tmp/error || fail "a file was flushed through a journal that takes no writes"
! touch /mnt/another 2>/dev/null || fail "a file system without journal takes changes"
must_have_files
must umount /mnt
host_say stopped
host_wait go >/dev/null || exit 1

# The host has made all of it good again.
e2fsck -fy /dev/vda >&2
(($? <= 1)) || fail "e2fsck leaves errors"
must mount /dev/vda /mnt
must_have_files
must_have_data
for ((i = 0; i < blocks; i++)); do
    write $i || fail "block $i takes no write: $(</tmp/error)"
done
must sync
must_have_data
must umount /mnt
must_be_consistent ext4
