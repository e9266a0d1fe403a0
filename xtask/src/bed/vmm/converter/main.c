/*
 * A guest that converts its memory between private and shared, as a microvm's firmware and without any
 * system: it does what drive.sh tells it on the console, a line for each step, holds each page's content
 * against what it must be, and answers each step with its name and a number. All its memory but this firmware
 * is private when it starts.
 *
 * It must never find right what it did not look at: a step that ends has looked at each page that it named.
 */
#include <stdbool.h>
#include <stdint.h>

#define PAGE 4096u
#define MIB (1u << 20)
#define FRAME (2 * MIB)

/* QEMU is told to make the memory of two blocks that meet here, and no more of it than that. */
#define BORDER (128 * MIB)
#define END (256 * MIB)

/* What is nobody's, and what is a device's. */
#define HOLE 0x20000000u
#define IOAPIC 0xfec00000u
#define VIRTIO 0xfeb00000u

enum { SHARED = 0, PRIVATE = 1 };

/* What the hypercall answers. */
#define KVM_EINVAL 22u

static void out(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t in(uint16_t port) {
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

#define CONSOLE 0x3f8
#define CONSOLE_STATUS (CONSOLE + 5)

static void print(const char *text) {
    for (; *text; text++) {
        while (!(in(CONSOLE_STATUS) & 0x20)) {
        }
        out(CONSOLE, (uint8_t)*text);
    }
}

static void print_number(uint32_t number) {
    char text[] = " 00000000";

    for (int digit = 8; digit > 0; digit--, number >>= 4) {
        text[digit] = "0123456789abcdef"[number & 15];
    }
    print(text);
}

/* Looks seldom: each look is an exit, and exits are counted. */
static char read_letter(void) {
    while (!(in(CONSOLE_STATUS) & 1)) {
        for (int spin = 0; spin < 1000000; spin++) {
            __asm__ volatile("pause");
        }
    }
    return (char)in(CONSOLE);
}

/* A line without its end; what is too long is cut off. */
static void read_line(char *line, uint32_t size) {
    uint32_t length = 0;
    char letter;

    while ((letter = read_letter()) != '\n') {
        if (length < size - 1) {
            line[length++] = letter;
        }
    }
    line[length] = '\0';
}

static bool is_same(const char *a, const char *b) {
    for (; *a && *a == *b; a++, b++) {
    }
    return *a == *b;
}

/* Says what is wrong and stops for good: what comes next would be of no worth. */
static void fail(const char *what, uint32_t address, uint32_t expected, uint32_t found) {
    print("inner: wrong ");
    print(what);
    print_number(address);
    print_number(expected);
    print_number(found);
    print("\n");
    for (;;) {
        __asm__ volatile("hlt");
    }
}

/* KVM_HC_MAP_GPA_RANGE; bit 4 of the attributes is "private". */
static uint32_t map_gpa_range(uint32_t gpa, uint32_t pages, uint32_t to) {
    uint32_t answer;

    __asm__ volatile("vmmcall" : "=a"(answer) : "a"(12), "b"(gpa), "c"(pages), "d"(to << 4) : "memory");
    return answer;
}

static void convert(uint32_t gpa, uint32_t size, uint32_t to) {
    uint32_t answer = map_gpa_range(gpa, size / PAGE, to);

    if (answer != 0) {
        fail("answer", gpa, 0, answer);
    }
}

static void expect_refused(uint32_t gpa, uint32_t pages) {
    uint32_t answer = map_gpa_range(gpa, pages, PRIVATE);

    if (answer != KVM_EINVAL) {
        fail("answer", gpa, KVM_EINVAL, answer);
    }
}

/* A page's content is one word, at both its ends. */
static volatile uint32_t *word_at(uint32_t gpa) {
    return (volatile uint32_t *)gpa;
}

static void fill_page(uint32_t gpa, uint32_t word) {
    *word_at(gpa) = word;
    *word_at(gpa + PAGE - 4) = word;
}

static void expect_page(uint32_t gpa, uint32_t word) {
    if (*word_at(gpa) != word || *word_at(gpa + PAGE - 4) != word) {
        fail("page", gpa, word, *word_at(gpa) != word ? *word_at(gpa) : *word_at(gpa + PAGE - 4));
    }
}

/* A word that tells the page and the time it was written. */
static uint32_t mark(uint32_t gpa, uint32_t time) {
    return gpa | time | 0x800;
}

static void fill(uint32_t gpa, uint32_t size, uint32_t time) {
    for (uint32_t page = gpa; page < gpa + size; page += PAGE) {
        fill_page(page, mark(page, time));
    }
}

static void expect_filled(uint32_t gpa, uint32_t size, uint32_t time) {
    for (uint32_t page = gpa; page < gpa + size; page += PAGE) {
        expect_page(page, mark(page, time));
    }
}

static void expect_zero(uint32_t gpa, uint32_t size) {
    for (uint32_t page = gpa; page < gpa + size; page += PAGE) {
        expect_page(page, 0);
    }
}

/* The area that is converted at random: half of it in each block. */
#define AREA_PAGES 1024u
#define AREA (BORDER - AREA_PAGES / 2 * PAGE)
#define CONVERSIONS 400

static struct {
    uint32_t word;
    uint32_t visibility;
} area[AREA_PAGES];
static uint32_t seed;

static uint32_t random_below(uint32_t limit) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % limit;
}

/* What changes sides is empty there; what does not is as it was. */
static void convert_in_area(uint32_t first, uint32_t pages, uint32_t to, uint32_t time) {
    convert(AREA + first * PAGE, pages * PAGE, to);
    for (uint32_t i = first; i < first + pages; i++) {
        if (area[i].visibility != to) {
            area[i].visibility = to;
            area[i].word = 0;
        }
        expect_page(AREA + i * PAGE, area[i].word);
        area[i].word = mark(AREA + i * PAGE, time);
        fill_page(AREA + i * PAGE, area[i].word);
    }
}

/* There and back, which leaves nothing on either side, whatever there was. */
static void empty_half(uint32_t first) {
    convert(AREA + first * PAGE, AREA_PAGES / 2 * PAGE, SHARED);
    convert(AREA + first * PAGE, AREA_PAGES / 2 * PAGE, PRIVATE);
    for (uint32_t i = first; i < first + AREA_PAGES / 2; i++) {
        area[i].word = 0;
        area[i].visibility = PRIVATE;
        expect_page(AREA + i * PAGE, 0);
    }
}

/* Back and forth, each conversion checked; answers a sum over all that the pages hold in the end. */
static uint32_t convert_at_random(bool across_border) {
    uint32_t sum = 0;

    seed = across_border;
    empty_half(0);
    empty_half(AREA_PAGES / 2);
    for (uint32_t time = 1; time <= CONVERSIONS; time++) {
        uint32_t first = random_below(AREA_PAGES);
        uint32_t limit = first < AREA_PAGES / 2 && !across_border ? AREA_PAGES / 2 : AREA_PAGES;
        uint32_t pages = 1 + random_below(64);

        if (pages > limit - first) {
            pages = limit - first;
        }
        convert_in_area(first, pages, random_below(2), time);
    }
    for (uint32_t i = 0; i < AREA_PAGES; i++) {
        expect_page(AREA + i * PAGE, area[i].word);
        sum = sum * 31 + area[i].word + area[i].visibility;
    }
    return sum;
}

static uint32_t convert_in_blocks(void) {
    return convert_at_random(false);
}

static uint32_t convert_across_border(void) {
    return convert_at_random(true);
}

/*
 * Memory whose huge pages are broken up, frame by frame: one page becomes private in shared memory, one
 * shared in private memory, and one private in the shared half of a frame.
 */
#define BROKEN_SHARED (32 * MIB)
#define BROKEN_PRIVATE (64 * MIB)
#define BROKEN_HALF (96 * MIB)
#define BROKEN_SIZE (8 * FRAME)
#define BROKEN_PAGE (7 * PAGE)

static uint32_t break_frames(void) {
    convert(BROKEN_SHARED, BROKEN_SIZE, SHARED);
    for (uint32_t frame = 0; frame < BROKEN_SIZE; frame += FRAME) {
        convert(BROKEN_HALF + frame, FRAME / 2, SHARED);
    }
    fill(BROKEN_SHARED, BROKEN_SIZE, 1);
    fill(BROKEN_PRIVATE, BROKEN_SIZE, 1);
    fill(BROKEN_HALF, BROKEN_SIZE, 1);
    for (uint32_t frame = 0; frame < BROKEN_SIZE; frame += FRAME) {
        convert(BROKEN_SHARED + frame + BROKEN_PAGE, PAGE, PRIVATE);
        convert(BROKEN_PRIVATE + frame + BROKEN_PAGE, PAGE, SHARED);
        convert(BROKEN_HALF + frame + BROKEN_PAGE, PAGE, PRIVATE);
    }
    return 0;
}

/* What is new is empty, and all the rest as it was; then all of it is written. */
static void walk(uint32_t gpa) {
    for (uint32_t page = gpa; page < gpa + BROKEN_SIZE; page += PAGE) {
        expect_page(page, page % FRAME == BROKEN_PAGE ? 0 : mark(page, 1));
        fill_page(page, mark(page, 2));
    }
}

/* The driver counts the faults of this alone. */
static uint32_t walk_frames(void) {
    walk(BROKEN_SHARED);
    walk(BROKEN_PRIVATE);
    walk(BROKEN_HALF);
    return 0;
}

/* One conversion of memory in two blocks, there and back: nothing of the other side's content is seen on
 * either. */
static uint32_t span_border(void) {
    uint32_t size = 32 * PAGE, gpa = BORDER - size / 2;

    convert(BORDER - size / 2, size / 2, PRIVATE);
    convert(BORDER, size / 2, PRIVATE);
    fill(gpa, size, 1);
    convert(gpa, size, SHARED);
    expect_zero(gpa, size);
    fill(gpa, size, 2);
    convert(gpa, size, PRIVATE);
    expect_zero(gpa, size);
    fill(gpa, size, 3);
    convert(gpa, size, SHARED);
    expect_zero(gpa, size);
    return 0;
}

/* What is no memory is shared already, and cannot be private; who asks for both at once loses nothing. */
static uint32_t ask_beyond(void) {
    uint32_t size = 4 * PAGE, last = END - size;

    convert(IOAPIC, PAGE, SHARED);
    convert(VIRTIO, PAGE, SHARED);
    convert(HOLE, 16 * PAGE, SHARED);
    expect_refused(IOAPIC, 1);
    expect_refused(VIRTIO, 1);
    expect_refused(HOLE, 16);
    convert(last, 2 * size, SHARED);
    fill(last, size, 1);
    expect_refused(last, 8);
    expect_refused(last, 0xfffff - last / PAGE);
    expect_refused(0, 0xfffff);
    expect_filled(last, size, 1);
    return 0;
}

/* One page of each kind with something in it, for the host to look at. */
#define FOR_HOST (16 * MIB)

static uint32_t show_host(void) {
    convert(FOR_HOST, PAGE, SHARED);
    fill_page(FOR_HOST, 0x5a5a5a5a);
    fill_page(FOR_HOST + PAGE, 0xa5a5a5a5);
    return 0;
}

static const struct {
    const char *name;
    uint32_t (*run)(void);
} steps[] = {
    {"random", convert_in_blocks}, {"across", convert_across_border},
    {"break", break_frames},       {"walk", walk_frames},
    {"span", span_border},         {"beyond", ask_beyond},
    {"show", show_host},
};

void main(void);

void main(void) {
    char line[16];

    print("inner: booted\n");
    for (;;) {
        read_line(line, sizeof(line));
        for (uint32_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
            if (is_same(line, steps[i].name)) {
                uint32_t answer = steps[i].run();

                print("inner: ");
                print(line);
                print_number(answer);
                print("\n");
            }
        }
    }
}
