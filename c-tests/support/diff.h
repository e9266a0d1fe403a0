/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the differential programs share: how many operations, from which seed, and how they report.
 *
 * A program of this kind does random operations on the library and on the kernel and compares. What it does
 * depends on its seed alone, so that a run can be repeated. `cargo xtask bed diff` sets seed and number and
 * reads the report; without it the program is a test like any other, with a fixed seed.
 */
#ifndef DIFF_H
#define DIFF_H

#include <stdbool.h>
#include <stdint.h>

/* The seed of this run: KVMPREP_DIFF_SEED, or always the same. */
uint64_t diff_seed(void);
/* How many operations to do in all: KVMPREP_DIFF_OPERATIONS, or check_rounds(usual). */
uint64_t diff_operations(unsigned usual);
/* Prints what was done, for the command to read. A program may report in parts, which are added up. */
void diff_report(uint64_t seed, uint64_t operations, uint64_t mismatches);

/* Random numbers that are the same for the same seed everywhere. */
struct diff_random {
    uint64_t state;
};
uint64_t diff_next(struct diff_random *random);
/* From 0 to n - 1; n is small beside 2^64. */
uint64_t diff_below(struct diff_random *random, uint64_t n);
/* True once in n times. */
bool diff_chance(struct diff_random *random, unsigned n);

#endif
