/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See confidential_cases.h. */
#define _GNU_SOURCE
#include "confidential_cases.h"
#include "check.h"
#include "host.h"
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SIZE (4 * MIB)
#define PAGES (SIZE / PAGE)
#define TAG 7
#define OTHER_TAG 9

static struct kvmprep_populate_result populate(struct confidential *c) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = c->vcpus[0].fd;
    CHECK_OK(kvmprep_populate(c->handle, NULL, 0, &opts, &result, sizeof(result), &c->err), c->err);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_DONE);
    return result;
}

static volatile uint64_t *word_of_host(struct confidential *c, uint64_t page) {
    return (uint64_t *)((char *)c->memory.hva + page * PAGE);
}

void add_image(struct confidential *c, uint64_t tag) {
    struct kvmprep_range range = pages_of(0, IMAGE_PAGES), rest;
    fill_source(c, range, tag);
    CHECK_OK(confidential_add(c, range, MEASURED, &rest), c->err);
    CHECK_EQ(rest.size, 0);
}

void measure_image(enum confidential_type type, uint64_t tag, unsigned char digest[DIGEST_SIZE]) {
    struct confidential c = confidential_make(type, SIZE);
    add_image(&c, tag);
    CHECK_EQ(confidential_seal(&c), 0);
    confidential_measure(&c, digest);
    confidential_end(&c);
}

/* ---- From beginning to end ---- */

/* The guest has its image, and the rest of its memory once it has accepted that. */
static void use_all_memory(struct confidential *c, uint64_t image_pages) {
    struct kvmprep_range image = pages_of(0, image_pages), other = pages_of(image_pages, PAGES - image_pages);
    uint64_t faults = faults_taken(c);
    check_guest_reads(c, image, KVMPREP_PRIVATE, TAG);
    guest_accepts(c, other);
    check_guest_reads(c, other, KVMPREP_PRIVATE, 0);
    guest_writes_words(c, pages_of(0, PAGES), KVMPREP_PRIVATE, OTHER_TAG);
    check_guest_reads(c, pages_of(0, PAGES), KVMPREP_PRIVATE, OTHER_TAG);
    CHECK_EQ(faults_taken(c), faults);
}

/* What the guest shares both sides see; what it takes back is fresh, and the host has given it up. */
static void convert_both_ways(struct confidential *c, struct kvmprep_range range) {
    const uint64_t first = (range.gpa - MEMORY_GPA) / PAGE, n = range.size / PAGE;
    uint64_t faults = faults_taken(c);
    CHECK_EQ(guest_asks_for(c, range, KVMPREP_SHARED), 0);
    check_guest_reads(c, range, KVMPREP_SHARED, 0);
    guest_writes_words(c, range, KVMPREP_SHARED, TAG);
    for (uint64_t page = first; page < first + n; page++) {
        CHECK_EQ(*word_of_host(c, page), word_of_page(MEMORY_GPA + page * PAGE, TAG));
        *word_of_host(c, page) = word_of_page(MEMORY_GPA + page * PAGE, OTHER_TAG);
    }
    check_guest_reads(c, range, KVMPREP_SHARED, OTHER_TAG);
    CHECK_EQ(present_bytes((char *)c->memory.hva + first * PAGE, range.size), range.size);

    CHECK_EQ(guest_asks_for(c, range, KVMPREP_PRIVATE), 0);
    CHECK_EQ(present_bytes((char *)c->memory.hva + first * PAGE, range.size), 0);
    guest_accepts(c, range);
    check_guest_reads(c, range, KVMPREP_PRIVATE, 0);
    guest_writes_words(c, range, KVMPREP_PRIVATE, OTHER_TAG);
    CHECK_EQ(faults_taken(c), faults); /* the conversions had it all ready */
}

