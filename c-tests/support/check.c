/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Runs cases and counts them. See check.h. */
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* How long a case may take, under emulation and on a busy machine: beyond that it hangs. */
#define LONGEST_CASE_SECONDS 300

jmp_buf check_end_of_case;

unsigned check_rounds(unsigned base) {
    const char *scale = getenv("KVMPREP_TEST_SCALE");
    unsigned long times = scale == NULL ? 1 : strtoul(scale, NULL, 10);
    return times == 0 ? base : base * (unsigned)times;
}

enum outcome { PASSED, FAILED, SKIPPED };

void check_failed(const char *file, int line, const char *format, ...) {
    va_list arguments;
    printf("  at %s:%d: ", file, line);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    longjmp(check_end_of_case, FAILED);
}

void check_skipped(const char *format, ...) {
    va_list arguments;
    printf("  skipped: ");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    longjmp(check_end_of_case, SKIPPED);
}

static enum outcome run_case(const struct check_case *c) {
    int jumped = setjmp(check_end_of_case);
    if (jumped != 0)
        return (enum outcome)jumped;
    c->run();
    return PASSED;
}

/*
 * A case that hangs is a failure of the whole run. Seen to by a thread, since the main one may be stuck where
 * no signal handler runs; the process's end gets even those out.
 */
static _Atomic(const char *) watched_case;
static atomic_uint watched_since;

static unsigned seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned)now.tv_sec;
}

void check_is_alive(void) {
    atomic_store(&watched_since, seconds());
}

static void *watch(void *unused) {
    for (;;) {
        sleep(1);
        const char *name = atomic_load(&watched_case);
        if (name != NULL && seconds() - atomic_load(&watched_since) > LONGEST_CASE_SECONDS) {
            printf("  hangs\nFAILED %s\n", name);
            fflush(stdout);
            _exit(1);
        }
    }
    return unused;
}

static void start_watch(void) {
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, watch, NULL) != 0)
        abort();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_detach(thread);
}

static int is_wanted(int argc, char **argv, const char *name) {
    if (argc < 2)
        return 1;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return 1;
    return 0;
}

int check_main(int argc, char **argv, const struct check_case *cases, size_t n) {
    static const char *const words[] = {"ok", "FAILED", "skip"};
    unsigned counts[3] = {0, 0, 0};

    setvbuf(stdout, NULL, _IOLBF, 0);
    start_watch();
    for (size_t i = 0; i < n; i++) {
        if (!is_wanted(argc, argv, cases[i].name))
            continue;
        check_is_alive();
        atomic_store(&watched_case, cases[i].name);
        enum outcome outcome = run_case(&cases[i]);
        counts[outcome]++;
        printf("%s %s\n", words[outcome], cases[i].name);
    }
    printf("cases: %u passed, %u failed, %u skipped\n", counts[PASSED], counts[FAILED], counts[SKIPPED]);
    /* A run in which nothing was run is no success. */
    return counts[FAILED] > 0 || counts[PASSED] + counts[SKIPPED] == 0;
}
