// The kernels compiled for neon; CMakeLists.txt gives this file its flags.
#include "simd_neon.h"
#include "kernels_impl.h"

const Kernels *neon_kernels() { return &TABLE; }
