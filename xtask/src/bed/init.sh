#!/bin/busybox sh
# The first process of a guest: readies the system, runs /bed/program, tells its status, powers off.
# The kernel's log is on ttyS0; ttyS1 belongs to the program, framed by two lines that carry the token.

/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin HOME=/root TERM=dumb
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/shm /dev/hugepages
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t debugfs debugfs /sys/kernel/debug
mount -t hugetlbfs hugetlbfs /dev/hugepages

fail() {
    echo "kvmprep-bed: init failed: $*" >/dev/kmsg
    echo "kvmprep-bed: init failed: $*"
    sleep 1
    poweroff -f
}

for module in /bed/modules/*.ko; do
    [ -e "$module" ] || continue
    insmod "$module" || fail "cannot load $module"
done

# So that no program's VM is KVM's first or last.
[ ! -e /dev/kvm ] || said=$(/bed/keeper 2>&1) || fail "no VM can be kept: $said"

token=$(cat /bed/token)
# Opened once and kept: the settings are the program's too. Raw, or every newline would grow a carriage return.
exec 3>/dev/ttyS1 || fail "there is no second serial port"
stty -F /dev/ttyS1 raw -echo || fail "cannot set up the second serial port"

echo "kvmprep-bed: the program starts" >/dev/kmsg
echo "$token start" >&3
sh /bed/program </dev/null >&3 2>&1 3>&-
status=$?
printf '\n%s end %d\n' "$token" "$status" >&3
# Changing the settings waits until everything has been sent.
stty -F /dev/ttyS1 raw -echo
poweroff -f
# Only reached when the machine has no way of turning itself off.
sleep 2
reboot -f
