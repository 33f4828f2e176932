# resize.sh: the disk grows twice while its file system is mounted, and then the file system does.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh

# grown BYTES: waits until the kernel knows that the disk is as large as that.
grown() {
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        [[ $(blockdev --getsize64 /dev/vda) != "$1" ]] || return 0
        usleep 50000
    done
    fail "the disk has $(blockdev --getsize64 /dev/vda) bytes, and should have $1"
}

must mkfs.ext4 -q -J size=4 /dev/vda
must mount /dev/vda /mnt
must dd if=/dev/urandom of=/mnt/first bs=64k count=64 2>/dev/null
sum=$(sha256sum </mnt/first)
must sync
host_say "$(blockdev --getsize64 /dev/vda)"
for turn in 1 2; do
    size=$(host_wait)
    grown "$size"
    # What is new reads as zeros, also where the label was, and takes writes, up to the last sector.
    old=$((turn == 1 ? 128 << 20 : before))
    must dd if=/dev/vda bs=1M skip=$((old >> 20)) iflag=direct 2>/dev/null | tr -d '\0' | head -c 1 | cmp - /dev/null >&2 ||
        fail "what is new is not zeros"
    must dd if=/mnt/first of=/dev/vda bs=4096 count=1 seek=$((size / 4096 - 1)) oflag=direct conv=notrunc 2>/dev/null
    must dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=$((size / 4096 - 1)) oflag=direct conv=notrunc 2>/dev/null
    before=$size
    host_say "grown"
done
must resize2fs /dev/vda >&2
must dd if=/dev/urandom of=/mnt/second bs=1M count=140 2>/dev/null
[[ $(sha256sum </mnt/first) == "$sum" ]] || fail "the first file has changed"
must umount /mnt
must_be_consistent ext4
must_see_no_error
