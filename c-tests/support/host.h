/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The host's side of guest memory, asked of the kernel itself. */
#ifndef HOST_H
#define HOST_H

#include <stddef.h>
#include <stdint.h>

/* Bytes of [start, start + size) that this process's page tables hold, the zero page included. */
uint64_t present_bytes(const void *start, size_t size);

void sleep_us(unsigned us);

#endif
