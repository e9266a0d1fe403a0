/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The host's side of guest memory, asked of the kernel itself. */
#ifndef HOST_H
#define HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of [start, start + size) that this process's page tables hold, the zero page included. */
uint64_t present_bytes(const void *start, size_t size);

/*
 * Whether a test may change settings of the whole machine, and use what all share (pools of huge pages): not
 * where KVMPREP_TEST_SHARES_MACHINE says that others run at the same time.
 */
bool machine_may_be_changed(void);

void sleep_us(unsigned us);

#endif
