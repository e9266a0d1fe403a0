/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See diff.h. */
#include "diff.h"
#include "check.h"
#include <inttypes.h>
#include <stdlib.h>

#define USUAL_SEED 1

static uint64_t number_from(const char *variable, uint64_t otherwise) {
    const char *text = getenv(variable);
    return text == NULL ? otherwise : strtoull(text, NULL, 0);
}

uint64_t diff_seed(void) {
    return number_from("KVMPREP_DIFF_SEED", USUAL_SEED);
}

uint64_t diff_operations(unsigned usual) {
    return number_from("KVMPREP_DIFF_OPERATIONS", check_rounds(usual));
}

void diff_report(uint64_t seed, uint64_t operations, uint64_t mismatches) {
    printf("diff: seed %" PRIu64 " operations %" PRIu64 " mismatches %" PRIu64 "\n", seed, operations,
           mismatches);
}

/* The generator called splitmix64: every seed is a good one. */
uint64_t diff_next(struct diff_random *random) {
    uint64_t z = random->state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

uint64_t diff_below(struct diff_random *random, uint64_t n) {
    return diff_next(random) % n;
}

bool diff_chance(struct diff_random *random, unsigned n) {
    return diff_below(random, n) == 0;
}
