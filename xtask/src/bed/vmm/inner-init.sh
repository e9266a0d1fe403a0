#!/bin/busybox sh
# The first process of the guest inside: says that it runs, then does what it is told on its console. "fill" puts
# 64 MiB into its memory; "walk", told after a restore, reads them, holds them against what they were, and writes them.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp

fill() {
    mkdir /tmp/data
    file=0
    # Each a little over 2 MiB, and hardly a page of zeros in it.
    while [ $file -lt 32 ]; do
        cp /bin/busybox /tmp/data/$file || return
        file=$((file + 1))
    done
    echo "inner: filled"
}

walk() {
    for file in /tmp/data/*; do
        [ "$(md5sum <$file)" = "$(md5sum </bin/busybox)" ] || return
        cp /bin/busybox $file || return
    done
    echo "inner: walked"
}

echo "inner: booted"
while read -r command; do
    case $command in
    fill) fill ;;
    walk) walk ;;
    esac
done
