/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a test says and how it ends.
 *
 * A test program is a list of cases. A case runs until its first failed check, which ends that case alone; a
 * case that cannot be run here says why and counts as skipped, never as passed. The last line gives the
 * counts that `cargo xtask test` reads. Cases use no cleanup on failure: each makes what it needs anew.
 */
#ifndef CHECK_H
#define CHECK_H

#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <kvmprep.h>

extern jmp_buf check_end_of_case; /* main thread only: other threads return what they found */

/* Ends the case as failed. */
_Noreturn void check_failed(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Says that a case which takes long by its nature is not hanging. */
void check_is_alive(void);
/* Ends the case as skipped. */
_Noreturn void check_skipped(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            check_failed(__FILE__, __LINE__, "%s", #condition);                                              \
    } while (0)

/* Compares two integers and shows both. */
#define CHECK_EQ(actual, expected)                                                                           \
    do {                                                                                                     \
        long long check_a = (long long)(actual), check_e = (long long)(expected);                            \
        if (check_a != check_e)                                                                              \
            check_failed(__FILE__, __LINE__, "%s is %lld, not %lld (%s)", #actual, check_a, check_e,         \
                         #expected);                                                                         \
    } while (0)

/* Checks that a call of the library succeeded (>= 0); shows its error. */
#define CHECK_OK(call, err)                                                                                  \
    do {                                                                                                     \
        int check_r = (call);                                                                                \
        if (check_r < 0)                                                                                     \
            check_failed(__FILE__, __LINE__, "%s: %d %s: %s [%s] slot %x gpa %llx size %llx", #call,         \
                         check_r, kvmprep_reason_name((err).reason), (err).message, (err).hint, (err).slot,  \
                         (unsigned long long)(err).gpa, (unsigned long long)(err).size);                     \
    } while (0)

/* Checks that a call of the library failed with this errno and this reason. */
#define CHECK_ERR(call, err, expected_errno, expected_reason)                                                \
    do {                                                                                                     \
        int check_r = (call);                                                                                \
        if (check_r != -(expected_errno) || (err).reason != (expected_reason) || (err).code != check_r ||    \
            (err).message[0] == 0)                                                                           \
            check_failed(__FILE__, __LINE__, "%s: %d (%s) %s; not %d (%s)", #call, check_r,                  \
                         kvmprep_reason_name((err).reason), (err).message, -(expected_errno),                \
                         kvmprep_reason_name(expected_reason));                                              \
    } while (0)

/* `base` rounds of a loop that looks for races; `cargo xtask soak` asks for many times as many. */
unsigned check_rounds(unsigned base);

struct check_case {
    const char *name;
    void (*run)(void);
};

/* Runs all cases, or those whose names are given as arguments; returns main's result. */
int check_main(int argc, char **argv, const struct check_case *cases, size_t n);

#endif
