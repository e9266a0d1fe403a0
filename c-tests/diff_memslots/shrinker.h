/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Makes a sequence that shows something as short and as plain as can be while it still shows it.
 */
#ifndef SHRINKER_H
#define SHRINKER_H

#include "operation.h"

/* Does the sequence from its start; returns which step shows it, or -1. */
typedef int shows_fn(const struct sequence *sequence);

/* The sequence must show it. Afterwards its last step is the one that does. */
void shrink(struct sequence *sequence, shows_fn *shows);

#endif
