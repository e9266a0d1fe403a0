#!/bin/sh
# Runs in the outer guest: takes QEMU through one case after the other and prints what KVM counted. A line of /cases is
#     NAME PHASE HUGE_PAGES MACHINE PROGRAM OPTION...
# and each is answered by a line `case NAME`, lines of what was seen, and `done NAME` or `failed NAME WHY`. It judges
# nothing: that is for the host. See run.rs and observed.rs for the lines.

TRACING=/sys/kernel/tracing
MEMORY_MIB=256
# In seconds.
PATIENCE=180

# The kernel with private memory has no tracing, only counters.
setup() {
    grep -q tracefs /proc/filesystems || return
    mount -t tracefs tracefs $TRACING || exit 1
    echo 32768 >$TRACING/buffer_size_kb
    echo 1 >$TRACING/events/kvm/kvm_page_fault/enable || exit 1
    echo 1 >$TRACING/events/kvmmmu/mark_mmio_spte/enable || exit 1
    # KVM_SET_USER_MEMORY_REGION and its successor: every change of a memslot.
    echo 'cmd == 0x4020ae46 || cmd == 0x40a0ae49' >$TRACING/events/syscalls/sys_enter_ioctl/filter || exit 1
    echo 1 >$TRACING/events/syscalls/sys_enter_ioctl/enable || exit 1
}

is_traced() { [ -e $TRACING/trace ]; }

# What each thread of QEMU's is doing in the kernel.
print_stacks() {
    for task in /proc/$qemu/task/*; do
        echo "$(cat $task/comm): $(sed 's/^.*\] //; s/+.*//' $task/stack | tr '\n' ' ')"
    done
}

fail() {
    print_stacks
    echo "failed $*; QEMU and the guest said: $(tail -qn 20 /tmp/errors /tmp/serial | tr '\r\n' '  ')"
    kill -9 $qemu 2>/dev/null
    forget_qemu
    return 1
}

# The console's input, the monitor's input and its output are FIFOs, held open so that nobody waits for the other side.
start_qemu() {
    rm -f /tmp/console /tmp/serial /tmp/errors /tmp/said /tmp/trace /tmp/monitor.in /tmp/monitor.out
    mkfifo /tmp/console /tmp/monitor.in /tmp/monitor.out
    exec 4<>/tmp/console 5<>/tmp/monitor.in 6<>/tmp/monitor.out
    cat <&6 >/tmp/said &
    listener=$!
    is_traced && echo >$TRACING/trace
    [ $phase = convert ] || set -- "$@" -kernel /vmlinuz -initrd /inner.cpio -append "console=ttyS0 panic=-1 quiet"
    $program -machine $machine "$@" -cpu host -smp 2 -m ${MEMORY_MIB}M -nodefaults -no-user-config -display none -no-reboot \
        -L /firmware -serial stdio -chardev pipe,id=monitor,path=/tmp/monitor \
        -mon chardev=monitor,mode=readline <&4 >/tmp/serial 2>/tmp/errors 4>&- 5>&- 6>&- &
    qemu=$!
}

forget_qemu() {
    kill $listener 2>/dev/null
    wait $listener 2>/dev/null
    wait $qemu 2>/dev/null
}

# QEMU is to end as it was told, and to find nothing wrong in doing so.
quit_qemu() {
    echo quit >/tmp/monitor.in
    until_true false
    kill -0 $qemu 2>/dev/null && return 1
    forget_qemu
}

# Waits until COMMAND succeeds; not if QEMU is gone, and not for ever.
until_true() {
    deadline=$(($(date +%s) + PATIENCE))
    until "$@"; do
        kill -0 $qemu 2>/dev/null || return 1
        [ $(date +%s) -lt $deadline ] || return 1
        usleep 100000
    done
}

printed() { grep -q "^inner: $1" /tmp/serial; }

is_broken() { ask "info status" "VM status: paused (internal-error)"; }

is_paused() { ask "info status" "VM status: paused.\?$"; }

# Says COMMAND to the monitor until it answers PATTERN.
ask() {
    : >/tmp/said
    echo "$1" >/tmp/monitor.in
    usleep 100000
    grep -q "$2" /tmp/said
}

# What KVM counted for the VM of QEMU's.
counter() { cat /sys/kernel/debug/kvm/$qemu-*/$1; }

print_counters() {
    for counter in pf_taken exits mmio_exits pages_4k pages_2m; do
        echo "counter $counter $(counter $counter)"
    done
}

# Faults, first touches of MMIO and slot changes, in order; and whether any were lost. Bit 3 of the error code is the
# mark of MMIO that is known already: KVM does not count it as a fault, and no more do we, unless KVM finds that a slot
# change has made the mark stale, and marks it anew.
print_events() {
    is_traced || { echo untraced; return; }
    awk '
        /kvm_page_fault:/ {
            known[$1] = ""
            code = $NF
            address = $(NF - 2)
            sub(/0x/, "", address)
            if (substr(code, length(code), 1) ~ /[89a-f]/) known[$1] = address
            else print "fault", address
        }
        /mark_mmio_spte:/ {
            if (known[$1] != "") print "fault", known[$1]
            known[$1] = ""
            sub(/.* gfn /, "")
            print "mmio", $1
        }
        /sys_ioctl/ { print "slot" }
        /entries-in-buffer/ { split($3, entries, "/"); print "lost", entries[2] - entries[1] }
    ' $TRACING/trace
}

