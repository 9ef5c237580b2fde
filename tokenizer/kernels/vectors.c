#include "vectors.h"

/* What the channels that a kernel takes are multiples of. */
size lanes(void) { return V; }

/* Of what the kernels are called with, as `tokenizer/kernels/__init__.py` knows it; another one there is another here. */
size interface(void) { return 4; }
