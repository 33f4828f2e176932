# persist.sh write|check clean|killed: files with their checksums, flushed, and looked at after a restart.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh

if [[ $1 == write ]]; then
    must mkfs.ext4 -q -J size=4 /dev/vda
    must mount /dev/vda /mnt
    must mkdir /mnt/kept /mnt/load
    for ((i = 0; i < 100; i++)); do
        head -c $((i * 1013 + 1)) /dev/urandom >"/mnt/kept/$i"
    done
    (cd /mnt/kept && sha256sum ./*) >/mnt/sums
    must sync
    must_see_no_error
    host_say flushed
    if [[ $2 == killed ]]; then
        # The server is killed in the middle of this, and then this guest.
        while :; do
            for ((i = 0; i < 20; i++)); do
                head -c 20000 /dev/urandom >"/mnt/load/$i"
            done
            sync
        done
    fi
    host_wait go >/dev/null || exit 1
    must umount /mnt
else
    must mount /dev/vda /mnt
    (($(wc -l </mnt/sums) == 100)) || fail "sums are missing"
    (cd /mnt/kept && sha256sum --quiet -c ../sums >&2) || fail "the sums differ"
    must umount /mnt
    must_be_consistent ext4
fi
must_see_no_error
