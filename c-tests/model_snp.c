/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest of the type SNP on the software model, as a VMM makes and keeps it with the library: the initial
 * image through the claims of kvmprep_snp_launch_update(), with pages of each type, measured, sealed,
 * populated, and converted both ways. And what may go wrong on the way: memory that is not there, ioctls that
 * fail, firmware that refuses, or corrects.
 *
 * Skipped without the model: there is no such hardware where these tests run.
 */
#define _GNU_SOURCE
#define KVMPREP_EXPERIMENTAL
#include "support/check.h"
#include "support/confidential_cases.h"
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

static void whole_life(void) {
    check_whole_life(SNP);
}

static void measurement(void) {
    check_measurement(SNP);
}

static void added_once(void) {
    check_added_once(SNP);
}

static void not_before_the_seal(void) {
    check_not_before_the_seal(SNP);
}

static void source_that_cannot_be_read(void) {
    check_source_that_cannot_be_read(SNP);
}

static void failing_ioctls(void) {
    check_failing_ioctls(SNP);
}

static void guest_of_its_own(void) {
    check_guest_of_its_own(SNP);
}

static void many_conversions(void) {
    check_many_conversions(SNP);
}

/* ---- The firmware ---- */

#define SIZE (4 * MIB)

static int add_of_type(struct confidential *c, struct kvmprep_range range, uint32_t page_type,
                       struct kvmprep_range *rest) {
    void *source = c->source + (range.gpa - MEMORY_GPA);
    return kvmprep_snp_launch_update(c->handle, c->sev, &range,
                                     page_type == KVMPREP_SNP_PAGE_ZERO ? NULL : source, page_type, rest,
                                     &c->err);
}

/* Each type of page, and what the guest finds there. */
static void pages_of_each_type(void) {
    struct confidential c = confidential_make(SNP, SIZE);
    struct kvmprep_range rest;
    add_image(&c, 1);
    fill_source(&c, pages_of(IMAGE_PAGES, 12), 2);
    CHECK_OK(add_of_type(&c, pages_of(24, 4), KVMPREP_SNP_PAGE_ZERO, &rest), c.err);
    CHECK_OK(add_of_type(&c, pages_of(28, 4), KVMPREP_SNP_PAGE_UNMEASURED, &rest), c.err);
    CHECK_OK(add_of_type(&c, pages_of(32, 1), KVMPREP_SNP_PAGE_SECRETS, &rest), c.err);
    CHECK_EQ(rest.size, 0);
    CHECK_EQ(confidential_seal(&c), 0);
    check_guest_reads(&c, pages_of(0, 24), KVMPREP_PRIVATE, 1);
    check_guest_reads(&c, pages_of(24, 4), KVMPREP_PRIVATE, 0);
    check_guest_reads(&c, pages_of(28, 4), KVMPREP_PRIVATE, 2);
    /* None of it has to be accepted, or is pre-faulted anew. */
    guest_writes_words(&c, pages_of(0, 33), KVMPREP_PRIVATE, 3);
    check_guest_reads(&c, pages_of(0, 33), KVMPREP_PRIVATE, 3);
    confidential_end(&c);
}

/* CPUID values that the firmware does not take come back corrected, and are not added before someone has
 * looked.
 */
static void cpuid_values_that_are_refused(void) {
    struct confidential c = confidential_make(SNP, SIZE);
    struct kvmprep_range page = pages_of(3, 1), rest;
    uint64_t *values = (uint64_t *)(c.source + 3 * PAGE);
    *values = ~0ull;
    CHECK_ERR(add_of_type(&c, page, KVMPREP_SNP_PAGE_CPUID, &rest), c.err, EIO,
              KVMPREP_REASON_FIRMWARE_REFUSED);
    CHECK_EQ(c.err.firmware_error, 0x16);
    CHECK(*values != ~0ull);
    CHECK(rest.gpa == page.gpa && rest.size == PAGE);
    CHECK_OK(kvmprep_private_check_claims(c.handle, &page, 1, &c.err), c.err);
    CHECK_OK(add_of_type(&c, page, KVMPREP_SNP_PAGE_CPUID, &rest), c.err);
    CHECK_EQ(confidential_seal(&c), 0);
    confidential_end(&c);
}

/* The firmware fails at a page: what is before it is in, its code is told, and the rest can be taken up. */
static void refused_by_the_firmware(void) {
    static const struct {
        const char *what;
        uint64_t page;
    } failures[] = {{"launch_update:1:invalid_page_state", 0}, {"launch_update:13:invalid_page_state", 12}};
    unsigned char undisturbed[DIGEST_SIZE], digest[DIGEST_SIZE];
    measure_image(SNP, 1, undisturbed);
    for (size_t i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
        struct confidential c = confidential_make(SNP, SIZE);
        struct kvmprep_range image = pages_of(0, IMAGE_PAGES), rest;
        fill_source(&c, image, 1);
        confidential_fail(failures[i].what);
        int result = confidential_add(&c, image, MEASURED, &rest);
        printf("  %s: %d %s\n", failures[i].what, result, c.err.message);
        /* KVM tells of a failure only where not even one page went in; else the library finds the rest in. */
        if (failures[i].page == 0) {
            CHECK_ERR(result, c.err, EIO, KVMPREP_REASON_FIRMWARE_REFUSED);
            CHECK_EQ(c.err.firmware_error, 0x1a);
            CHECK(rest.gpa == image.gpa && rest.size == image.size);
            CHECK_OK(confidential_add(&c, rest, MEASURED, &rest), c.err);
        }
        CHECK_EQ(rest.size, 0);
        CHECK_EQ(confidential_seal(&c), 0);
        confidential_measure(&c, digest);
        CHECK(memcmp(digest, undisturbed, DIGEST_SIZE) == 0);
        check_guest_reads(&c, image, KVMPREP_PRIVATE, 1);
        confidential_end(&c);
    }
}

/* Firmware that fails when the image is closed: by then the vCPUs are measured, which cannot be done again.
 */
static void refused_at_the_seal(void) {
    struct confidential c = confidential_make(SNP, SIZE);
    add_image(&c, 1);
    confidential_fail("launch_finish:1:invalid_guest_state");
    CHECK_EQ(confidential_seal(&c), -EIO);
    CHECK_EQ(confidential_seal(&c), -EINVAL);
    confidential_end(&c);
}

/* With a descriptor that is not the firmware's nothing is added. */
static void another_descriptor(void) {
    struct confidential c = confidential_make(SNP, SIZE);
    struct kvmprep_range image = pages_of(0, IMAGE_PAGES), rest;
    int sev = c.sev;
    c.sev = c.gmem;
    CHECK(confidential_add(&c, image, MEASURED, &rest) < 0);
    printf("  %s: %s\n", kvmprep_reason_name(c.err.reason), c.err.message);
    CHECK_EQ(rest.size, image.size);
    c.sev = sev;
    add_image(&c, 1);
    CHECK_EQ(confidential_seal(&c), 0);
    confidential_end(&c);
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
        {"pages_of_each_type", pages_of_each_type},
        {"cpuid_values_that_are_refused", cpuid_values_that_are_refused},
        {"refused_by_the_firmware", refused_by_the_firmware},
        {"refused_at_the_seal", refused_at_the_seal},
        {"another_descriptor", another_descriptor},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
