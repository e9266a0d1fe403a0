/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See program.h. */
#include "program.h"
#include "support/uapi.h"
#include <inttypes.h>
#include <stdio.h>

static const char opening[] = "#define _GNU_SOURCE\n"
                              "#include <errno.h>\n"
                              "#include <fcntl.h>\n"
                              "#include <stdint.h>\n"
                              "#include <stdio.h>\n"
                              "#include <string.h>\n"
                              "#include <sys/ioctl.h>\n"
                              "#include <sys/mman.h>\n"
                              "#include <unistd.h>\n"
                              "\n"
                              "struct region {\n"
                              "    uint32_t slot, flags;\n"
                              "    uint64_t gpa, size, hva, offset;\n"
                              "    uint32_t fd, pad1;\n"
                              "    uint64_t pad2[14];\n"
                              "};\n"
                              "enum { V1, V2 };\n"
                              "static int vm;\n"
                              "\n"
                              "static void set(int version, uint32_t slot, uint32_t flags, uint64_t gpa, "
                              "uint64_t size, uint64_t hva, int fd,\n"
                              "                uint64_t offset) {\n"
                              "    struct region r = {slot, flags, gpa, size, hva, offset, (uint32_t)fd, 0, "
                              "{0}};\n"
                              "    unsigned long request = version == V2 ? 0x40a0ae49 : 0x4020ae46;\n"
                              "    int result = ioctl(vm, request, &r);\n"
                              "    printf(\"slot %#x: %s\\n\", slot, result == 0 ? \"taken\" : "
                              "strerror(errno));\n"
                              "}\n"
                              "\n";

static const char gmem_helper[] = "static int guest_memfd(int of, uint64_t size, uint64_t flags) {\n"
                                  "    uint64_t create[8] = {size, flags};\n"
                                  "    return ioctl(of, 0xc040aed4, create);\n"
                                  "}\n"
                                  "\n";

static const char beginning[] = "int main(void) {\n"
                                "    int kvm = open(\"/dev/kvm\", O_RDWR);\n";

static const char internal_slots[] =
    "    uint64_t identity_map = 0xfffbc000;\n"
    "    ioctl(vm, 0xae47, 0xfffbd000ul); /* KVM_SET_TSS_ADDR */\n"
    "    ioctl(vm, 0x4008ae48, &identity_map); /* KVM_SET_IDENTITY_MAP_ADDR */\n"
    "    ioctl(vm, 0xae60, 0ul); /* KVM_CREATE_IRQCHIP */\n"
    "    ioctl(vm, 0xae41, 0ul); /* KVM_CREATE_VCPU */\n";

static const char *const names[FILES] = {"short_file", "long_file", "mappable_file", "others_file", "memfd",
                                         "device",     "vm",        "named",         "1000",        "-1"};

static bool is_read(const struct operation *step) {
    return step->deed != SET_SLOT || (step->flags & KVM_MEM_GUEST_MEMFD) != 0;
}

/* The expression that makes an own file. */
static void print_making(enum file file) {
    uint64_t flags = file == FILE_MAPPABLE ? GUEST_MEMFD_FLAG_MMAP : 0;
    printf("guest_memfd(vm, %#" PRIx64 ", %" PRIu64 ")", length_of(file), flags);
}

static void print_making_of_others(enum file file) {
    switch (file) {
    case FILE_OF_OTHER_VM:
        printf("    int others_file = guest_memfd(ioctl(kvm, 0xae01, 0ul), %#" PRIx64 ", 0);\n",
               length_of(file));
        break;
    case FILE_MEMFD:
        printf("    int memfd = memfd_create(\"test\", 0);\n");
        break;
    case FILE_DEVICE:
        printf("    int device = open(\"/dev/null\", O_RDWR);\n");
        break;
    case FILE_NAMED:
        printf("    int named = open(\"/dev/null\", O_PATH);\n");
        break;
    default:
        break;
    }
}

/* Which descriptors of a file the sequence uses. */
struct use {
    bool first, second;
};

static struct use use_of(const struct sequence *sequence, enum file file) {
    struct use use = {false, false};
    for (unsigned i = 0; i < sequence->n; i++) {
        const struct operation *step = &sequence->steps[i];
        if (step->file != file || !is_read(step))
            continue;
        use.first |= step->deed != SET_SLOT || !step->second_descriptor;
        use.second |= step->deed != SET_SLOT || step->second_descriptor;
    }
    return use;
}

static bool makes_a_gmem(const struct sequence *sequence) {
    for (enum file file = 0; file <= FILE_OF_OTHER_VM; file++) {
        struct use use = use_of(sequence, file);
        if (use.first || use.second)
            return true;
    }
    return false;
}

/* Makes the files that the sequence reads. */
static void print_files(const struct sequence *sequence) {
    for (enum file file = 0; file < FILES; file++) {
        struct use use = use_of(sequence, file);
        if (!use.first && !use.second)
            continue;
        if (file >= OWN_FILES) {
            print_making_of_others(file);
            continue;
        }
        printf("    int %s = ", names[file]);
        print_making(file);
        if (use.second)
            printf(", %s_2 = dup(%s)", names[file], names[file]);
        printf(";\n");
    }
}

static const char *suffix(const struct operation *step, bool second) {
    return step->file < OWN_FILES && second ? "_2" : "";
}

static void print_slot(const struct operation *step) {
    bool has_gmem = is_read(step);
    printf("    set(%s, %#x, %#x, %#" PRIx64 ", %#" PRIx64 ", %#" PRIx64 ", ",
           has_gmem || step->version2 ? "V2" : "V1", step->slot, step->flags, step->gpa, step->size,
           step->hva);
    printf("%s%s, %#" PRIx64 ");\n", has_gmem ? names[step->file] : "-1",
           has_gmem ? suffix(step, step->second_descriptor) : "", has_gmem ? step->offset : 0);
}

static void print_step(const struct operation *step) {
    const char *name = names[step->file];
    switch (step->deed) {
    case SET_SLOT:
        print_slot(step);
        break;
    case CLOSE_ONE:
        printf("    dup2(%s%s, %s%s);\n", name, suffix(step, !step->second_descriptor), name,
               suffix(step, step->second_descriptor));
        break;
    case RENEW_FILE:
    case REUSE_NUMBERS:
        printf("    close(%s);\n    close(%s_2);\n    %s = ", name, name, name);
        print_making(step->file);
        printf(", %s_2 = dup(%s);\n", name, name);
        break;
    }
}

void program_print(const struct sequence *sequence, const char *found, bool has_internal_slots) {
    printf("/* %s */\n%s%s%s", found, opening, makes_a_gmem(sequence) ? gmem_helper : "", beginning);
    printf("    vm = ioctl(kvm, 0xae01, %luul);\n", sequence->vm_type);
    printf("%s", has_internal_slots ? internal_slots : "");
    print_files(sequence);
    for (unsigned i = 0; i < sequence->n; i++)
        print_step(&sequence->steps[i]);
    printf("    return 0;\n}\n");
}
