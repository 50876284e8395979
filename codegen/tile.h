// tile.h: what generated kernels stand on. C++17 for GCC and Clang; no library but the standard one.
//
// One file for each subject, each standing on those before it. What is written for one number is left to the compiler to
// vectorise: a select in place of a branch, every call inlined. What loops over rows is written in vectors. Nothing
// relies on -ffast-math, so NaN, infinities and signed zeros keep their IEEE meaning.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

// A function for itself: compilers take times as long over one that holds every block of a dot.
#define CASTILE_APART __attribute__((noinline))
#define CASTILE_INLINE inline __attribute__((always_inline))
#define CASTILE_INLINED __attribute__((always_inline))
#define CASTILE_SIMD _Pragma("omp simd")
#if defined(__clang__)
#define CASTILE_UNROLL _Pragma("unroll")
#else
#define CASTILE_UNROLL _Pragma("GCC unroll 16")
#endif

#include "tile_types.h"
#include "tile_vectors.h"
#include "tile_functions.h"
#include "tile_loops.h"
#include "tile_short.h"
#include "tile_matrix.h"
#include "tile_pack.h"
#include "tile_amx.h"
#include "tile_dot.h"
#include "tile_few.h"
#include "tile_made.h"
