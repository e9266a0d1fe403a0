/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Thinks up steps: what a VMM might do next with the slots there are, and then, often, something at or beyond
 * an edge of what KVM takes.
 *
 * It must never ask for what costs seconds or gigabytes: giant slots where KVM keeps a word for each page.
 */
#ifndef GENERATOR_H
#define GENERATOR_H

#include "support/diff.h"
#include "world.h"

struct operation generate_step(struct diff_random *random, const struct world *world);

#endif
