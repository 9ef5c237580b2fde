#include "vectors.h"

/* What the channels that a kernel takes are multiples of. */
size lanes(void) { return V; }