void check_whole_life(enum confidential_type type) {
    struct confidential c = confidential_make(type, SIZE);
    struct kvmprep_range parts[] = {pages_of(0, 9), pages_of(9, 7), pages_of(16, 8)}, rest;
    fill_source(&c, pages_of(0, IMAGE_PAGES), TAG);
    CHECK_OK(kvmprep_private_check_claims(c.handle, parts, 3, &c.err), c.err);
    for (int i = 0; i < 3; i++) {
        CHECK_OK(confidential_add(&c, parts[i], i < 2 ? MEASURED : UNMEASURED, &rest), c.err);
        CHECK(rest.gpa == parts[i].gpa + parts[i].size && rest.size == 0);
    }
    CHECK_EQ(confidential_seal(&c), 0);
    CHECK_EQ(populate(&c).stage2, SIZE);
    use_all_memory(&c, IMAGE_PAGES);
    convert_both_ways(&c, pages_of(100, 64));
    convert_both_ways(&c, pages_of(511, 2));
    convert_both_ways(&c, pages_of(0, IMAGE_PAGES)); /* the image's pages too, which do not come back */
    check_guest_reads(&c, pages_of(200, 100), KVMPREP_PRIVATE, OTHER_TAG);
    CHECK_EQ(c.memory_faults, 0);
    CHECK_EQ(c.hypercalls, 6);
    confidential_end(&c);
}

/* ---- What is measured ---- */

static bool are_equal(const unsigned char a[DIGEST_SIZE], const unsigned char b[DIGEST_SIZE]) {
    return memcmp(a, b, DIGEST_SIZE) == 0;
}

/* The image in pieces of that many pages, with one byte of one page changed, the page measured or not. */
static void measure_in_pieces(enum confidential_type type, uint64_t piece, uint64_t changed, enum image how,
                              unsigned char digest[DIGEST_SIZE]) {
    struct confidential c = confidential_make(type, SIZE);
    fill_source(&c, pages_of(0, IMAGE_PAGES), TAG);
    if (changed < IMAGE_PAGES)
        c.source[changed * PAGE + PAGE - 1] ^= 1;
    for (uint64_t at = 0; at < IMAGE_PAGES; at += piece) {
        bool has_changed = changed >= at && changed < at + piece;
        CHECK_OK(confidential_add(&c, pages_of(at, piece), has_changed ? how : MEASURED, NULL), c.err);
    }
    CHECK_EQ(confidential_seal(&c), 0);
    confidential_measure(&c, digest);
    confidential_end(&c);
}

/* The image with two of its pages in the other order. */
static void measure_out_of_order(enum confidential_type type, unsigned char digest[DIGEST_SIZE]) {
    struct confidential c = confidential_make(type, SIZE);
    fill_source(&c, pages_of(0, IMAGE_PAGES), TAG);
    CHECK_OK(confidential_add(&c, pages_of(1, 1), MEASURED, NULL), c.err);
    CHECK_OK(confidential_add(&c, pages_of(0, 1), MEASURED, NULL), c.err);
    CHECK_OK(confidential_add(&c, pages_of(2, IMAGE_PAGES - 2), MEASURED, NULL), c.err);
    CHECK_EQ(confidential_seal(&c), 0);
    confidential_measure(&c, digest);
    confidential_end(&c);
}

void check_measurement(enum confidential_type type) {
    unsigned char whole[DIGEST_SIZE], other[DIGEST_SIZE], unmeasured[2][DIGEST_SIZE];
    measure_image(type, TAG, whole);
    measure_in_pieces(type, 6, IMAGE_PAGES, MEASURED, other);
    CHECK(are_equal(whole, other));
    measure_in_pieces(type, 1, IMAGE_PAGES, MEASURED, other);
    CHECK(are_equal(whole, other));

    measure_in_pieces(type, 1, 5, MEASURED, other);
    CHECK(!are_equal(whole, other));
    measure_image(type, OTHER_TAG, other);
    CHECK(!are_equal(whole, other));
    measure_out_of_order(type, other);
    CHECK(!are_equal(whole, other));

    /* Of a page that is not measured, where it lies is measured all the same. */
    measure_in_pieces(type, 1, 5, UNMEASURED, unmeasured[0]);
    CHECK(!are_equal(whole, unmeasured[0]));
    measure_in_pieces(type, 1, 6, UNMEASURED, unmeasured[1]);
    CHECK(!are_equal(unmeasured[0], unmeasured[1]));
    measure_in_pieces(type, 1, 5, UNMEASURED, other);
    CHECK(are_equal(unmeasured[0], other));
}

