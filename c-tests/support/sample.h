/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a benchmark prints: raw samples, one a line. Medians, ratios and bars are the business of
 * `cargo xtask bench`, so that every program's figures are judged alike.
 */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <inttypes.h>
#include <stdio.h>
#include "check.h"

/* One measurement of `way` in the comparison `what`: nanoseconds, or a count. */
static inline void sample(const char *what, const char *way, uint64_t value) {
    printf("sample|%s|%s|%" PRIu64 "\n", what, way, value);
    fflush(stdout);
    check_is_alive();
}

/*
 * Which of `n` ways comes at place `i` of a round: each round begins with the next way, and every other one
 * goes backwards, so that no way always follows the same other.
 */
static inline unsigned in_turn(unsigned round, unsigned i, unsigned n) {
    unsigned place = round % 2 == 0 ? i : n - 1 - i;
    return (place + round / 2) % n;
}

#endif
