/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A guest's memory, prepared before the guest runs. */
#include "populate.h"

int main(void) {
    struct guest guest;
    REQUIRE(kvmprep_version() == KVMPREP_VERSION);
    guest = guest_make();
    populate(&guest);
    return EXIT_SUCCESS;
}
