/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See routines.h. */
#define _GNU_SOURCE
#include "routines.h"
#include <errno.h>
#include <kvmprep-model.h>
#include <linux/kvm_para.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

/* ---- As machine code ---- */

static const unsigned char write_code[] = {
    0x89, 0x07,                                 /* 1: mov %eax, (%edi) */
    0x81, 0xc7,         0x00, 0x10, 0x00, 0x00, /* add $4096, %edi */
    0x49,                                       /* dec %ecx */
    0x75, 0xf5,                                 /* jnz 1b */
    0xe6, TOUCHED_PORT,                         /* out %al, $TOUCHED_PORT */
    0xf4,                                       /* hlt */
};
static const unsigned char read_code[] = {
    0x8b, 0x1f,                                 /* 1: mov (%edi), %ebx */
    0x81, 0xc7,         0x00, 0x10, 0x00, 0x00, /* add $4096, %edi */
    0x49,                                       /* dec %ecx */
    0x75, 0xf5,                                 /* jnz 1b */
    0xe6, TOUCHED_PORT,                         /* out %al, $TOUCHED_PORT */
    0xf4,                                       /* hlt */
};
static const unsigned char loop_code[] = {
    0x89, 0x07, /* mov %eax, (%edi) */
    0xeb, 0xfe, /* 1: jmp 1b */
};
/* On other CPUs than AMD's, KVM puts their own instruction in. */
static const unsigned char convert_code[] = {
    0x31, 0xc0,                 /* 1: xor %eax, %eax */
    0xb0, KVM_HC_MAP_GPA_RANGE, /* mov $KVM_HC_MAP_GPA_RANGE, %al */
    0x0f, 0x01,
    0xd9, /* vmmcall */
    0x83, 0xf8,
    11,              /* cmp $EAGAIN, %eax */
    0x74, 0xf4,      /* je 1b */
    0xe7, DONE_PORT, /* out %eax, $DONE_PORT */
    0xf4,            /* hlt */
};
static const unsigned char touch_code[] = {
    0x89, 0xf8,                                  /* 1: mov %edi, %eax */
    0x08, 0xd0,                                  /* or %dl, %al */
    0xe7, ANNOUNCE_PORT,                         /* out %eax, $ANNOUNCE_PORT */
    0x8d, 0x1c,          0x37,                   /* lea (%edi, %esi), %ebx */
    0x89, 0x1f,                                  /* mov %ebx, (%edi) */
    0x89, 0x9f,          0xfc, 0x0f, 0x00, 0x00, /* mov %ebx, 4092(%edi) */
    0x81, 0xc7,          0x00, 0x10, 0x00, 0x00, /* add $4096, %edi */
    0x49,                                        /* dec %ecx */
    0x75, 0xe6,                                  /* jnz 1b */
    0xe7, DONE_PORT,                             /* out %eax, $DONE_PORT */
    0xf4,                                        /* hlt */
};
static const unsigned char fill_code[] = {
    0x8d, 0x1c,      0x37,                   /* 1: lea (%edi, %esi), %ebx */
    0x89, 0x1f,                              /* mov %ebx, (%edi) */
    0x89, 0x9f,      0xfc, 0x0f, 0x00, 0x00, /* mov %ebx, 4092(%edi) */
    0x81, 0xc7,      0x00, 0x10, 0x00, 0x00, /* add $4096, %edi */
    0x49,                                    /* dec %ecx */
    0x75, 0xec,                              /* jnz 1b */
    0xe7, DONE_PORT,                         /* out %eax, $DONE_PORT */
    0xf4,                                    /* hlt */
};
static const unsigned char gather_code[] = {
    0x8b, 0x07,                              /* 1: mov (%edi), %eax */
    0x89, 0x06,                              /* mov %eax, (%esi) */
    0x8b, 0x87,      0xfc, 0x0f, 0x00, 0x00, /* mov 4092(%edi), %eax */
    0x89, 0x46,      0x04,                   /* mov %eax, 4(%esi) */
    0x83, 0xc6,      0x08,                   /* add $8, %esi */
    0x81, 0xc7,      0x00, 0x10, 0x00, 0x00, /* add $4096, %edi */
    0x49,                                    /* dec %ecx */
    0x75, 0xe7,                              /* jnz 1b */
    0xe7, DONE_PORT,                         /* out %eax, $DONE_PORT */
    0xf4,                                    /* hlt */
};

void routines_put(void *code) {
    static const struct {
        enum routine at;
        const unsigned char *code;
        size_t size;
    } routines[] = {
        {ROUTINE_WRITE, write_code, sizeof(write_code)},
        {ROUTINE_READ, read_code, sizeof(read_code)},
        {ROUTINE_LOOP, loop_code, sizeof(loop_code)},
        {ROUTINE_CONVERT, convert_code, sizeof(convert_code)},
        {ROUTINE_TOUCH, touch_code, sizeof(touch_code)},
        {ROUTINE_FILL, fill_code, sizeof(fill_code)},
        {ROUTINE_GATHER, gather_code, sizeof(gather_code)},
    };
    for (size_t i = 0; i < sizeof(routines) / sizeof(routines[0]); i++)
        memcpy((char *)code + routines[i].at, routines[i].code, routines[i].size);
}

/* ---- As steps ---- */

