/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What holds for guests of TDX and SNP alike: the cases that model_tdx.c and model_snp.c share.
 */
#ifndef CONFIDENTIAL_CASES_H
#define CONFIDENTIAL_CASES_H

#include "confidential.h"

/* From its making to its end: image, seal, population, the guest's first use of all of it, conversions. */
void check_whole_life(enum confidential_type type);
/* The same image measures the same, however it was cut into calls; another one does not. */
void check_measurement(enum confidential_type type);
/* No page goes into the image twice, whoever tries; and none once it is closed. */
void check_added_once(enum confidential_type type);
/* Before the image is closed stage 2 is filled by nobody. */
void check_not_before_the_seal(enum confidential_type type);
/* A source that cannot be read ends the call at its page; mended, the rest goes in, and measures as ever. */
void check_source_that_cannot_be_read(enum confidential_type type);
/* Each ioctl that a launch, a population and a conversion make fails once; again, each comes to its end. */
void check_failing_ioctls(enum confidential_type type);
/* Memory that nobody has prepared costs a fault a page; a page of the wrong kind costs an exit, and is
 * converted.
 */
void check_guest_of_its_own(enum confidential_type type);
/* Conversions back and forth, at random: each ends, no content comes through, and nothing is left to fault.
 */
void check_many_conversions(enum confidential_type type);

/* An image of so many pages, all measured, filled with `tag`; where it fails the case ends. */
#define IMAGE_PAGES 24
void add_image(struct confidential *c, uint64_t tag);
/* What such an image measures. */
void measure_image(enum confidential_type type, uint64_t tag, unsigned char digest[DIGEST_SIZE]);

#endif
