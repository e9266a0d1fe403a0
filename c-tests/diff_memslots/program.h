/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Prints a sequence as a C program that needs nothing of ours, for whoever wants to see the kernel do it.
 */
#ifndef PROGRAM_H
#define PROGRAM_H

#include "operation.h"

/* `found` is told in the program's opening comment. With internal slots the VM gets what makes KVM add its
 * own. */
void program_print(const struct sequence *sequence, const char *found, bool has_internal_slots);

#endif
