/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See policy.h. */
#define _GNU_SOURCE
#include "policy.h"
#include "check.h"
#include "host.h"
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>

#define DIRECTORY "/sys/kernel/mm/transparent_hugepage/"

enum setting { ENABLED, ENABLED_2M, SHMEM, SHMEM_2M, SCAN_PAUSE, SCAN_LENGTH, SETTINGS };

static const char *const paths[SETTINGS] = {
    [ENABLED] = DIRECTORY "enabled",
    [ENABLED_2M] = DIRECTORY "hugepages-2048kB/enabled",
    [SHMEM] = DIRECTORY "shmem_enabled",
    [SHMEM_2M] = DIRECTORY "hugepages-2048kB/shmem_enabled",
    [SCAN_PAUSE] = DIRECTORY "khugepaged/scan_sleep_millisecs",
    [SCAN_LENGTH] = DIRECTORY "khugepaged/pages_to_scan",
};

struct values {
    const char *name;
    const char *of[SETTINGS]; /* NULL: "inherit", where there is such a setting */
    bool is_off_here;
};

/* khugepaged scans as good as nothing: a long pause after a page. */
#define RESTS "1000000000", "1"
static const struct values policies[POLICIES] = {
    [POLICY_ADVISED] = {"where advised", {"madvise", NULL, "never", NULL, RESTS}, false},
    [POLICY_ALWAYS] = {"always", {"always", NULL, "always", NULL, RESTS}, false},
    [POLICY_NEVER] = {"never", {"never", NULL, "deny", NULL, RESTS}, false},
    [POLICY_ADVISED_2M] = {"2M where advised", {"never", "madvise", "never", "advise", RESTS}, false},
    [POLICY_NEVER_2M] = {"not 2M", {"always", "never", "always", "never", RESTS}, false},
    [POLICY_SHMEM_ADVISED] = {"shmem where advised", {"madvise", NULL, "advise", NULL, RESTS}, false},
    [POLICY_WITHIN_SIZE] = {"shmem within size", {"madvise", NULL, "within_size", NULL, RESTS}, false},
    [POLICY_NOT_HERE] = {"not in this process", {"always", NULL, "always", NULL, RESTS}, true},
};

static char found[SETTINGS][32]; /* "": not changed */

const char *policy_name(enum policy policy) {
    return policies[policy].name;
}

/* A setting that is a choice shows all its words, the one chosen in brackets. */
static bool read_setting(enum setting setting, char *value, size_t size) {
    char text[128] = "";
    FILE *file = fopen(paths[setting], "r");
    if (file == NULL)
        return false;
    bool is_read = fgets(text, sizeof(text), file) != NULL;
    fclose(file);
    char *start = strchr(text, '['), *end = strchr(text, ']');
    start = start == NULL ? text : start + 1;
    start[end == NULL ? strcspn(start, "\n") : (size_t)(end - start)] = 0;
    return is_read && (size_t)snprintf(value, size, "%s", start) < size;
}

static bool write_setting(enum setting setting, const char *value) {
    FILE *file = machine_may_be_changed() ? fopen(paths[setting], "w") : NULL;
    if (file == NULL)
        return false;
    bool is_written = fputs(value, file) >= 0;
    return fclose(file) == 0 && is_written;
}

static bool change(enum setting setting, const char *wanted) {
    char now[sizeof(found[0])];
    const char *value = wanted == NULL ? "inherit" : wanted;
    if (!read_setting(setting, now, sizeof(now)))
        return wanted == NULL;
    if (found[setting][0] == 0)
        memcpy(found[setting], now, sizeof(now));
    return strcmp(now, value) == 0 || write_setting(setting, value);
}

bool policy_set(enum policy policy) {
    const struct values *values = &policies[policy];
    bool is_had = true;
    for (enum setting setting = 0; setting < SETTINGS; setting++)
        is_had = change(setting, values->of[setting]) && is_had;
    prctl(PR_SET_THP_DISABLE, values->is_off_here ? 1L : 0L, 0L, 0L, 0L);
    return is_had;
}

void policy_restore(void) {
    prctl(PR_SET_THP_DISABLE, 0L, 0L, 0L, 0L);
    for (enum setting setting = 0; setting < SETTINGS; setting++)
        if (found[setting][0] != 0)
            write_setting(setting, found[setting]);
}

/* Whether the setting for 2 MiB pages is one of these words, or the one for all sizes where that counts. */
static bool is_chosen(enum setting of_2m, enum setting of_all, const char *const words[], size_t n) {
    char chosen[sizeof(found[0])] = "never";
    if (!read_setting(of_2m, chosen, sizeof(chosen)) || strcmp(chosen, "inherit") == 0)
        read_setting(of_all, chosen, sizeof(chosen));
    for (size_t i = 0; i < n; i++)
        if (strcmp(chosen, words[i]) == 0)
            return true;
    return false;
}

void need_huge_pages_on_advice(void) {
    static const char *const off[] = {"never"};
    if (is_chosen(ENABLED_2M, ENABLED, off, 1) || prctl(PR_GET_THP_DISABLE, 0L, 0L, 0L, 0L) > 0)
        check_skipped("no transparent huge pages: they are turned off, here or everywhere");
}

void need_small_shared_pages(void) {
    static const char *const on[] = {"always", "within_size", "force"};
    if (is_chosen(SHMEM_2M, SHMEM, on, 3))
        check_skipped("shared memory has huge pages on this machine, without advice");
}

void need_huge_zero_page(void) {
    FILE *file = fopen(DIRECTORY "use_zero_page", "r");
    int is_used = file == NULL ? '0' : fgetc(file);
    if (file != NULL)
        fclose(file);
    if (is_used != '1')
        check_skipped("this machine has no huge zero page, or does not use it");
}
