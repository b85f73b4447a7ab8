// The kernels compiled for avx512 with VNNI; CMakeLists.txt gives this file its flags.
#define DEJAVU_VNNI
#include "simd_avx512.h"
#include "kernels_impl.h"

const Kernels *avx512vnni_kernels() { return &TABLE; }