# What QEMU said, and what its trace says of the checks of its memslots.
print_words() {
    sed 's/^/said /' /tmp/errors
    [ ! -e /tmp/trace ] || sed 's/^/trace /' /tmp/trace
}

# Which pages of its memory QEMU has, before the guest runs: runs of `none`, `zero` (the page of zeros that everybody
# shares: one that occurs twice) and `memory`.
print_residency() {
    first=
    while read -r range rest; do
        start=0x${range%-*} end=0x${range#*-}
        [ $((end - start)) -eq $((MEMORY_MIB << 20)) ] && first=$((start >> 12))
    done </proc/$qemu/maps
    [ -n "$first" ] || return 1
    dd if=/proc/$qemu/pagemap of=/tmp/pagemap bs=4096 skip=$((first >> 9)) count=$((MEMORY_MIB >> 1)) 2>/dev/null
    od -An -v -tx8 -w8 /tmp/pagemap >/tmp/pages
    # A page is there when the highest of the 64 bits is set; the lower 52 tell which it is.
    awk '
        function is_there(entry) { return length(entry) == 16 && entry ~ /^[89a-f]/ }
        function kind(entry) {
            if (!is_there(entry)) return "none"
            return count[substr(entry, 4)] > 1 ? "zero" : "memory"
        }
        NR == FNR { if (is_there($1)) count[substr($1, 4)]++; next }
        { now = kind($1); if (now != last) { if (run) print "pages", last, run; last = now; run = 0 } run++ }
        END { print "pages", last, run }
    ' /tmp/pages /tmp/pages
}

boot() {
    start_qemu "$@"
    until_true printed booted || fail "did not boot"
}

# QEMU is to end before it has a guest.
refuse() {
    start_qemu "$@"
    until_true false
    kill -0 $qemu 2>/dev/null && { fail "did not end"; return 1; }
    forget_qemu
    echo "ended $?"
    print_words
    print_events
    echo "done $name"
}

# The guest is saved to a file with its memory in use, and goes on in another QEMU.
restore() {
    boot "$@" || return
    echo fill >&4
    until_true printed filled || { fail "did not fill its memory"; return 1; }
    echo "migrate file:/tmp/state" >/tmp/monitor.in
    until_true ask "info migrate" "Migration status: completed" || { fail "was not saved"; return 1; }
    quit_qemu || { fail "did not end"; return 1; }
    start_qemu "$@" -S -incoming file:/tmp/state
    until_true is_paused || { fail "was not restored"; return 1; }
    print_residency || { fail "has no memory"; return 1; }
    echo cont >/tmp/monitor.in
    echo walk >&4
    until_true printed walked || fail "did not find its memory as it left it"
}

# What the host finds in a page of the guest's.
print_seen() {
    until_true ask "xp /1wx 0x$1" "$1: 0x" || return 1
    echo "seen $1 $(sed -n "s/\r//; s/.*$1: 0x//p" /tmp/said)"
}

# The guest converts memory in steps, and what each cost is counted, until all are done or QEMU stops the VM.
convert() {
    start_qemu "$@"
    until_true printed booted || { fail "did not boot"; return 1; }
    for step in random break walk show span across beyond; do
        faults=$(counter pf_taken) exits=$(counter exits)
        echo $step >&4
        until_true is_answered || { fail "gave no answer to $step"; return 1; }
        printed wrong && { fail "found its memory not as it must be"; return 1; }
        printed $step || { echo "stopped $step"; break; }
        answer=$(sed -n "s/\r//; s/^inner: $step //p" /tmp/serial)
        echo "step $step $answer $(($(counter pf_taken) - faults)) $(($(counter exits) - exits))"
        # The first page that was shown is shared.
        [ $step != show ] || { print_seen 1000000 && print_seen 1001000; } || { fail "does not show memory"; return 1; }
    done
    print_counters
    print_words
    print_events
    quit_qemu || { fail "did not end"; return 1; }
    echo "done $name"
}

# The line is to be there as a whole.
is_answered() { printed "$step ........" || printed wrong || is_broken; }

run_case() {
    echo "case $name"
    echo $huge_pages >/sys/kernel/mm/transparent_hugepage/enabled
    # Huge pages are there for each case alike, and none is put together again while it is being looked at.
    echo 0 >/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none
    echo 3 >/proc/sys/vm/drop_caches
    echo 1 >/proc/sys/vm/compact_memory
    case $phase in
    refuse | convert) $phase "$@"; return ;;
    esac
    $phase "$@" || return
    echo stop >/tmp/monitor.in
    until_true is_paused || { fail "did not stop"; return 1; }
    print_counters
    print_words
    print_events
    quit_qemu || { fail "did not end"; return 1; }
    rm -f /tmp/state
    echo "done $name"
}

setup
while read -r name phase huge_pages machine program options; do
    run_case $options </dev/null || :
done </cases
