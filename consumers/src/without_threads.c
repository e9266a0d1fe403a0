/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A program of one thread, built without -pthread, stays one: the library starts threads when it is asked for
 * them, and only then. It sees to that by standing where libc's pthread_create() would.
 */
#include "populate.h"
#include <pthread.h>

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *opaque) {
    (void)thread, (void)attributes, (void)start, (void)opaque;
    REQUIRE(!"no thread is started");
    return EAGAIN;
}

int main(void) {
    struct guest guest = guest_make();
    populate(&guest);
    return EXIT_SUCCESS;
}
