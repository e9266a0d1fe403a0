/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See host.h. */
#define _GNU_SOURCE
#include "host.h"
#include "check.h"
#include "guest.h"
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

uint64_t present_bytes(const void *start, size_t size) {
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    uint64_t pages = 0, words[512];
    CHECK(pagemap >= 0);
    for (size_t at = 0; at < size / PAGE; at += 512) {
        size_t count = size / PAGE - at < 512 ? size / PAGE - at : 512;
        off_t place = (off_t)(((uintptr_t)start / PAGE + at) * 8);
        CHECK_EQ(pread(pagemap, words, count * 8, place), count * 8);
        for (size_t i = 0; i < count; i++)
            pages += words[i] >> 63; /* present */
    }
    close(pagemap);
    return pages * PAGE;
}

bool machine_may_be_changed(void) {
    return getenv("KVMPREP_TEST_SHARES_MACHINE") == NULL;
}

void sleep_us(unsigned us) {
    struct timespec length = {.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000};
    nanosleep(&length, NULL);
}