/* ---- Each page once ---- */

void check_added_once(enum confidential_type type) {
    struct confidential c = confidential_make(type, SIZE);
    struct kvmprep_range rest;
    add_image(&c, TAG);
    unsigned char before[DIGEST_SIZE], after[DIGEST_SIZE];
    confidential_measure(&c, before);
    /* The library knows, and asks nobody. */
    CHECK_ERR(confidential_add(&c, pages_of(20, 10), MEASURED, &rest), c.err, EEXIST, KVMPREP_REASON_CLAIMED);
    CHECK_EQ(rest.size, 10 * PAGE);
    confidential_measure(&c, after);
    CHECK(are_equal(before, after));

    /* What was added behind its back KVM knows. The pages before it are in. */
    CHECK_EQ(confidential_add_raw(&c, 40), 0);
    CHECK(confidential_add(&c, pages_of(36, 8), MEASURED, &rest) < 0);
    printf("  %d %s: %s\n", c.err.code, kvmprep_reason_name(c.err.reason), c.err.message);
    CHECK(rest.gpa == pages_of(40, 4).gpa && rest.size == 4 * PAGE);
    struct kvmprep_range in = pages_of(36, 4), out = pages_of(41, 3);
    CHECK_ERR(kvmprep_private_check_claims(c.handle, &in, 1, &c.err), c.err, EEXIST, KVMPREP_REASON_CLAIMED);
    CHECK_OK(kvmprep_private_check_claims(c.handle, &out, 1, &c.err), c.err);

    CHECK_EQ(confidential_seal(&c), 0);
    CHECK_ERR(confidential_add(&c, out, MEASURED, &rest), c.err, EPERM, KVMPREP_REASON_SEALED);
    CHECK(confidential_add_raw(&c, 50) < 0);
    confidential_end(&c);
}