#define LAST_WORD (PAGE - 4) /* of a page */
#define STEPS_OF_A_PAGE 3    /* of TOUCH, the only routine that takes more than a few */
#define STEPS_BESIDE 4

struct list {
    struct kvmprep_model_step *steps;
    size_t n;
};

static struct kvmprep_model_step *add(struct list *list, uint32_t kind) {
    struct kvmprep_model_step *step = &list->steps[list->n++];
    *step = (struct kvmprep_model_step){.kind = kind, .width = 4};
    return step;
}

static struct kvmprep_model_step *add_out(struct list *list, uint32_t port, uint32_t width, uint32_t value) {
    struct kvmprep_model_step *out = add(list, KVMPREP_MODEL_OUT);
    out->port = port;
    out->width = width;
    out->value = value;
    return out;
}

/* Accesses a word of each page; `offset` is its place in the page. */
static struct kvmprep_model_step *add_access(struct list *list, uint32_t kind, const struct kvm_regs *regs,
                                             uint64_t offset) {
    struct kvmprep_model_step *access = add(list, kind);
    access->gpa = regs->rdi + offset;
    access->count = regs->rcx;
    access->stride = PAGE;
    return access;
}

static void add_write(struct list *list, const struct kvm_regs *regs, uint64_t offset, uint64_t value,
                      uint64_t value_stride) {
    struct kvmprep_model_step *write = add_access(list, KVMPREP_MODEL_WRITE, regs, offset);
    write->value = value;
    write->value_stride = value_stride;
}

static void add_copy(struct list *list, const struct kvm_regs *regs, uint64_t offset, uint64_t to) {
    struct kvmprep_model_step *copy = add_access(list, KVMPREP_MODEL_COPY, regs, offset);
    copy->to = to;
    copy->to_stride = 8;
}

static void add_fill(struct list *list, const struct kvm_regs *regs) {
    add_write(list, regs, 0, regs->rdi + regs->rsi, PAGE);
    add_write(list, regs, LAST_WORD, regs->rdi + regs->rsi, PAGE);
}

static void add_touch(struct list *list, const struct kvm_regs *regs) {
    struct kvm_regs page = *regs;
    page.rcx = 1;
    for (uint64_t i = 0; i < regs->rcx; i++, page.rdi += PAGE) {
        add_out(list, ANNOUNCE_PORT, 4, (uint32_t)(page.rdi | (regs->rdx & 0xff)));
        add_fill(list, &page);
    }
}

static void add_hypercall(struct list *list, const struct kvm_regs *regs) {
    struct kvmprep_model_step *call = add(list, KVMPREP_MODEL_HYPERCALL);
    call->flags = KVMPREP_MODEL_STEP_AGAIN;
    call->value = KVM_HC_MAP_GPA_RANGE;
    /* The guest is one of 32 bits. */
    call->args[0] = (uint32_t)regs->rbx;
    call->args[1] = (uint32_t)regs->rcx;
    call->args[2] = (uint32_t)regs->rdx;
}

static void add_routine(struct list *list, const struct kvm_regs *regs) {
    add(list, KVMPREP_MODEL_FETCH); /* the page of code: a fault of its own */
    switch ((enum routine)regs->rip) {
    case ROUTINE_WRITE:
        add_write(list, regs, 0, regs->rax, 0);
        add_out(list, TOUCHED_PORT, 1, 0);
        break;
    case ROUTINE_READ:
        add_access(list, KVMPREP_MODEL_READ, regs, 0);
        add_out(list, TOUCHED_PORT, 1, 0);
        break;
    case ROUTINE_LOOP:
        add_write(list, regs, 0, regs->rax, 0);
        add(list, KVMPREP_MODEL_LOOP);
        break;
    case ROUTINE_CONVERT:
        add_hypercall(list, regs);
        add_out(list, DONE_PORT, 4, 0)->flags = KVMPREP_MODEL_STEP_ANSWER;
        break;
    case ROUTINE_TOUCH:
        add_touch(list, regs);
        add_out(list, DONE_PORT, 4, 0);
        break;
    case ROUTINE_FILL:
        add_fill(list, regs);
        add_out(list, DONE_PORT, 4, 0);
        break;
    case ROUTINE_GATHER:
        add_copy(list, regs, 0, regs->rsi);
        add_copy(list, regs, LAST_WORD, regs->rsi + 4);
        add_out(list, DONE_PORT, 4, 0);
        break;
    }
}

static int begin_on_model(const struct vcpu *vcpu, const struct kvm_regs *regs) {
    size_t most = STEPS_BESIDE + (regs->rip == ROUTINE_TOUCH ? regs->rcx * STEPS_OF_A_PAGE : 0);
    struct list list = {.steps = calloc(most, sizeof(struct kvmprep_model_step))};
    if (list.steps == NULL)
        return -ENOMEM;
    add_routine(&list, regs);
    int result = kvmprep_model_set_steps(vcpu->fd, list.steps, list.n);
    free(list.steps);
    return result;
}

/* ---- As either ---- */

int routine_begin(const struct vcpu *vcpu, const struct kvm_regs *regs) {
    if (kvm_is_modelled())
        return begin_on_model(vcpu, regs);
    return ioctl(vcpu->fd, KVM_SET_REGS, regs) < 0 ? -errno : 0;
}
