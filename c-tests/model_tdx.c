/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest of the type TDX on the software model, as a VMM makes and keeps it with the library: the initial
 * image through the claims of kvmprep_tdx_init_mem_region(), measured, sealed, populated, and converted both
 * ways. And what may go wrong on the way: memory that is not there, ioctls that fail, a TDX module that is
 * busy, or refuses.
 *
 * Skipped without the model: there is no such hardware where these tests run.
 */
#define _GNU_SOURCE
#define KVMPREP_EXPERIMENTAL
#include "support/check.h"
#include "support/confidential_cases.h"
#include <errno.h>
#include <string.h>

static void whole_life(void) {
    check_whole_life(TDX);
}

static void measurement(void) {
    check_measurement(TDX);
}

static void added_once(void) {
    check_added_once(TDX);
}

static void not_before_the_seal(void) {
    check_not_before_the_seal(TDX);
}

static void source_that_cannot_be_read(void) {
    check_source_that_cannot_be_read(TDX);
}

static void failing_ioctls(void) {
    check_failing_ioctls(TDX);
}

static void guest_of_its_own(void) {
    check_guest_of_its_own(TDX);
}

static void many_conversions(void) {
    check_many_conversions(TDX);
}

/* ---- The module ---- */

#define SIZE (4 * MIB)

/* A guest with its image closed, on whose way the module fails once so. */
static struct confidential disturbed(const char *what) {
    struct confidential c = confidential_make(TDX, SIZE);
    confidential_fail(what);
    add_image(&c, 1);
    CHECK_EQ(confidential_seal(&c), 0);
    return c;
}

/* While the image is loaded a busy module is KVM's to wait for: nobody sees anything, in the measurement
 * least. */
static void busy_while_the_image_is_loaded(void) {
    static const char *const calls[] = {"mem_sept_add:1:busy", "mem_sept_add:2:busy", "mem_page_add:1:busy",
                                        "mem_page_add:13:busy"};
    unsigned char undisturbed[DIGEST_SIZE], digest[DIGEST_SIZE];
    measure_image(TDX, 1, undisturbed);
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        struct confidential c = disturbed(calls[i]);
        confidential_measure(&c, digest);
        CHECK(memcmp(digest, undisturbed, DIGEST_SIZE) == 0);
        confidential_end(&c);
    }
}

/* So it is while memory is populated and converted. */
static void busy_while_the_guest_lives(void) {
    static const char *const calls[] = {"mem_sept_add:1:busy",   "mem_page_aug:1:busy",
                                        "mem_page_aug:700:busy", "mem_range_block:1:busy",
                                        "mem_track:1:busy",      "mem_page_remove:9:busy"};
    struct kvmprep_range range = pages_of(100, 30);
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        struct confidential c = disturbed("");
        struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
        struct kvmprep_populate_result result;
        opts.vcpu_fd = c.vcpus[0].fd;
        printf("  %s\n", calls[i]);
        confidential_fail(calls[i]);
        CHECK_OK(kvmprep_populate(c.handle, NULL, 0, &opts, &result, sizeof(result), &c.err), c.err);
        CHECK_EQ(result.stage2, SIZE);
        CHECK_EQ(guest_asks_for(&c, range, KVMPREP_SHARED), 0);
        CHECK_EQ(guest_asks_for(&c, range, KVMPREP_PRIVATE), 0);
        guest_accepts(&c, range);
        check_guest_reads(&c, range, KVMPREP_PRIVATE, 0);
        CHECK_EQ(faults_taken(&c), 0);
        confidential_end(&c);
    }
}

/* What the module refuses is the end of the VM; all that comes after is told so, and claims stand. */
static void refused_by_the_module(void) {
    struct confidential c = confidential_make(TDX, SIZE);
    struct kvmprep_range image = pages_of(0, IMAGE_PAGES), range = pages_of(100, 4), rest;
    fill_source(&c, image, 1);
    confidential_fail("mr_extend:40:operand_invalid"); /* of the third page: 16 calls a page */
    CHECK_EQ(confidential_add(&c, image, MEASURED, &rest), -EIO);
    printf("  %s: %s [%s]\n", kvmprep_reason_name(c.err.reason), c.err.message, c.err.hint);
    CHECK_EQ(c.err.reason, KVMPREP_REASON_VM_DEAD);
    CHECK_EQ(rest.gpa, pages_of(2, 1).gpa);
    CHECK_EQ(confidential_seal(&c), -EIO);
    CHECK_ERR(kvmprep_convert(c.handle, &range, KVMPREP_SHARED, NULL, &c.err), c.err, EIO,
              KVMPREP_REASON_VM_DEAD);
    confidential_end(&c);
}

/* A module that is busy when the image is closed: it is not, and can be later. */
static void busy_at_the_seal(void) {
    struct confidential c = confidential_make(TDX, SIZE);
    struct kvmprep_range more = pages_of(IMAGE_PAGES, 4);
    add_image(&c, 1);
    confidential_fail("mr_finalize:1:busy");
    CHECK_EQ(confidential_seal(&c), -EBUSY);
    fill_source(&c, more, 1);
    CHECK_OK(confidential_add(&c, more, MEASURED, NULL), c.err);
    CHECK_EQ(confidential_seal(&c), 0);
    check_guest_reads(&c, pages_of(0, IMAGE_PAGES + 4), KVMPREP_PRIVATE, 1);
    confidential_end(&c);
}

/* All vCPUs at the private half at once, over the same tables. */
static void populated_by_all_vcpus(void) {
    for (unsigned round = 0; round < check_rounds(5); round++) {
        struct confidential c = disturbed("");
        struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
        struct kvmprep_populate_result result;
        int vcpus[CONFIDENTIAL_VCPUS] = {c.vcpus[0].fd, c.vcpus[1].fd};
        opts.vcpu_fds = vcpus;
        opts.n_vcpu_fds = CONFIDENTIAL_VCPUS;
        CHECK_OK(kvmprep_populate(c.handle, NULL, 0, &opts, &result, sizeof(result), &c.err), c.err);
        CHECK(result.stage2 == SIZE && result.remaining == 0);
        guest_accepts(&c, pages_of(IMAGE_PAGES, SIZE / PAGE - IMAGE_PAGES));
        check_guest_reads(&c, pages_of(0, IMAGE_PAGES), KVMPREP_PRIVATE, 1);
        CHECK_EQ(faults_taken(&c), 0);
        confidential_end(&c);
    }
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"whole_life", whole_life},
        {"measurement", measurement},
        {"added_once", added_once},
        {"not_before_the_seal", not_before_the_seal},
        {"source_that_cannot_be_read", source_that_cannot_be_read},
        {"failing_ioctls", failing_ioctls},
        {"guest_of_its_own", guest_of_its_own},
        {"many_conversions", many_conversions},
        {"busy_while_the_image_is_loaded", busy_while_the_image_is_loaded},
        {"busy_while_the_guest_lives", busy_while_the_guest_lives},
        {"refused_by_the_module", refused_by_the_module},
        {"busy_at_the_seal", busy_at_the_seal},
        {"populated_by_all_vcpus", populated_by_all_vcpus},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
