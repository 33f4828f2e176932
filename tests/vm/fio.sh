# fio.sh [SECONDS]: writes at random from four processors at least so long, or until the host says stop; reads it
# all back between rounds and compares it with its checksums.
# shellcheck shell=bash source=tests/vm/common.sh
. ./common.sh
# The 35th of the features that were negotiated is VIRTIO_F_RING_PACKED.
read -r features </sys/block/vda/device/features
rings=(split packed)
host_say "running on ${rings[${features:34:1}]} rings"
queues=$(find /sys/block/vda/mq -mindepth 1 -maxdepth 1 | wc -l)
((queues == 4)) || fail "the disk has $queues queues"
if [[ ! ${1:-} ]]; then
    host_wait stop >/dev/null &
    waiter=$!
fi
is_over() {
    if [[ ${1:-} ]]; then ((SECONDS >= $1)); else ! kill -0 "$waiter" 2>/dev/null; fi
}
until is_over "$@"; do
    must fio --name=verify --filename=/dev/vda --size=2M --offset_increment=64M --numjobs=4 --rw=randwrite \
        --bsrange=4k-32k --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --randrepeat=0 --minimal --output=/tmp/fio
done
must_see_no_error
