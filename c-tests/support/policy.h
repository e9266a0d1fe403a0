/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How this system hands out transparent huge pages: looked at, or set for a test and put back at its end.
 *
 * The settings are the whole machine's, so a test changes them only while it runs, and only where it can:
 * without the right to, or where the kernel lacks a setting, a policy cannot be had, and the test does
 * without.
 */
#ifndef POLICY_H
#define POLICY_H

#include <stdbool.h>

enum policy {
    POLICY_ADVISED, /* anonymous memory where it is advised, shared memory never: what most systems have */
    POLICY_ALWAYS,
    POLICY_NEVER,
    POLICY_ADVISED_2M,    /* never, but for the setting of 2 MiB pages alone (Linux 6.8 and 6.11) */
    POLICY_NEVER_2M,      /* always, but for that setting */
    POLICY_SHMEM_ADVISED, /* shared memory where it is advised, too */
    POLICY_WITHIN_SIZE,   /* shared memory where the file is long enough */
    POLICY_NOT_HERE,      /* always, but not in this process */
    POLICIES,
};

const char *policy_name(enum policy policy);
/* Sets it; false where it cannot be had. khugepaged, which makes huge pages of small ones later, rests
 * meanwhile. */
bool policy_set(enum policy policy);
/* Puts everything back as it was found; may be called at any time. */
void policy_restore(void);

/* Skips the case where anonymous memory gets no huge pages even where it is advised to have them. */
void need_huge_pages_on_advice(void);
/* The same, where shared memory gets huge pages that nobody has advised. */
void need_small_shared_pages(void);
/* The same, where what is read first in a huge page's place is not the one of zeroes. */
void need_huge_zero_page(void);

#endif
