/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See shrinker.h. */
#include "shrinker.h"
#include "support/guest.h"
#include <string.h>

/* Takes the candidate if it shows it too, without what comes after. */
static bool take_if_it_shows(struct sequence *sequence, struct sequence *candidate, shows_fn *shows) {
    int at = shows(candidate);
    if (at < 0)
        return false;
    candidate->n = (unsigned)at + 1;
    *sequence = *candidate;
    return true;
}

static struct sequence without(const struct sequence *sequence, unsigned start, unsigned n) {
    struct sequence rest = *sequence;
    if (n > rest.n - start)
        n = rest.n - start;
    memmove(&rest.steps[start], &rest.steps[start + n], (rest.n - start - n) * sizeof(rest.steps[0]));
    rest.n -= n;
    return rest;
}

/* Leaves steps out, first many at a time, then single ones. Returns whether any could be. */
static bool leave_out(struct sequence *sequence, shows_fn *shows) {
    bool any = false;
    for (unsigned n = sequence->n / 2; n > 0; n /= 2)
        for (unsigned start = 0; start < sequence->n && sequence->n > 1;) {
            struct sequence candidate = without(sequence, start, n);
            if (candidate.n > 0 && take_if_it_shows(sequence, &candidate, shows))
                any = true;
            else
                start += n;
        }
    return any;
}

/* Plainer values for one number of a step, the plainest first; 0 is the end. */
static const uint64_t plain_numbers[] = {PAGE, 2 * PAGE, 1ull << 20, 1ull << 28};
#define PLAIN_NUMBERS (1 + sizeof(plain_numbers) / sizeof(plain_numbers[0]))

static uint64_t plain_number(unsigned i) {
    return i == 0 ? 0 : plain_numbers[i - 1];
}

static bool try_number(struct sequence *sequence, shows_fn *shows, unsigned step,
                       uint64_t *(*number)(struct operation *)) {
    for (unsigned i = 0; i < PLAIN_NUMBERS; i++) {
        struct sequence candidate = *sequence;
        if (*number(&candidate.steps[step]) == plain_number(i))
            return false;
        *number(&candidate.steps[step]) = plain_number(i);
        if (take_if_it_shows(sequence, &candidate, shows))
            return true;
    }
    return false;
}

static uint64_t *gpa_of(struct operation *step) {
    return &step->gpa;
}

static uint64_t *size_of(struct operation *step) {
    return &step->size;
}

static uint64_t *hva_of(struct operation *step) {
    return &step->hva;
}

static uint64_t *offset_of(struct operation *step) {
    return &step->offset;
}

static void without_flag(struct operation *step, unsigned bit) {
    step->flags &= ~(1u << bit);
}

static void with_plain_slot(struct operation *step, unsigned number) {
    step->slot = number;
}

static void with_first_version(struct operation *step, unsigned unused) {
    (void)unused;
    step->version2 = false;
    step->by_library = false;
}

static void with_first_file(struct operation *step, unsigned unused) {
    (void)unused;
    step->file = FILE_SHORT;
    step->second_descriptor = false;
}

static bool try_change(struct sequence *sequence, shows_fn *shows, unsigned step,
                       void (*change)(struct operation *, unsigned), unsigned argument) {
    struct sequence candidate = *sequence;
    change(&candidate.steps[step], argument);
    if (memcmp(&candidate.steps[step], &sequence->steps[step], sizeof(candidate.steps[step])) == 0)
        return false;
    return take_if_it_shows(sequence, &candidate, shows);
}

/* Makes one step plainer; returns whether it could be. */
static bool simplify(struct sequence *sequence, shows_fn *shows, unsigned step) {
    uint64_t *(*const fields[])(struct operation *) = {gpa_of, size_of, hva_of, offset_of};
    bool any = false;
    for (unsigned i = 0; i < sizeof(fields) / sizeof(fields[0]) && step < sequence->n; i++)
        any |= try_number(sequence, shows, step, fields[i]);
    for (unsigned bit = 0; bit < 32 && step < sequence->n; bit++)
        any |= try_change(sequence, shows, step, without_flag, bit);
    if (step < sequence->n && sequence->steps[step].slot > step)
        any |= try_change(sequence, shows, step, with_plain_slot, step);
    if (step < sequence->n)
        any |= try_change(sequence, shows, step, with_first_version, 0);
    if (step < sequence->n)
        any |= try_change(sequence, shows, step, with_first_file, 0);
    return any;
}

void shrink(struct sequence *sequence, shows_fn *shows) {
    struct sequence whole = *sequence;
    take_if_it_shows(sequence, &whole, shows);
    bool any = true;
    while (any) {
        any = leave_out(sequence, shows);
        for (unsigned step = 0; step < sequence->n; step++)
            any |= simplify(sequence, shows, step);
    }
}
