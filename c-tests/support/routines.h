/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What guests do: the few routines in their page of code, each written twice. As machine code, for KVM; and
 * as steps, for the software model (kvmprep-model.h), which runs no code. Tests see no difference: a routine
 * is begun by its address and registers on either.
 *
 * Nothing here ends a case, and all of it may be called on any thread.
 */
#ifndef ROUTINES_H
#define ROUTINES_H

#include <linux/kvm.h>
#include "guest.h"

/* Where the routines lie in the page of code at gpa 0, with the registers that they take. */
enum routine {
    ROUTINE_WRITE = 0,     /* edi: address, ecx: pages, eax: what to write */
    ROUTINE_READ = 32,     /* edi: address, ecx: pages */
    ROUTINE_LOOP = 64,     /* edi: address, eax: what to write there, once; runs on for ever */
    ROUTINE_CONVERT = 256, /* ebx: address, ecx: pages, edx: attributes; again while it is told EAGAIN */
    ROUTINE_TOUCH = 288,   /* edi: address, ecx: pages, edx: what as, in the exit's flags; esi: tag */
    ROUTINE_FILL = 352,    /* edi: address, ecx: pages, esi: tag */
    ROUTINE_GATHER = 384,  /* edi: address, ecx: pages, esi: where the words go */
};

#define TOUCHED_PORT 0x10  /* out: WRITE and READ are done */
#define DONE_PORT 0x18     /* out: the others are done; eax is what CONVERT was answered */
#define ANNOUNCE_PORT 0x19 /* out: the page that TOUCH is about to touch, and what as */

/* Puts all routines into the page of code. */
void routines_put(void *code);
/* Has the vCPU's guest begin the routine at regs->rip when it is next run; 0 or a negative errno. */
int routine_begin(const struct vcpu *vcpu, const struct kvm_regs *regs);

#endif
