# boot.sh first|second|uefi: on a system that was started from the disk under test. First its root file system is
# written to while blocks of it take no writes, then the machine is cut off, and everything must be there. Under UEFI
# it is only looked at, and written to a little.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
start=$(</sys/class/block/vda3/start)

sums() {
    (cd /root && find . -type f ! -name sums -exec sha256sum {} +)
}

grep -q '^/dev/vda3 / ext4 rw,' /proc/mounts || fail "the root file system is not the disk's"
if [[ $1 == uefi ]]; then
    [[ -d /sys/firmware/efi ]] || fail "it was not started by UEFI firmware"
    files /root/uefi
    must sync
    must_see_no_error
    exit 0
fi
[[ ! -d /sys/firmware/efi ]] || fail "it was started by UEFI firmware"
if [[ $1 == first ]]; then
    must dd if=/dev/urandom of=/root/data bs=1M count=2 2>/dev/null
    files /root/before
    must sync
    host_say "boot $(sectors_of /boot/vmlinuz "$start" | xargs)"
    host_say "data $(sectors_of /root/data "$start" | xargs)"
    host_say "journal $(journal_of /dev/vda3 "$start")"
    host_say "inodes $(inodes_of /dev/vda3 "$start" | xargs)"
    host_wait go >/dev/null || exit 1

    must dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null
    must dd if=/tmp/data of=/root/data bs=1M count=1 conv=notrunc,fsync 2>/dev/null
    must dd if=/tmp/data of=/root/data bs=64k skip=16 seek=16 conv=notrunc oflag=direct 2>/dev/null
    files /root/after
    must rm -r /root/before3
    files /root/between
    must cmp /tmp/data /root/data
    sums >/tmp/sums
    must cp /tmp/sums /root/sums
    must sync
else
    sums >/tmp/sums
    must cmp /tmp/sums /root/sums
fi
(($(wc -l </tmp/sums) > 500)) || fail "too few files to tell"
must_see_no_error
[[ $1 == second ]] || exit 0
# The journal was replayed after the cut. Nothing changes any more, so the file system can be looked at.
must mount -o remount,ro /
must e2fsck -fn /dev/vda3
must_see_no_error
