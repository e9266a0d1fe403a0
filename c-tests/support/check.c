/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Runs cases and counts them. See check.h. */
#include "check.h"
#include <stdarg.h>
#include <stdlib.h>

jmp_buf check_end_of_case;

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
    for (size_t i = 0; i < n; i++) {
        if (!is_wanted(argc, argv, cases[i].name))
            continue;
        enum outcome outcome = run_case(&cases[i]);
        counts[outcome]++;
        printf("%s %s\n", words[outcome], cases[i].name);
    }
    printf("cases: %u passed, %u failed, %u skipped\n", counts[PASSED], counts[FAILED], counts[SKIPPED]);
    /* A run in which nothing was run is no success. */
    return counts[FAILED] > 0 || counts[PASSED] + counts[SKIPPED] == 0;
}