void check_not_before_the_seal(enum confidential_type type) {
    struct confidential c = confidential_make(type, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    uint64_t gpa = MEMORY_GPA, size = SIZE;
    opts.vcpu_fd = c.vcpus[0].fd;
    CHECK_ERR(kvmprep_populate(c.handle, NULL, 0, &opts, NULL, 0, &c.err), c.err, EOPNOTSUPP,
              KVMPREP_REASON_NOT_SEALED);
    CHECK_EQ(raw_pre_fault(c.vcpus[0].fd, &gpa, &size), -EOPNOTSUPP);
    CHECK(gpa == MEMORY_GPA && size == SIZE);
    add_image(&c, TAG);
    CHECK_EQ(raw_pre_fault(c.vcpus[0].fd, &gpa, &size), -EOPNOTSUPP);
    CHECK_EQ(confidential_seal(&c), 0);
    populate(&c);
    use_all_memory(&c, IMAGE_PAGES);
    confidential_end(&c);
}

/* ---- Failures ---- */

/* The rest of an image goes in, and the whole measures as one that nothing disturbed. */
static void check_taken_up(struct confidential *c, struct kvmprep_range rest) {
    unsigned char digest[DIGEST_SIZE], undisturbed[DIGEST_SIZE];
    if (rest.size != 0)
        CHECK_OK(confidential_add(c, rest, MEASURED, &rest), c->err);
    CHECK_EQ(rest.size, 0);
    CHECK_EQ(confidential_seal(c), 0);
    confidential_measure(c, digest);
    measure_image(c->type, TAG, undisturbed);
    CHECK(are_equal(digest, undisturbed));
    populate(c);
    use_all_memory(c, IMAGE_PAGES);
}

void check_source_that_cannot_be_read(enum confidential_type type) {
    static const uint64_t bad_pages[] = {0, 1, 11, IMAGE_PAGES - 1};
    for (size_t i = 0; i < sizeof(bad_pages) / sizeof(bad_pages[0]); i++) {
        const uint64_t bad = bad_pages[i];
        struct confidential c = confidential_make(type, SIZE);
        struct kvmprep_range rest, in = pages_of(0, bad), left = pages_of(bad, IMAGE_PAGES - bad);
        fill_source(&c, pages_of(0, IMAGE_PAGES), TAG);
        CHECK_EQ(mprotect(c.source + bad * PAGE, PAGE, PROT_NONE), 0);
        CHECK_EQ(confidential_add(&c, pages_of(0, IMAGE_PAGES), MEASURED, &rest), -EFAULT);
        CHECK(c.err.hint[0] != 0 && c.err.stage == KVMPREP_STAGE_LAUNCH);
        CHECK(rest.gpa == left.gpa && rest.size == left.size);
        CHECK_OK(kvmprep_private_check_claims(c.handle, &left, 1, &c.err), c.err);
        if (bad != 0)
            CHECK_ERR(kvmprep_private_check_claims(c.handle, &in, 1, &c.err), c.err, EEXIST,
                      KVMPREP_REASON_CLAIMED);
        CHECK_EQ(mprotect(c.source + bad * PAGE, PAGE, PROT_READ | PROT_WRITE), 0);
        check_taken_up(&c, rest);
        confidential_end(&c);
    }
}

/* A launch whose ioctl fails once, with something that is over by itself, or is for the caller to repeat. */
static void fail_launch(enum confidential_type type, const char *what, int expected) {
    struct confidential c = confidential_make(type, SIZE);
    struct kvmprep_range rest;
    fill_source(&c, pages_of(0, IMAGE_PAGES), TAG);
    confidential_fail(what);
    int result = confidential_add(&c, pages_of(0, IMAGE_PAGES), MEASURED, &rest);
    printf("  %s: %d %s\n", what, result, c.err.message);
    CHECK_EQ(result, expected);
    CHECK_EQ(rest.size, expected == 0 ? 0 : IMAGE_PAGES * PAGE);
    check_taken_up(&c, rest);
    confidential_end(&c);
}

static struct confidential sealed(enum confidential_type type) {
    struct confidential c = confidential_make(type, SIZE);
    add_image(&c, TAG);
    CHECK_EQ(confidential_seal(&c), 0);
    return c;
}

static void fail_population(enum confidential_type type, const char *what, int expected) {
    struct confidential c = sealed(type);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = c.vcpus[0].fd;
    confidential_fail(what);
    int answer = kvmprep_populate(c.handle, NULL, 0, &opts, &result, sizeof(result), &c.err);
    printf("  %s: %d %s\n", what, answer, c.err.message);
    CHECK_EQ(answer, expected);
    CHECK_EQ(result.stage2 + result.remaining, SIZE);
    populate(&c);
    use_all_memory(&c, IMAGE_PAGES);
    confidential_end(&c);
}

/* Nothing is converted where KVM did not do it; the next call does. */
static void fail_conversion(enum confidential_type type, uint32_t to, const char *what, int expected) {
    struct confidential c = sealed(type);
    struct kvmprep_range range = pages_of(64, 32);
    struct kvmprep_visibility_run run;
    uint32_t from = to == KVMPREP_PRIVATE ? KVMPREP_SHARED : KVMPREP_PRIVATE;
    populate(&c);
    guest_accepts(&c, pages_of(IMAGE_PAGES, PAGES - IMAGE_PAGES));
    CHECK_OK(kvmprep_convert(c.handle, &range, from, NULL, &c.err), c.err);
    confidential_fail(what);
    CHECK_EQ(kvmprep_convert(c.handle, &range, to, NULL, &c.err), expected);
    printf("  %s: %d %s\n", what, expected, c.err.message);
    CHECK_OK(kvmprep_visibility_next(c.handle, range.gpa, &run, &c.err), c.err);
    CHECK_EQ(run.visibility, expected == 0 ? to : from);
    CHECK_OK(kvmprep_convert(c.handle, &range, KVMPREP_SHARED, NULL, &c.err), c.err);
    convert_both_ways(&c, range);
    confidential_end(&c);
}

void check_failing_ioctls(enum confidential_type type) {
    fail_launch(type, "ioctl KVM_MEMORY_ENCRYPT_OP:1:EAGAIN", 0);
    fail_launch(type, "ioctl KVM_MEMORY_ENCRYPT_OP:1:ENOMEM", -ENOMEM);
    fail_population(type, "ioctl KVM_PRE_FAULT_MEMORY:1:EAGAIN", 0);
    fail_population(type, "ioctl KVM_PRE_FAULT_MEMORY:2:ENOMEM", -ENOMEM);
    fail_population(type, "ioctl KVM_PRE_FAULT_MEMORY:2:EINTR", -EINTR);
    for (uint32_t to = KVMPREP_SHARED; to <= KVMPREP_PRIVATE; to++) {
        fail_conversion(type, to, "ioctl KVM_SET_MEMORY_ATTRIBUTES:1:ENOMEM", -ENOMEM);
        fail_conversion(type, to, "ioctl KVM_SET_MEMORY_ATTRIBUTES:1:EINTR", -EINTR);
    }
}

/* ---- Without any preparation ---- */

void check_guest_of_its_own(enum confidential_type type) {
    struct confidential c = sealed(type);
    struct kvmprep_range some = pages_of(512, 128), shared = pages_of(600, 4);
    uint64_t faults = faults_taken(&c);
    guest_accepts(&c, some);
    CHECK_EQ(faults_taken(&c) - faults, 128);
    guest_writes_words(&c, some, KVMPREP_PRIVATE, TAG);
    check_guest_reads(&c, some, KVMPREP_PRIVATE, TAG);
    CHECK_EQ(faults_taken(&c) - faults, 128);

    /* It touches as shared what is private, and the other way round. */
    guest_writes_words(&c, shared, KVMPREP_SHARED, OTHER_TAG);
    CHECK_EQ(c.memory_faults, 4);
    CHECK_EQ(*word_of_host(&c, 601), word_of_page(MEMORY_GPA + 601 * PAGE, OTHER_TAG));
    guest_accepts(&c, shared);
    CHECK_EQ(c.memory_faults, 8);
    check_guest_reads(&c, shared, KVMPREP_PRIVATE, 0);
    check_guest_reads(&c, pages_of(512, 88), KVMPREP_PRIVATE, TAG);
    confidential_end(&c);
}

void check_many_conversions(enum confidential_type type) {
    struct confidential c = sealed(type);
    unsigned seed = 1, rounds = check_rounds(60);
    populate(&c);
    guest_accepts(&c, pages_of(IMAGE_PAGES, PAGES - IMAGE_PAGES));
    for (unsigned round = 0; round < rounds; round++) {
        uint64_t n = 1 + (unsigned)rand_r(&seed) % (round % 8 == 7 ? 600 : 40);
        uint64_t first = (unsigned)rand_r(&seed) % (PAGES - n + 1);
        convert_both_ways(&c, pages_of(first, n));
    }
    printf("  %" PRIu64 " hypercalls, %" PRIu64 " faults\n", c.hypercalls, faults_taken(&c));
    CHECK_EQ(c.hypercalls, 2 * rounds);
    guest_writes_words(&c, pages_of(0, PAGES), KVMPREP_PRIVATE, TAG);
    check_guest_reads(&c, pages_of(0, PAGES), KVMPREP_PRIVATE, TAG);
    confidential_end(&c);
}
