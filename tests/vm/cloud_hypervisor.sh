# cloud_hypervisor.sh: a file system on the disk under test. cloud-hypervisor starts a guest again that resets, and
# ends with one that is switched off; the guest's serial port is its only one.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
trap 'stty -F /dev/ttyS0 -onlcr; poweroff -f -n' EXIT

must mkfs.ext4 -q /dev/vda
must mount /dev/vda /mnt
files /mnt/kept
must sync
(cd /mnt && find . -type f -exec sha256sum {} + >/tmp/sums)
must umount /mnt
must mount /dev/vda /mnt
(($(wc -l </tmp/sums) == 200)) || fail "files are missing"
(cd /mnt && sha256sum --quiet -c /tmp/sums) || fail "the sums differ"
must umount /mnt
must_be_consistent ext4
must_see_no_error
say "all is well"
