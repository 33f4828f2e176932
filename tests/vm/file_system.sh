# file_system.sh ext4|xfs: names the sectors of the file system's data, journal and inodes to the host,
# which makes writes to them fail; goes on as if nothing had happened; then everything must be there.
# The bad areas lie in two parts of the disk: all over it, they would look like a disk that is gone.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
fs=$1

case $fs in
    ext4) must mkfs.ext4 -q -b 4096 -J size=4 -N 4096 -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda ;;
    xfs) must mkfs.xfs -q /dev/vda ;;
esac
must mount "/dev/vda" /mnt
must dd if=/dev/urandom of=/mnt/data bs=1M count=2 2>/dev/null
files /mnt/before
must sync

host_say "data $(sectors_of /mnt/data | xargs)"
case $fs in
    ext4)
        inodes=$(inodes_of /dev/vda)
        host_say "journal $(journal_of /dev/vda)"
        ;;
    xfs)
        log=$(xfs_db -r -c 'sb 0' -c 'p logstart' /dev/vda | sed 's/.*= //')
        log=$(xfs_db -r -c "convert fsblock $log daddr" /dev/vda | sed -E 's/.*\(([0-9]+)\).*/\1/')
        inodes=$(stat -c %i /mnt /mnt/before?/* | awk '$1 < 262144' | while read -r inode; do
            # Inodes of 512 bytes live in chunks of 64.
            sector=$(xfs_db -r -c "convert inode $((inode / 64 * 64)) daddr" /dev/vda | sed -E 's/.*\(([0-9]+)\).*/\1/')
            echo "$sector-$((sector + 63))"
        done | sort -u)
        host_say "journal $log-$((log + 2047))"
        ;;
esac
# shellcheck disable=SC2086 # one word a range
host_say "inodes" $inodes
host_wait go >/dev/null || exit 1

# In place, half of it through the page cache and half of it not.
must dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null
must dd if=/tmp/data of=/mnt/data bs=1M count=1 conv=notrunc,fsync 2>/dev/null
must dd if=/tmp/data of=/mnt/data bs=64k skip=16 seek=16 conv=notrunc oflag=direct 2>/dev/null
files /mnt/after
must rm -r /mnt/before3
files /mnt/between
# From the page cache, but for what went past it.
(cd /mnt && find . -type f -exec sha256sum {} +) >/tmp/sums
[[ $(sha256sum </tmp/data) == $(sha256sum </mnt/data) ]] || fail "the data differ before the remount"
must umount /mnt

must mount /dev/vda /mnt
(($(wc -l </tmp/sums) > 500)) || fail "too few files to tell"
(cd /mnt && sha256sum --quiet -c /tmp/sums >&2) || fail "the sums differ"
[[ $(sha256sum </tmp/data) == $(sha256sum </mnt/data) ]] || fail "the data differ"
must umount /mnt
must_be_consistent "$fs"
must_see_no_error
