// The kernels compiled for avx512; CMakeLists.txt gives this file its flags.
#include "simd_avx512.h"
#include "kernels_impl.h"

const Kernels *avx512_kernels() { return &TABLE; }
