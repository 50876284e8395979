// tile.h: what generated kernels stand on. C++17 for GCC and Clang; no library but the standard one.
//
// Everything here is written for one scalar and left to the compiler to vectorise: no branch where a select does, no call
// that is not inlined. Nothing relies on -ffast-math, so NaN, infinities and signed zeros keep their IEEE meaning.
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

#if defined(__AVX512F__)
#include <immintrin.h>
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

namespace castile {
namespace {

// Element types ----------------------------------------------------------------------------------------------------

template <class To, class From>
CASTILE_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// A float format narrower than f32, held as its bits. FINITE: no infinity, all ones is NaN (OCP e4m3).
template <class Bits, int EXPONENT, int MANTISSA, bool FINITE>
struct Narrow {
  Bits raw;

  static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
  static constexpr uint32_t INFINITE = ((1u << EXPONENT) - 1) << MANTISSA;
  static constexpr uint32_t NOT_A_NUMBER = FINITE ? (1u << (EXPONENT + MANTISSA)) - 1 : INFINITE | (1u << (MANTISSA - 1));
  static constexpr uint32_t OVERFLOWN = FINITE ? NOT_A_NUMBER : INFINITE;

  static CASTILE_INLINE Narrow encode(float x) {
    constexpr int SHIFT = 23 - MANTISSA;
    const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu, sign = (u >> 31) << (EXPONENT + MANTISSA);
    // To nearest, ties to even: add just under half of the last kept bit, and that bit itself.
    uint32_t code = magnitude + (((1u << SHIFT) >> 1) - 1) + ((magnitude >> SHIFT) & 1);
    if constexpr (EXPONENT == 8) {
      code >>= SHIFT;
    } else {
      // An exponent below the format's least: adding this power of two leaves the count of quanta in the low bits.
      constexpr uint32_t ADDEND = uint32_t(127 + 1 - BIAS + SHIFT) << 23;
      const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + bits<float>(ADDEND)) - ADDEND;
      const uint32_t normal = (code - (uint32_t(127 - BIAS) << 23)) >> SHIFT;
      code = magnitude < (uint32_t(128 - BIAS) << 23) ? subnormal : normal;
      constexpr uint32_t LARGEST = FINITE ? NOT_A_NUMBER - 1 : INFINITE;
      const bool over = magnitude >= (uint32_t(127 + BIAS + 2) << 23) || code > LARGEST;
      code = over ? OVERFLOWN : code;
    }
    code = magnitude > 0x7f800000u ? NOT_A_NUMBER : code;
    return {Bits(sign | code)};
  }

  CASTILE_INLINE float decode() const {
    constexpr int SHIFT = 23 - MANTISSA;
    const uint32_t u = raw, sign = (u >> (EXPONENT + MANTISSA)) << 31, code = u & ((1u << (EXPONENT + MANTISSA)) - 1);
    if constexpr (EXPONENT == 8) return bits<float>(sign | code << SHIFT);
    constexpr uint32_t LEAST = uint32_t(128 - BIAS) << 23;  // the least normal number
    const uint32_t normal = (code << SHIFT) + (uint32_t(127 - BIAS) << 23);
    // Below it, the quanta go on top of that number's own and the number goes again: no subnormal f32 is met.
    const uint32_t subnormal = bits<uint32_t>(bits<float>((code << SHIFT) + LEAST) - bits<float>(LEAST));
    uint32_t value = code < (1u << MANTISSA) ? subnormal : normal;
    if constexpr (FINITE) {
      value = code == NOT_A_NUMBER ? 0x7fc00000u : value;
    } else {
      value = code >= INFINITE ? 0x7f800000u | (code << SHIFT) : value;
    }
    return bits<float>(sign | value);
  }
};

using f16 = Narrow<uint16_t, 5, 10, false>;
using bf16 = Narrow<uint16_t, 8, 7, false>;
using f8e4m3 = Narrow<uint8_t, 4, 3, true>;
using f8e5m2 = Narrow<uint8_t, 5, 2, false>;

template <class T>
constexpr bool is_narrow = false;
template <class Bits, int EXPONENT, int MANTISSA, bool FINITE>
constexpr bool is_narrow<Narrow<Bits, EXPONENT, MANTISSA, FINITE>> = true;

// f64 to f32 so that a second rounding to fewer bits is right: inexact results get an odd last bit.
CASTILE_INLINE float round_to_odd(double x) {
  const float y = float(x);
  const uint32_t u = bits<uint32_t>(y);
  const double back = double(y);
  const uint32_t nudged = std::fabs(back) < std::fabs(x) ? u + 1 : u - 1;
  return bits<float>(back != x && x == x && !(u & 1) ? nudged : u);
}

// The language's cast: to floats by rounding to nearest, to integers by saturating truncation (NaN gives 0), between
// integers modulo 2^bits, to bool by `!= 0`.
template <class To, class From>
CASTILE_INLINE To to(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (is_narrow<From>) {
    return to<To>(x.decode());
  } else if constexpr (std::is_same_v<To, bool>) {
    return x != 0;
  } else if constexpr (is_narrow<To>) {
    if constexpr (std::is_same_v<From, float>) return To::encode(x);
    else if constexpr (std::is_same_v<From, double>) return To::encode(round_to_odd(x));
    else return To::encode(round_to_odd(double(x)));  // an integer in f32 would be rounded twice
  } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    constexpr From LOWEST = From(std::numeric_limits<To>::min());
    constexpr From BEYOND = From(2) * From(std::numeric_limits<To>::max() / 2 + 1);  // 2^bits, exact
    const To inner = x == x ? To(x > LOWEST && x < BEYOND ? x : From(0)) : To(0);
    return x >= BEYOND ? std::numeric_limits<To>::max() : x <= LOWEST ? std::numeric_limits<To>::min() : inner;
  } else {
    return To(x);
  }
}

// Arithmetic -------------------------------------------------------------------------------------------------------

constexpr float inf = __builtin_inff();

template <class T>
CASTILE_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

template <class T>
CASTILE_INLINE T minimum(T a, T b) {  // NaN if either is
  if constexpr (std::is_floating_point_v<T>) return ((b < a) | (b != b)) ? b : a;
  else return b < a ? b : a;
}

template <class T>
CASTILE_INLINE T maximum(T a, T b) {  // NaN if either is
  if constexpr (std::is_floating_point_v<T>) return ((a < b) | (b != b)) ? b : a;
  else return a < b ? b : a;
}

template <class T>
CASTILE_INLINE T abs(T x) {
  if constexpr (std::is_floating_point_v<T>) return std::fabs(x);
  else if constexpr (std::is_signed_v<T>) return x < 0 ? -x : x;
  else return x;
}

template <class T>
CASTILE_INLINE bool is_finite(T x) {
  return to<float>(x) - to<float>(x) == 0.0f;
}

// Quotient rounded down and the remainder with the divisor's sign, as in Python. An integer divided by 0 gives 0, so that
// a select may evaluate what it does not choose.
template <class T>
CASTILE_INLINE T floormod(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const T r = std::fmod(a, b);
    return b == 0 ? r : r != 0 ? ((r < 0) != (b < 0) ? r + b : r) : std::copysign(T(0), b);
  } else if constexpr (std::is_signed_v<T>) {
    const T d = b == 0 || b == -1 ? T(1) : b, r = a % d;
    return r + (((r != 0) & ((r ^ d) < 0)) ? d : T(0));
  } else {
    return a % (b == 0 ? T(1) : b);
  }
}

template <class T>
CASTILE_INLINE T floordiv(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (b == 0) return a / b;
    const T r = std::fmod(a, b), q = (a - r) / b - T((r != 0) & ((r < 0) != (b < 0)));
    const T down = std::floor(q);
    return q == 0 ? std::copysign(T(0), a / b) : down + T(q - down > T(0.5));
  } else if constexpr (std::is_signed_v<T>) {
    const T d = b == 0 || b == -1 ? T(1) : b, q = a / d, r = a % d;
    return b == 0 ? T(0) : b == -1 ? -a : q - T((r != 0) & ((r ^ d) < 0));
  } else {
    return b == 0 ? T(0) : a / (b == 0 ? T(1) : b);
  }
}

// Shifts of any amount from 0 to 63: what leaves the type is gone, a negative number fills with ones.
template <class T>
CASTILE_INLINE T shift_left(T x, T n) {
  constexpr T LAST = T(sizeof(T) * 8 - 1);
  const T within = n > LAST || n < 0 ? LAST : n;
  return n > LAST ? T(0) : T(std::make_unsigned_t<T>(x) << within);
}

template <class T>
CASTILE_INLINE T shift_right(T x, T n) {
  constexpr T LAST = T(sizeof(T) * 8 - 1);
  const T within = n > LAST || n < 0 ? LAST : n;
  return std::is_unsigned_v<T> && n > LAST ? T(0) : T(x >> within);
}

template <int N, class T>
CASTILE_INLINE T power(T x) {
  if constexpr (N < 0) return T(1) / power<-N>(x);
  else if constexpr (N == 0) return T(1);
  else if constexpr (N == 1) return x;
  else if constexpr (N % 2 == 0) return power<N / 2>(x * x);
  else return x * power<N / 2>(x * x);
}

// Functions --------------------------------------------------------------------------------------------------------
// f32 by polynomials fitted to minimise the greatest relative error; f64 by the C library.

CASTILE_INLINE double exp(double x) { return std::exp(x); }
CASTILE_INLINE double exp2(double x) { return std::exp2(x); }
CASTILE_INLINE double expm1(double x) { return std::expm1(x); }
CASTILE_INLINE double log(double x) { return std::log(x); }
CASTILE_INLINE double log2(double x) { return std::log2(x); }
CASTILE_INLINE double log1p(double x) { return std::log1p(x); }
CASTILE_INLINE double tanh(double x) { return std::tanh(x); }
CASTILE_INLINE double erf(double x) { return std::erf(x); }
CASTILE_INLINE double sin(double x) { return std::sin(x); }
CASTILE_INLINE double cos(double x) { return std::cos(x); }
CASTILE_INLINE double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

template <class T>
CASTILE_INLINE T sqrt(T x) {
  return std::sqrt(x);
}
template <class T>
CASTILE_INLINE T rsqrt(T x) {
  return T(1) / std::sqrt(x);
}
template <class T>
CASTILE_INLINE T floor(T x) {
  if constexpr (std::is_floating_point_v<T>) return std::floor(x);
  else return x;
}
template <class T>
CASTILE_INLINE T rint(T x) {
  if constexpr (std::is_floating_point_v<T>) return std::rint(x);
  else return x;
}

// 2^n for -126 <= n <= 127, where n is an integer that was rounded by adding 1.5 * 2^23: its low bits are the integer.
constexpr float ROUNDER = 12582912.0f;
CASTILE_INLINE float power_of_two(float rounded) {
  return bits<float>((bits<uint32_t>(rounded) - bits<uint32_t>(ROUNDER) + 127u) << 23);
}

// x * 2^n for any n that exp meets: by two factors, so that overflow and subnormal results come out right.
CASTILE_INLINE float scale_by(float x, float n) {
  const float half = n * 0.5f + ROUNDER, other = (n - (half - ROUNDER)) + ROUNDER;
  return x * power_of_two(half) * power_of_two(other);
}

// exp(r) - 1 on [-0.35, 0.35].
CASTILE_INLINE float exp_minus_one_near_zero(float r) {
  const float p = (((0.0013951716f * r + 0.008369599f) * r + 0.041666187f) * r + 0.16666512f) * r + 0.5f;
  return r + r * r * p;
}

// exp(r) on [-0.35, 0.35]; the same steps as for vectors, so that equal values stay equal whichever way they are computed.
CASTILE_INLINE float exp_near_zero(float r) {
  const float p = (((0.0013951716f * r + 0.008369599f) * r + 0.041666187f) * r + 0.16666512f) * r + 0.5f;
  return (p * r + 1.0f) * r + 1.0f;
}

// ln 2 in two parts, the first so short that its product with an exponent is exact.
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, LOG2_E = 1.44269504f;

CASTILE_INLINE float exp(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;  // a NaN passes both
  const float n = (x * LOG2_E + ROUNDER) - ROUNDER;
  const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
  return scale_by(exp_near_zero(r), n);
}

CASTILE_INLINE float exp2(float x) {
  x = x > 129.0f ? 129.0f : x;
  x = x < -151.0f ? -151.0f : x;
  const float n = (x + ROUNDER) - ROUNDER;
  return scale_by(exp_near_zero((x - n) * 0.6931472f), n);
}

CASTILE_INLINE float expm1(float x) {
  x = x > 88.8f ? 88.8f : x;
  x = x < -20.0f ? -20.0f : x;
  const float n = (x * LOG2_E + ROUNDER) - ROUNDER;
  const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
  const float half = power_of_two((n - 1.0f) + ROUNDER);  // 2^128 is no f32
  return (half * exp_minus_one_near_zero(r) + (half - 0.5f)) * 2.0f;
}

// x = m 2^e with m in [sqrt 1/2, sqrt 2]; gives e and log(m) = f + tail.
struct Logarithm {
  float exponent, f, tail;
};

CASTILE_INLINE Logarithm logarithm(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const uint32_t u = bits<uint32_t>(subnormal ? x * 8388608.0f : x);
  const uint32_t shifted = u - 0x3f3504f3u;  // the bits of sqrt 1/2
  const float e = float(int32_t(shifted) >> 23) - (subnormal ? 23.0f : 0.0f);
  const float f = bits<float>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 0.06913567f;
  p = p * f - 0.117892504f;
  p = p * f + 0.11873426f;
  p = p * f - 0.123844616f;
  p = p * f + 0.14218616f;
  p = p * f - 0.16669244f;
  p = p * f + 0.20002228f;
  p = p * f - 0.24999987f;
  p = p * f + 0.3333331f;
  return {e, f, f * f * (f * p - 0.5f)};
}

CASTILE_INLINE float at_ends_of_log(float x, float y) {
  y = x == 0.0f ? -inf : y;
  y = x < 0.0f ? __builtin_nanf("") : y;
  return x < inf ? y : x;  // infinity and NaN are their own logarithms
}

CASTILE_INLINE float log(float x) {
  const Logarithm l = logarithm(x);
  return at_ends_of_log(x, l.exponent * LN2_HIGH + (l.f + (l.tail + l.exponent * LN2_LOW)));
}

CASTILE_INLINE float log2(float x) {
  const Logarithm l = logarithm(x);
  // log2(e) = 1 + 0.4427: f itself is kept whole, so nothing is lost near x = 1.
  constexpr float REST = 0.44269504f;
  return at_ends_of_log(x, l.exponent + (l.f + (l.tail + (l.f * REST + l.tail * REST))));
}

CASTILE_INLINE float log1p(float x) {
  const float u = 1.0f + x, rounded = u - 1.0f;
  // log(u) x / (u - 1) undoes the rounding of 1 + x (Kahan).
  const float y = log(u) * (x / rounded);
  return rounded == 0.0f ? x : x < inf ? y : x;
}

CASTILE_INLINE float tanh(float x) {
  const float e = expm1(-2.0f * std::fabs(x));
  return std::copysign(-e / (e + 2.0f), x);
}

// Where exp(-x) is infinite this is 0, as it is to within the least normal number.
CASTILE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

CASTILE_INLINE float erf(float x) {
  const float s = x * x, t = std::fabs(x) > 4.0f ? 4.0f : std::fabs(x);
  float near = 8.2652026e-05f;
  near = near * s - 0.00081200514f;
  near = near * s + 0.0051993257f;
  near = near * s - 0.026858896f;
  near = near * s + 0.11283693f;
  near = near * s - 0.37612635f;
  near = near * s + 0.12837917f;  // 2 / sqrt(pi) - 1
  float far = -2.1095055e-05f;  // log(1 - erf(t))
  far = far * t + 0.00043446265f;
  far = far * t - 0.004171063f;
  far = far * t + 0.025119428f;
  far = far * t - 0.10828009f;
  far = far * t - 0.6333469f;
  far = far * t - 1.1295149f;
  far = far * t + 0.0001746845f;
  const float tail = std::copysign(1.0f - exp(far), x);
  return std::fabs(x) > 0.92f ? tail : x + x * near;
}

// sin and cos of x by the octant: the reduction is done in f64, exact enough below LARGEST_ANGLE; beyond, by the C
// library. The product of n and the first part of pi / 2, which has 33 bits, is exact in a fused step or for n < 2^20.
#if defined(__FP_FAST_FMA)
constexpr float LARGEST_ANGLE = 1073741824.0f;
CASTILE_INLINE double less_product(double x, double n, double part) { return __builtin_fma(-n, part, x); }
#else
constexpr float LARGEST_ANGLE = 1048576.0f;
CASTILE_INLINE double less_product(double x, double n, double part) { return x - n * part; }
#endif

struct Angle {
  double r;
  int64_t quadrant;
};

CASTILE_INLINE Angle reduced(float x) {
  constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
  const double n = (double(x) * 0.63661977236758134 + ROUND) - ROUND;
  return {less_product(less_product(double(x), n, 1.5707963267341256), n, 6.0771005065061922e-11), int64_t(n)};
}

CASTILE_INLINE float sine_of(Angle a) {
  const double s = a.r * a.r;
  const double sine = a.r + a.r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880))));
  const double cosine = 1 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 - s * (1.0 / 3628800)))));
  const double y = a.quadrant & 1 ? cosine : sine;
  return float(a.quadrant & 2 ? -y : y);
}

CASTILE_INLINE float sin(float x) {
  if (!(std::fabs(x) < LARGEST_ANGLE)) return float(std::sin(double(x)));
  return sine_of(reduced(x));
}

CASTILE_INLINE float cos(float x) {
  if (!(std::fabs(x) < LARGEST_ANGLE)) return float(std::cos(double(x)));
  Angle a = reduced(x);
  a.quadrant += 1;
  return sine_of(a);
}

// Vectors ----------------------------------------------------------------------------------------------------------
// As many f32 as a register holds. A row of a tile is whole vectors long, so maps need no remainder; what lies past the
// count of a row is computed too and never used.

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float VectorInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));  // 0 or -1 in each lane
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t HalvesInMemory __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef Mask MaskInMemory __attribute__((aligned(4), may_alias));
typedef Words WordsInMemory __attribute__((aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t BytesInMemory __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytesInMemory __attribute__((vector_size(LANES), aligned(1), may_alias));

CASTILE_INLINE Vector splat(Vector x) { return x; }
CASTILE_INLINE Vector splat(float x) { return x - Vector{}; }
CASTILE_INLINE Mask mask_of(Mask m) { return m; }
CASTILE_INLINE Mask mask_of(bool b) { return Mask{} - int32_t(b); }

CASTILE_INLINE Vector load(const float* p) { return *reinterpret_cast<const VectorInMemory*>(p); }
CASTILE_INLINE Vector load(const bf16* p) {
  const Halves h = *reinterpret_cast<const HalvesInMemory*>(p);
  return (Vector)(__builtin_convertvector(h, Words) << 16);
}
CASTILE_INLINE Mask load(const int32_t* p) { return *reinterpret_cast<const MaskInMemory*>(p); }
CASTILE_INLINE Words load(const uint32_t* p) { return *reinterpret_cast<const WordsInMemory*>(p); }
CASTILE_INLINE Mask load(const uint8_t* p) {
  const Bytes b = *reinterpret_cast<const BytesInMemory*>(p);
  return __builtin_convertvector(b, Mask);
}
CASTILE_INLINE Mask load(const int8_t* p) {
  const SignedBytes b = *reinterpret_cast<const SignedBytesInMemory*>(p);
  return __builtin_convertvector(b, Mask);
}
CASTILE_INLINE void store(uint32_t* p, Words x) { *reinterpret_cast<WordsInMemory*>(p) = x; }
CASTILE_INLINE void store(float* p, Vector x) { *reinterpret_cast<VectorInMemory*>(p) = x; }
CASTILE_INLINE Halves narrowed(Vector x) {
#if defined(__AVX512BF16__)
  return bits<Halves>(_mm512_cvtneps_pbh((__m512)x));
#else
  const Words u = (Words)x;
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words code = x != x ? Words{} + 0x7fc0u : rounded;
  return __builtin_convertvector(code, Halves);
#endif
}
CASTILE_INLINE void store(bf16* p, Vector x) { *reinterpret_cast<HalvesInMemory*>(p) = narrowed(x); }
// The nearest bf16, as f32.
CASTILE_INLINE Vector rounded(Vector x) { return (Vector)(__builtin_convertvector(narrowed(x), Words) << 16); }

template <class T>
__attribute__((noinline, cold)) void store_some(T* p, int64_t stride, Vector x, int64_t n) {
  T lanes[LANES];
  store(lanes, x);
  for (int64_t l = 0; l < LANES && l < n; ++l) p[l * stride] = lanes[l];
}

// The first n lanes only, elements ``stride`` apart.
template <class T>
CASTILE_INLINE void store(T* p, int64_t stride, Vector x, int64_t n) {
  if (__builtin_expect(stride == 1 && n >= LANES, 1)) store(p, x);
  else store_some(p, stride, x, n);
}

// As `store`, but past the caches where that can be: for what nobody reads soon.
template <class T>
CASTILE_INLINE void stream(T* p, int64_t stride, Vector x, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1 && n >= LANES && bits<uintptr_t>(p) % 64 == 0) {
      _mm512_stream_ps(p, (__m512)x);
      return;
    }
  }
#endif
  store(p, stride, x, n);
}

// Waits until what was streamed is seen by all.
CASTILE_INLINE void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Asks for what will be read soon; any address will do.
CASTILE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

CASTILE_INLINE Mask lane_numbers() {
  Mask m;
  for (int l = 0; l < LANES; ++l) m[l] = l;
  return m;
}
// The lanes below n.
CASTILE_INLINE Mask lanes_below(int64_t n) {
  const int32_t within = int32_t(n < 0 ? 0 : n > LANES ? LANES : n);
  return lane_numbers() < within;
}

CASTILE_INLINE bool any(Mask m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#else
  int32_t found = 0;
  for (int l = 0; l < LANES; ++l) found |= m[l];
  return found != 0;
#endif
}

template <class T>
using Loaded = decltype(load(static_cast<const T*>(nullptr)));

template <class T>
__attribute__((noinline, cold)) Loaded<T> load_some(const T* p, int64_t stride, int64_t n) {
  T lanes[LANES] = {};
  for (int64_t l = 0; l < LANES && l < n; ++l) lanes[l] = p[l * stride];
  return load(lanes);
}

// The first n lanes only, elements ``stride`` apart; the others are 0.
template <class T>
CASTILE_INLINE Loaded<T> load(const T* p, int64_t stride, int64_t n) {
  return __builtin_expect(stride == 1 && n >= LANES, 1) ? load(p) : load_some(p, stride, n);
}

template <class T>
__attribute__((noinline, cold)) Loaded<T> load_some(const T* p, int64_t stride, int64_t n, Mask where) {
  T lanes[LANES] = {};
  for (int64_t l = 0; l < LANES && l < n; ++l) {
    if (where[l]) lanes[l] = p[l * stride];
  }
  return load(lanes);
}

// The first n lanes only, and of these only those of a mask; the others are 0, and nothing is read for them.
template <class T>
CASTILE_INLINE Loaded<T> load(const T* p, int64_t stride, int64_t n, Mask where) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    if (__builtin_expect(stride == 1, 1)) {
      const Mask m = where & lanes_below(n);
      return (Vector)_mm512_maskz_loadu_ps(_mm512_test_epi32_mask((__m512i)m, (__m512i)m), p);
    }
  }
#endif
  if (!any(where)) return Loaded<T>{};
  return any(~where) ? load_some(p, stride, n, where) : load(p, stride, n);
}
template <class T>
CASTILE_INLINE Loaded<T> load(const T* p, int64_t stride, int64_t n, bool where) {
  return where ? load(p, stride, n) : Loaded<T>{};
}

// x / d for one d in all lanes: a product where that loses nothing to the ends of the range.
CASTILE_INLINE Vector divide(Vector x, float d) {
  const float size = std::fabs(d), inverse = 1.0f / d;
  return size > 1e-37f && size < 1e37f ? x * inverse : x / d;
}

// Whole numbers in the lanes of words: what of a word they are, and their floats.
CASTILE_INLINE Words words(Mask x) { return (Words)x; }
CASTILE_INLINE Words words(Words x) { return x; }
CASTILE_INLINE Mask integers(Mask x) { return x; }
CASTILE_INLINE Mask integers(Words x) { return (Mask)x; }
CASTILE_INLINE Vector floats(Vector x) { return x; }
CASTILE_INLINE Vector floats(Mask x) { return __builtin_convertvector(x, Vector); }
CASTILE_INLINE Vector floats(Words x) { return __builtin_convertvector(x, Vector); }

// BITS bits of each word, from bit SHIFT on.
template <int SHIFT, int BITS>
struct Field {
  Words word;
  static constexpr uint32_t MASK = BITS < 32 ? (1u << BITS % 32) - 1 : ~0u;
};
template <int SHIFT, int BITS>
CASTILE_INLINE Vector floats(Field<SHIFT, BITS> x) {
  const Words value = x.word >> SHIFT & Field<SHIFT, BITS>::MASK;
  if constexpr (BITS < 32) return floats((Mask)value);
  else return floats(value);
}

// base, base + step, ...
CASTILE_INLINE Vector lanes_from(int64_t base, int64_t step) {
  Vector x;
  for (int l = 0; l < LANES; ++l) x[l] = float(base + l * step);
  return x;
}

template <class A, class B>
CASTILE_INLINE Vector choose(Mask m, A a, B b) {
  return m ? splat(a) : splat(b);
}
template <class A, class B>
CASTILE_INLINE Vector choose(bool c, A a, B b) {
  return c ? splat(a) : splat(b);
}

CASTILE_INLINE Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
  // vmaxps gives its second operand if either is NaN; where the first one is, it stays.
  return (Vector)_mm512_mask_max_ps((__m512)a, _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q), (__m512)a, (__m512)b);
#else
  return ((a < b) | (b != b)) ? b : a;
#endif
}
CASTILE_INLINE Vector minimum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_mask_min_ps((__m512)a, _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q), (__m512)a, (__m512)b);
#else
  return ((b < a) | (b != b)) ? b : a;
#endif
}
CASTILE_INLINE Vector abs(Vector x) { return (Vector)((Words)x & 0x7fffffffu); }
CASTILE_INLINE Vector sqrt(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)x);
#else
  for (int l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
CASTILE_INLINE Vector rsqrt(Vector x) { return 1.0f / sqrt(x); }

template <int N>
CASTILE_INLINE Vector power(Vector x) {
  if constexpr (N < 0) return 1.0f / power<-N>(x);
  else if constexpr (N == 0) return splat(1.0f);
  else if constexpr (N == 1) return x;
  else if constexpr (N % 2 == 0) return power<N / 2>(x * x);
  else return x * power<N / 2>(x * x);
}

// x * 2^n for an integral n, by one instruction or by two factors.
CASTILE_INLINE Vector scale_by(Vector x, Vector n) {
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const Vector half = n * 0.5f + ROUNDER, other = (n - (half - ROUNDER)) + ROUNDER;
  const Words zero = Words{} + bits<uint32_t>(ROUNDER) - 127u;
  return x * (Vector)(((Words)half - zero) << 23) * (Vector)(((Words)other - zero) << 23);
#endif
}

CASTILE_INLINE Vector exp_minus_one_near_zero(Vector r) {
  const Vector p = (((0.0013951716f * r + 0.008369599f) * r + 0.041666187f) * r + 0.16666512f) * r + 0.5f;
  return r + r * r * p;
}

CASTILE_INLINE Vector clamp(Vector x, float low, float high) {  // a NaN stays
#if defined(__AVX512F__)
  // Both give their second operand if either is NaN.
  return (Vector)_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), (__m512)x));
#endif
  x = x > high ? splat(high) : x;
  return x < low ? splat(low) : x;
}

// exp(r) on [-0.35, 0.35].
CASTILE_INLINE Vector exp_near_zero(Vector r) {
  const Vector p = (((0.0013951716f * r + 0.008369599f) * r + 0.041666187f) * r + 0.16666512f) * r + 0.5f;
  return (p * r + 1.0f) * r + 1.0f;
}

CASTILE_INLINE Vector exp(Vector x) {
  x = clamp(x, -104.0f, 89.0f);
  const Vector n = (x * LOG2_E + ROUNDER) - ROUNDER;
  const Vector r = (x - n * LN2_HIGH) - n * LN2_LOW;
  return scale_by(exp_near_zero(r), n);
}

// One of a row: by the steps of vectors, which have no branch to be foreseen.
CASTILE_INLINE float exp_alone(float x) { return exp(splat(x))[0]; }

CASTILE_INLINE Vector exp2(Vector x) {
  x = clamp(x, -151.0f, 129.0f);
  const Vector n = (x + ROUNDER) - ROUNDER;
  return scale_by(exp_near_zero((x - n) * 0.6931472f), n);
}

CASTILE_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp(-x)); }

CASTILE_INLINE Vector copysign(Vector size, Vector sign) {
  return (Vector)(((Words)size & 0x7fffffffu) | ((Words)sign & 0x80000000u));
}

CASTILE_INLINE Vector expm1(Vector x) {
  x = clamp(x, -20.0f, 88.8f);
  const Vector n = (x * LOG2_E + ROUNDER) - ROUNDER;
  const Vector r = (x - n * LN2_HIGH) - n * LN2_LOW;
  const Vector half = scale_by(splat(1.0f), n - 1.0f);
  return (half * exp_minus_one_near_zero(r) + (half - 0.5f)) * 2.0f;
}

CASTILE_INLINE Vector tanh(Vector x) {
  const Vector e = expm1(-2.0f * abs(x));
  return copysign(-e / (e + 2.0f), x);
}

CASTILE_INLINE Vector erf(Vector x) {
  const Vector s = x * x, t = abs(x) > 4.0f ? splat(4.0f) : abs(x);
  Vector near = splat(8.2652026e-05f);
  near = near * s - 0.00081200514f;
  near = near * s + 0.0051993257f;
  near = near * s - 0.026858896f;
  near = near * s + 0.11283693f;
  near = near * s - 0.37612635f;
  near = near * s + 0.12837917f;
  Vector far = splat(-2.1095055e-05f);
  far = far * t + 0.00043446265f;
  far = far * t - 0.004171063f;
  far = far * t + 0.025119428f;
  far = far * t - 0.10828009f;
  far = far * t - 0.6333469f;
  far = far * t - 1.1295149f;
  far = far * t + 0.0001746845f;
  const Vector tail = copysign(1.0f - exp(far), x);
  return abs(x) > 0.92f ? tail : x + x * near;
}

// sin and cos as for one value, half a vector at a time in f64.
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(VECTOR_BYTES)));
typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));

template <int QUARTER>
CASTILE_INLINE Half sine_of(Half x) {
  constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: the low bits of a sum with it are the rounded number
  const Doubles d = __builtin_convertvector(x, Doubles), sum = d * 0.63661977236758134 + ROUND, n = sum - ROUND;
  const Doubles r = (d - n * 1.5707963267341256) - n * 6.0771005065061922e-11, s = r * r;
  const Doubles sine = r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880))));
  const Doubles cosine = 1 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 - s * (1.0 / 3628800)))));
  const Longs quadrant = (Longs)sum + QUARTER;
  const Doubles y = (quadrant & 1) != 0 ? cosine : sine;
  return __builtin_convertvector((Doubles)((Longs)y ^ ((quadrant & 2) << 62)), Half);
}

template <int QUARTER>
CASTILE_INLINE Vector sines(Vector x) {
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (Half& h : halves) h = sine_of<QUARTER>(h);
  std::memcpy(&x, halves, sizeof x);
  return x;
}

template <int QUARTER>
__attribute__((noinline, cold)) Vector far_sines(Vector x) {
  for (int l = 0; l < LANES; ++l) x[l] = QUARTER ? cos(x[l]) : sin(x[l]);
  return x;
}

// One angle that is too large, infinite or no number sends all to the C library.
CASTILE_INLINE Vector sin(Vector x) {
  return __builtin_expect(any(~(abs(x) < LARGEST_ANGLE)), 0) ? far_sines<0>(x) : sines<0>(x);
}
CASTILE_INLINE Vector cos(Vector x) {
  return __builtin_expect(any(~(abs(x) < LARGEST_ANGLE)), 0) ? far_sines<1>(x) : sines<1>(x);
}

// Reductions -------------------------------------------------------------------------------------------------------

struct Sum {
  template <class T>
  static constexpr T identity = T(0);
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a + b;
  }
};

struct Prod {
  template <class T>
  static constexpr T identity = T(1);
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a * b;
  }
};

struct Max {
  template <class T>
  static constexpr T identity = std::is_floating_point_v<T> ? T(-inf) : std::numeric_limits<T>::min();
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return maximum(a, b);
  }
};

struct Min {
  template <class T>
  static constexpr T identity = std::is_floating_point_v<T> ? T(inf) : std::numeric_limits<T>::max();
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return minimum(a, b);
  }
};

struct Any {
  template <class T>
  static constexpr T identity = false;
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a | b;
  }
};

struct All {
  template <class T>
  static constexpr T identity = true;
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a & b;
  }
};

// start joined with element(0) ... element(n - 1), in independent lanes: a single accumulator would wait for itself.
template <class Op, class T, class F>
CASTILE_INLINE T fold(int64_t n, T start, F element) {
  constexpr int VECTOR = 64 / sizeof(T), ALL = 4 * VECTOR;
  int64_t i = 0;
  if (n >= VECTOR) {
    T lanes[ALL];
    for (int l = 0; l < ALL; ++l) lanes[l] = Op::template identity<T>;
    for (; i + ALL <= n; i += ALL) {
      CASTILE_SIMD
      for (int l = 0; l < ALL; ++l) lanes[l] = Op::template join<T>(lanes[l], element(i + l));
    }
    for (; i + VECTOR <= n; i += VECTOR) {
      CASTILE_SIMD
      for (int l = 0; l < VECTOR; ++l) lanes[l] = Op::template join<T>(lanes[l], element(i + l));
    }
    CASTILE_UNROLL
    for (int half = ALL / 2; half; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] = Op::template join<T>(lanes[l], lanes[l + half]);
    }
    start = Op::template join<T>(start, lanes[0]);
  }
  for (; i < n; ++i) start = Op::template join<T>(start, element(i));
  return start;
}

// start joined with the n elements that element(0), element(LANES), ... hold, a vector each.
template <class Op, class F>
CASTILE_INLINE float fold_vectors(int64_t n, float start, F element) {
  const Vector nothing = splat(Op::template identity<float>);
  Vector sum[4] = {nothing, nothing, nothing, nothing};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    CASTILE_UNROLL
    for (int v = 0; v < 4; ++v) sum[v] = Op::join(sum[v], element(i + v * LANES));
  }
  for (; i + LANES <= n; i += LANES) sum[0] = Op::join(sum[0], element(i));
  if (i < n) sum[1] = Op::join(sum[1], choose(lanes_below(n - i), element(i), nothing));
  const Vector all = Op::join(Op::join(sum[0], sum[1]), Op::join(sum[2], sum[3]));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Op, Sum>) return start + _mm512_reduce_add_ps((__m512)all);
  if constexpr (std::is_same_v<Op, Max> || std::is_same_v<Op, Min>) {
    // Which is greater nobody foresees, so that no branch may hang on it; a NaN is told apart before.
    const __m512 both = (__m512)Op::join(all, splat(start));
    if (__builtin_expect(_mm512_cmp_ps_mask(both, both, _CMP_UNORD_Q) != 0, 0)) return __builtin_nanf("");
    return std::is_same_v<Op, Max> ? _mm512_reduce_max_ps(both) : _mm512_reduce_min_ps(both);
  }
#endif
  float lanes[LANES];
  store(lanes, all);
  CASTILE_UNROLL
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = Op::join(lanes[l], lanes[l + half]);
  }
  return Op::join(start, lanes[0]);
}

// Where the greatest element(0) ... element(n - 1) first stands; the first NaN is greater than all.
template <class F>
CASTILE_INLINE int64_t fold_argmax(int64_t n, F element) {
  if (n <= 0) return 0;
  int64_t best = 0;
  auto top = element(0);
  for (int64_t i = 1; i < n; ++i) {
    const auto x = element(i);
    if (x > top || (x != x && top == top)) top = x, best = i;
  }
  return best;
}

// Memory and loops -------------------------------------------------------------------------------------------------

CASTILE_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
CASTILE_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
CASTILE_INLINE int64_t tiles(int64_t extent, int64_t size) { return extent <= 0 ? 0 : (extent + size - 1) / size; }

// Calls body(stride), with a stride of 1 known when the loop is compiled: only then does it load whole vectors.
template <class F>
CASTILE_INLINE void with_stride(int64_t stride, F body) {
  if (stride == 1) body(std::integral_constant<int64_t, 1>());
  else body(stride);
}

// An index that came from data: kept inside the axis, and told about.
CASTILE_INLINE int64_t inside(int64_t index, int64_t size, bool& outside) {
  outside |= uint64_t(index) >= uint64_t(size);
  return at_least(0, at_most(index, size - 1));
}

// This thread's memory for tiles, aligned to a cache line; it is kept from call to call.
struct Workspace {
  char* memory = nullptr;
  size_t size = 0;
  ~Workspace() { std::free(memory); }
  char* of(size_t wanted) {
    if (wanted > size) {
      std::free(memory);
      size = (wanted + 4095) / 4096 * 4096;
      memory = static_cast<char*>(std::aligned_alloc(4096, size));
      if (memory == nullptr) std::abort();
    }
    return memory;
  }
};

inline char* workspace(size_t wanted) {
  static thread_local Workspace own;
  return own.of(wanted);
}

// What a thread is to do. Any thread may take of it, its owner first.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t last;
};

// body(first) ... body(last - 1), shared out among threads; on one where that is asked for, so that no thread is started
// after a fork. A thread gets one stretch, the same from kernel to kernel, so that it mostly reads what it wrote itself
// and has in its own cache; it takes portions of that, and then helps the others.
template <class F>
inline void parallel_for(int64_t first, int64_t last, int64_t threads, F body) {
  threads = at_most(threads, last - first);
  if (threads <= 1) {
    for (int64_t point = first; point < last; ++point) body(point);
    fence();
    return;
  }
  constexpr int64_t MOST = 64;
  const int64_t count = at_most(threads, MOST), portion = at_least(1, (last - first) / (threads * 32));
  Share shares[MOST];
  for (int64_t t = 0; t < count; ++t) {
    shares[t].next.store(first + (last - first) * t / count, std::memory_order_relaxed);
    shares[t].last = first + (last - first) * (t + 1) / count;
  }
  const auto work = [&](int64_t own) {
    for (int64_t t = 0; t < count; ++t) {
      Share& share = shares[(own + t) % count];
      int64_t from;
      while ((from = share.next.fetch_add(portion, std::memory_order_relaxed)) < share.last)
        for (int64_t point = from; point < at_most(share.last, from + portion); ++point) body(point);
    }
    fence();
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (auto& other : others) other.join();
#endif
}

// How many threads an amount of work is worth: waking one costs as much as some ten thousand operations.
CASTILE_INLINE int64_t worth(int64_t threads, double work) {
  return work < 20000.0 ? 1 : at_most(threads, 1 + int64_t(work / 20000.0));
}

// Dot --------------------------------------------------------------------------------------------------------------

// Accumulators, a row of B and one broadcast of A must fit the register file: 6 x 4 + 4 + 1 of 32, or 6 x 2 + 2 + 1 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL_VECTORS = 4;
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int BLOCK_ROWS = 6;
constexpr int PANEL = PANEL_VECTORS * LANES;

// A matrix by its strides: element (i, j) lies at data[i * row + j * column].
template <class T>
struct Matrix {
  T* data;
  int64_t row, column;
};

// Operands as the micro-kernel reads them: pairs of bf16 along k, a word each, where the machine multiplies such; else f32.
#if defined(__AVX512BF16__)
template <class Operand>
constexpr bool PAIRS = std::is_same_v<Operand, bf16>;
#else
template <class Operand>
constexpr bool PAIRS = false;
#endif

template <class Operand>
using Unit = std::conditional_t<PAIRS<Operand>, uint32_t, float>;

// Units along k.
template <class Operand>
constexpr int64_t depth(int64_t k) {
  return PAIRS<Operand> ? (k + 1) / 2 : k;
}

CASTILE_INLINE void multiply_add(Vector& sum, float x, const float* b) { sum += x * load(b); }
#if defined(__AVX512BF16__)
CASTILE_INLINE void multiply_add(Vector& sum, uint32_t x, const uint32_t* b) {
  const __m512i pairs = _mm512_loadu_si512(b);
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)pairs);
}
#endif

// Where a dot puts its sums: into a matrix, over what is there or onto it. ``from`` is a place in row i, from column j on:
// its ``whole`` puts LANES neighbours so many columns further, its ``next`` goes to the row below. ``some`` puts the first
// ``left`` of LANES neighbours.
struct Into {
  Matrix<float> c;
  bool accumulate;

  struct Place {
    float* at;
    int64_t row;
    bool accumulate;

    CASTILE_INLINE void whole(int64_t j, Vector x) const { store(at + j, accumulate ? load(at + j) + x : x); }
    CASTILE_INLINE void next() {
      at += row;
      // Step by step: with all addresses at hand before the sums are, there are too few registers for them.
      asm("" : "+r"(at));
    }
  };
  CASTILE_INLINE Place from(int64_t i, int64_t j) const { return {c.data + i * c.row + j, c.row, accumulate}; }
  CASTILE_INLINE void some(int64_t i, int64_t j, Vector x, int64_t left) const {
    float* const at = c.data + i * c.row + j;
    float edge[LANES];
    store(edge, x);
    for (int64_t l = 0; l < left && l < LANES; ++l) at[l] = accumulate ? at[l] + edge[l] : edge[l];
  }
};

// Sums that go from registers into a function of row, column and value; rows of tiles have room for whole vectors.
template <class F>
struct Through {
  F take;

  struct Place {
    const F& take;
    int64_t i, j;

    CASTILE_INLINE void whole(int64_t further, Vector x) const { take(i, j + further, x); }
    CASTILE_INLINE void next() { ++i; }
  };
  CASTILE_INLINE Place from(int64_t i, int64_t j) const { return {take, i, j}; }
  CASTILE_INLINE void some(int64_t i, int64_t j, Vector x, int64_t left) const {
    if (left > 0) take(i, j, x);
  }
};
template <class F>
CASTILE_INLINE Through<F> through(F take) {
  return {take};
}

// ROWS x (VECTORS * LANES) sums from (i, j) on, held in registers over the whole of k. Matrices come as their members: what
// is copied as a whole has to wait for its parts to be stored, and these for the sums of the block before.
template <int ROWS, int VECTORS, class Put, class U>
CASTILE_APART void dot_block(const Put& put, int64_t i0, int64_t j0, const U* a, int64_t a_row, int64_t a_column,
                             const U* b, int64_t b_row, int64_t k_n) {
  Vector sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < k_n; ++k) {
    CASTILE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const U x = a[i * a_row + k * a_column];
      CASTILE_UNROLL
      for (int v = 0; v < VECTORS; ++v) multiply_add(sum[i][v], x, b + k * b_row + v * LANES);
    }
  }
  auto place = put.from(i0, j0);
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) place.whole(v * LANES, sum[i][v]);
    place.next();
  }
}

template <int VECTORS, class Put, class U>
CASTILE_INLINE void dot_rows(const Put& put, int64_t i, int64_t j, int64_t rows, const U* a, int64_t a_row,
                             int64_t a_column, const U* b, int64_t b_row, int64_t k) {
  switch (rows) {
    case 1: dot_block<1, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, k); break;
    case 2: dot_block<2, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, k); break;
    case 3: dot_block<3, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, k); break;
    case 4: dot_block<4, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, k); break;
    case 5: dot_block<5, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, k); break;
    default: dot_block<6, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, k); break;
  }
}

// All rows of one panel of columns, of which ``width`` exist. The rows are split evenly: 16 are 6 + 5 + 5, as a block
// of few rows waits for loads.
template <int VECTORS, class Put, class U>
inline void dot_panel(const Put& put, int64_t j, const U* a, int64_t a_row, int64_t a_column, const U* b, int64_t b_row,
                      int64_t width, int64_t m, int64_t k) {
  constexpr int64_t COLUMNS = VECTORS * LANES;
  // Only whole blocks go from registers into a function: those at an edge go by way of memory, as each block that is made
  // for a function takes the compiler as long as the rest of a kernel.
  constexpr bool to_memory = std::is_same_v<Put, Into>;
  int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t i = 0; i < m; --blocks) {
    const int64_t rows = (m - i + blocks - 1) / blocks;
    const U* const ai = a + i * a_row;
    if (width == COLUMNS && (to_memory || (VECTORS == PANEL_VECTORS && rows == BLOCK_ROWS))) {
      if constexpr (to_memory) dot_rows<VECTORS>(put, i, j, rows, ai, a_row, a_column, b, b_row, k);
      else dot_block<BLOCK_ROWS, PANEL_VECTORS>(put, i, j, ai, a_row, a_column, b, b_row, k);
    } else {
      float edge[BLOCK_ROWS * COLUMNS];
      dot_rows<VECTORS>(Into{{edge, COLUMNS, 1}, false}, 0, 0, rows, ai, a_row, a_column, b, b_row, k);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; c += LANES) put.some(i + r, j + c, load(&edge[r * COLUMNS + c]), width - c);
      }
    }
    i += rows;
  }
}

// ``width`` columns from j on; b points at their panel.
template <class Put, class U>
inline void dot_columns(const Put& put, int64_t j, Matrix<const U> a, const U* b, int64_t b_row, int64_t width,
                        int64_t m, int64_t k) {
  if (width <= LANES) dot_panel<1>(put, j, a.data, a.row, a.column, b, b_row, width, m, k);
  else dot_panel<PANEL_VECTORS>(put, j, a.data, a.row, a.column, b, b_row, width, m, k);
}

template <class Operand, class T>
CASTILE_INLINE uint32_t pair(T low, T high) {
  return uint32_t(to<Operand>(low).raw) | uint32_t(to<Operand>(high).raw) << 16;
}

#if defined(__AVX512F__)
// into[j * PANEL + i] = from[i * row + j] for 16 x 16 words.
inline void transpose(const void* from, int64_t row_bytes, uint32_t* into) {
  __m512i a[16], b[16];
  CASTILE_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * row_bytes);
  CASTILE_UNROLL
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  CASTILE_UNROLL
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  CASTILE_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  CASTILE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int j = (i & 3) + (i & 4 ? 4 : 0);
    _mm512_storeu_si512(into + j * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(into + (j + 8) * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}
#endif

#if defined(__AVX512BF16__)
// 2 * LANES neighbours of two rows as pairs: those of the first LANES columns, and of the others.
struct Beside {
  __m512i left, right;
};
struct BesideOrder {
  uint16_t lane[2][2 * LANES];
  constexpr BesideOrder() : lane() {
    for (int i = 0; i < 2 * LANES; ++i) {
      lane[i / LANES][i % LANES * 2] = uint16_t(i);
      lane[i / LANES][i % LANES * 2 + 1] = uint16_t(2 * LANES + i);
    }
  }
};
CASTILE_INLINE Beside beside(const bf16* low, const bf16* high) {
  static constexpr BesideOrder ORDER;
  const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
  return {_mm512_permutex2var_epi16(a, _mm512_loadu_si512(ORDER.lane[0]), b),
          _mm512_permutex2var_epi16(a, _mm512_loadu_si512(ORDER.lane[1]), b)};
}
#endif

// Rows of B that are asked for ahead of those that are packed: a panel has a few lines of each, which nobody foresees.
constexpr int64_t PACK_AHEAD = 16;

// One panel of B: ``width`` columns, the rest of PANEL filled with zeros.
template <class Operand, class B>
inline void pack_panel(Matrix<const B> b, int64_t k, int64_t width, Unit<Operand>* panel) {
  constexpr bool AS_IT_IS = std::is_same_v<Operand, B>;
  int64_t done = 0;  // units along k
#if defined(__AVX512F__)
  // Columns that lie along k: their words go by squares of 16.
  if constexpr (AS_IT_IS && (PAIRS<Operand> || sizeof(B) == 4)) {
    if (b.row == 1 && width % 16 == 0) {
      constexpr int64_t PER_WORD = 4 / sizeof(B);
      for (; done + 16 <= k / PER_WORD; done += 16) {
        for (int64_t q = 0; q < width; q += 16) {
          transpose(b.data + done * PER_WORD + q * b.column, b.column * int64_t(sizeof(B)),
                    reinterpret_cast<uint32_t*>(panel) + done * PANEL + q);
        }
      }
    }
  }
#endif
#if defined(__AVX512BF16__)
  if constexpr (AS_IT_IS && PAIRS<Operand>) {
    if (b.column == 1 && width == PANEL) {
      for (; done < k / 2; ++done) {
        const B* const low = b.data + 2 * done * b.row;
        CASTILE_UNROLL
        for (int64_t q = 0; q < PANEL; q += 2 * LANES) {
          prefetch(low + PACK_AHEAD * b.row + q), prefetch(low + (PACK_AHEAD + 1) * b.row + q);
          const Beside both = beside(low + q, low + b.row + q);
          _mm512_storeu_si512(panel + done * PANEL + q, both.left);
          _mm512_storeu_si512(panel + done * PANEL + q + LANES, both.right);
        }
      }
    }
  }
#endif
  for (int64_t p = done; p < depth<Operand>(k); ++p) {
    Unit<Operand>* const into = panel + p * PANEL;
    with_stride(b.column, [&](auto step) {
      if constexpr (PAIRS<Operand>) {
        const B* const low = b.data + 2 * p * b.row;
        if (2 * p + 1 < k) {
          const B* const high = low + b.row;
          CASTILE_SIMD
          for (int64_t q = 0; q < width; ++q) into[q] = pair<Operand>(low[q * step], high[q * step]);
        } else {
          for (int64_t q = 0; q < width; ++q) into[q] = to<Operand>(low[q * step]).raw;
        }
      } else {
        const B* const from = b.data + p * b.row;
        CASTILE_SIMD
        for (int64_t q = 0; q < width; ++q) into[q] = to<float>(to<Operand>(from[q * step]));
      }
    });
    for (int64_t q = width; q < PANEL; ++q) into[q] = 0;
  }
  (void)AS_IT_IS;
}

// B[k, n] as panels, one after another.
template <class Operand, class B>
inline void pack(Matrix<const B> b, int64_t k, int64_t n, void* panels) {
  for (int64_t j = 0; j < n; j += PANEL) {
    Unit<Operand>* const panel = static_cast<Unit<Operand>*>(panels) + j * depth<Operand>(k);
    pack_panel<Operand, B>({b.data + j * b.column, b.row, b.column}, k, at_most(PANEL, n - j), panel);
  }
}

// A as the micro-kernel reads it: where it lies if that will do, else copied.
template <class Operand, class A>
inline Matrix<const Unit<Operand>> rows_of(Matrix<const A> a, int64_t m, int64_t k, float* copy) {
  if constexpr (std::is_same_v<A, float> && std::is_same_v<Operand, float>) {
    (void)m, (void)k, (void)copy;
    return a;
  } else if constexpr (PAIRS<Operand>) {
    if (std::is_same_v<A, Operand> && a.column == 1 && a.row % 2 == 0 && k % 2 == 0) {
      return {reinterpret_cast<const uint32_t*>(a.data), a.row / 2, 1};
    }
    const int64_t n = depth<Operand>(k);
    uint32_t* const into = reinterpret_cast<uint32_t*>(copy);
    for (int64_t i = 0; i < m; ++i) {
      const A* const from = a.data + i * a.row;
      for (int64_t p = 0; p < k / 2; ++p) {
        into[i * n + p] = pair<Operand>(from[2 * p * a.column], from[(2 * p + 1) * a.column]);
      }
      if (k % 2) into[i * n + n - 1] = to<Operand>(from[(k - 1) * a.column]).raw;
    }
    return {into, n, 1};
  } else {
    for (int64_t i = 0; i < m; ++i) {
      with_stride(a.column, [&](auto step) {
        CASTILE_SIMD
        for (int64_t j = 0; j < k; ++j) copy[i * k + j] = to<float>(to<Operand>(a.data[i * a.row + j * step]));
      });
    }
    return {copy, k, 1};
  }
}

// What `pack` made of k rows of B, from its first column on or from others.
template <class Operand>
struct Panels {
  const Unit<Operand>* data;
  int64_t height;  // units along k

  CASTILE_INLINE Panels(const void* packed, int64_t k)
      : data(static_cast<const Unit<Operand>*>(packed)), height(depth<Operand>(k)) {}

  // From a column on, a multiple of PANEL, or from a row on, an even one.
  CASTILE_INLINE Panels from_column(int64_t j) const { return {data + j * height, height}; }
  CASTILE_INLINE Panels from_row(int64_t p) const { return {data + depth<Operand>(p) * PANEL, height}; }

 private:
  CASTILE_INLINE Panels(const Unit<Operand>* from, int64_t high) : data(from), height(high) {}
};

// Of n columns, those in whole panels before some; and the others in whole vectors up to some.
CASTILE_INLINE int64_t panels_before(int64_t first, int64_t n) {
  return at_least(0, at_most(first, n)) / PANEL * PANEL;
}
CASTILE_INLINE int64_t vectors_to(int64_t last, int64_t n) {
  return at_least(0, at_most((last + LANES - 1) / LANES * LANES, n));
}

// Where in n numbers those lie, to a vector's length, that are between the least and the greatest of m others.
struct Span {
  int64_t first, last;
};
template <class T>
inline Span between(const T* others, int64_t m, const T* numbers, int64_t n) {
  T least = others[0], greatest = others[0];
  for (int64_t i = 1; i < m; ++i) least = minimum(least, others[i]), greatest = maximum(greatest, others[i]);
  const auto any = [&](int64_t from, int64_t last) {
    bool found = false;
    for (int64_t i = from; i < last; ++i) found |= (numbers[i] >= least) & (numbers[i] <= greatest);
    return found;
  };
  Span span = {0, n};
  while (span.first + LANES <= n && !any(span.first, span.first + LANES)) span.first += LANES;
  while (span.last - LANES >= span.first && !any(span.last - LANES, span.last)) span.last -= LANES;
  return span;
}

// A[m, k] B[k, n] in f32, operands rounded to Operand first, B packed. ``local`` holds m * k floats.
template <class Operand, class A, class Put>
inline void dot_packed(Put put, Matrix<const A> a, Panels<Operand> b, int64_t m, int64_t n, int64_t k, float* local) {
  using U = Unit<Operand>;
  const Matrix<const U> rows = rows_of<Operand, A>(a, m, k, local);
  for (int64_t j = 0; j < n; j += PANEL) {
    const U* const panel = b.data + j * b.height;
    dot_columns(put, j, rows, panel, PANEL, at_most(PANEL, n - j), m, depth<Operand>(k));
  }
}
template <class Operand, class A, class Put>
inline void dot_packed(Put put, Matrix<const A> a, const void* panels, int64_t m, int64_t n, int64_t k, float* local) {
  dot_packed<Operand, A>(put, a, Panels<Operand>(panels, k), m, n, k, local);
}

// With so few rows (fewer where its rows lie along n), B is read where it lies: packing it would cost more than it saves.
constexpr int64_t FEW_ROWS = 8;
constexpr int FEW_BLOCK = 4;
template <class B>
constexpr int64_t FEW_ACROSS = PAIRS<B> ? FEW_ROWS : FEW_BLOCK;

template <class Operand, class B>
constexpr bool READS_AS_IT_IS = std::is_same_v<B, Operand> && (std::is_same_v<B, float> || std::is_same_v<B, bf16>);

CASTILE_INLINE float sum_of(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[LANES];
  store(lanes, x);
  CASTILE_UNROLL
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
#endif
}
#if defined(__AVX512BF16__)
// Adds the products of as many neighbours as a vector of bf16 holds.
CASTILE_INLINE void add_products(Vector& sum, const bf16* x, const bf16* y) {
  const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// The sums of four vectors.
#if defined(__AVX512F__)
CASTILE_INLINE __m128 sums_of(const Vector* x) {
  const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// A few rows of A, each along k: bf16 where the machine multiplies B in pairs, else floats.
template <class B>
using FewUnit = std::conditional_t<PAIRS<B>, B, float>;

template <class U>
struct FewRows {
  const U* data;
  int64_t row;

  CASTILE_INLINE FewRows from(int64_t i, int64_t p) const { return {data + i * row + p, row}; }
  CASTILE_INLINE float at(int64_t i, int64_t p) const { return to<float>(data[i * row + p]); }
};

// Those of A rounded to Operand: where they lie if that will do, else copied.
template <class Operand, class U, class A>
inline FewRows<U> few_rows(Matrix<const A> a, int64_t m, int64_t k, float* copy) {
  if constexpr (std::is_same_v<A, U> && std::is_same_v<A, Operand>) {
    if (a.column == 1) return {a.data, a.row};
  }
  U* const into = reinterpret_cast<U*>(copy);
  for (int64_t i = 0; i < m; ++i) {
    CASTILE_SIMD
    for (int64_t p = 0; p < k; ++p) into[i * k + p] = to<U>(to<Operand>(a.data[i * a.row + p * a.column]));
  }
  return {into, k};
}

// COLUMNS columns of B that lie along k, times ROWS rows of A.
template <int ROWS, int COLUMNS, class B>
CASTILE_INLINE void dot_columns_along(float* c, int64_t c_row, FewRows<FewUnit<B>> a, const B* b, int64_t b_column,
                                      int64_t k, bool accumulate, int64_t ahead) {
  Vector sum[ROWS][COLUMNS] = {};
  int64_t p = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<B, bf16>) {
    for (; p + 2 * LANES <= k; p += 2 * LANES) {
      CASTILE_UNROLL
      for (int j = 0; j < COLUMNS; ++j) {
        if (ahead) prefetch(b + j * b_column + p + ahead);
        CASTILE_UNROLL
        for (int i = 0; i < ROWS; ++i) add_products(sum[i][j], a.data + i * a.row + p, b + j * b_column + p);
      }
    }
  }
#endif
  for (; p + LANES <= k; p += LANES) {
    CASTILE_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      if (ahead) prefetch(b + j * b_column + p + ahead);
      const Vector x = load(b + j * b_column + p);
      CASTILE_UNROLL
      for (int i = 0; i < ROWS; ++i) sum[i][j] += load(a.data + i * a.row + p) * x;
    }
  }
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    float total[COLUMNS];
#if defined(__AVX512F__)
    if constexpr (COLUMNS == 4) {
      _mm_storeu_ps(total, sums_of(sum[i]));
    } else
#endif
    {
      for (int j = 0; j < COLUMNS; ++j) total[j] = sum_of(sum[i][j]);
    }
    float* const at = c + i * c_row;
    CASTILE_UNROLL
    for (int j = 0; j < COLUMNS; ++j) at[j] = accumulate ? at[j] + total[j] : total[j];
  }
  for (; p < k; ++p) {
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < COLUMNS; ++j) c[i * c_row + j] += a.at(i, p) * to<float>(b[j * b_column + p]);
    }
  }
}

// A few rows of C where the columns of B lie along k.
template <int ROWS, class B>
inline void dot_along(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t n, int64_t k, bool accumulate,
                      int64_t ahead) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    dot_columns_along<ROWS, 4>(c.data + j, c.row, a, b.data + j * b.column, b.column, k, accumulate, ahead);
  }
  for (; j < n; ++j) {
    dot_columns_along<ROWS, 1>(c.data + j, c.row, a, b.data + j * b.column, b.column, k, accumulate, ahead);
  }
}

// STEPS rows of B, which lie along n, are added to a few rows of C, which stay near.
template <int ROWS, int STEPS, class B>
inline void add_rows(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t n) {
  for (int64_t j = 0; j < n; j += LANES) {
    const bool whole = n - j >= LANES;
    Vector x[STEPS];
    CASTILE_UNROLL
    for (int p = 0; p < STEPS; ++p) {
      const B* const from = b.data + p * b.row + j;
      x[p] = whole ? load(from) : load(from, 1, n - j);
    }
    CASTILE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      float* const at = c.data + i * c.row + j;
      Vector sum = whole ? load(at) : load(at, 1, n - j);
      CASTILE_UNROLL
      for (int p = 0; p < STEPS; ++p) sum += a.at(i, p) * x[p];
      if (whole) store(at, sum);
      else store(at, 1, sum, n - j);
    }
  }
}

#if defined(__AVX512BF16__)
// As `add_rows`, by pairs of rows that are brought side by side; n is a multiple of 2 * LANES.
template <int ROWS, int STEPS>
inline void add_pairs(Matrix<float> c, FewRows<bf16> a, Matrix<const bf16> b, int64_t n, int64_t ahead) {
  for (int64_t j = 0; j < n; j += 2 * LANES) {
    Beside x[STEPS / 2];
    CASTILE_UNROLL
    for (int p = 0; p < STEPS; p += 2) {
      const bf16* const low = b.data + p * b.row + j;
      const bf16* const high = low + b.row;
      if (ahead) prefetch(low + ahead), prefetch(high + ahead);
      x[p / 2] = beside(low, high);
    }
    CASTILE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      float* const at = c.data + i * c.row + j;
      __m512 sum = _mm512_loadu_ps(at), next = _mm512_loadu_ps(at + LANES);
      CASTILE_UNROLL
      for (int p = 0; p < STEPS; p += 2) {
        int32_t both;
        std::memcpy(&both, a.data + i * a.row + p, 4);
        const __m512bh y = (__m512bh)_mm512_set1_epi32(both);
        sum = _mm512_dpbf16_ps(sum, y, (__m512bh)x[p / 2].left);
        next = _mm512_dpbf16_ps(next, y, (__m512bh)x[p / 2].right);
      }
      _mm512_storeu_ps(at, sum);
      _mm512_storeu_ps(at + LANES, next);
    }
  }
}
#endif

// At most FEW_STEPS rows of B, which lie along n, are added to a few rows of C.
constexpr int FEW_STEPS = 8;
template <int ROWS, class B>
inline void add_across(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t n, int64_t k,
                       int64_t ahead) {
  int64_t p = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<B, bf16>) {
    const int64_t whole = n / (2 * LANES) * (2 * LANES);
    if (k == FEW_STEPS && whole > 0) {
      add_pairs<ROWS, FEW_STEPS>(c, a, b, whole, ahead);
      c.data += whole, b.data += whole, n -= whole;
    }
  }
#endif
  for (; p + 4 <= k; p += 4) add_rows<ROWS, 4, B>(c, a.from(0, p), {b.data + p * b.row, b.row, 1}, n);
  for (; p < k; ++p) add_rows<ROWS, 1, B>(c, a.from(0, p), {b.data + p * b.row, b.row, 1}, n);
  (void)ahead;
}

// Columns of B along k that all rows of A meet before the next ones come; and how far ahead of those B is asked for.
constexpr int64_t FEW_COLUMNS = 16, FEW_AHEAD = 16384;

template <int ROWS, class B>
inline void dot_few(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t n, int64_t k, bool accumulate,
                    int64_t ahead) {
  if (b.row == 1) dot_along<ROWS, B>(c, a, b, n, k, accumulate, ahead);
  else add_across<ROWS, B>(c, a, b, n, k, ahead);
}

// A part of B, while it is near, with all rows of A; what lies ``ahead`` elements further is asked for.
template <class B>
inline void dot_part(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k,
                     bool accumulate, int64_t ahead) {
  for (int64_t i = 0; i < m; i += FEW_BLOCK) {
    const Matrix<float> ci = {c.data + i * c.row, c.row, 1};
    switch (at_most(FEW_BLOCK, m - i)) {
      case 1: dot_few<1, B>(ci, a.from(i, 0), b, n, k, accumulate, i ? 0 : ahead); break;
      case 2: dot_few<2, B>(ci, a.from(i, 0), b, n, k, accumulate, i ? 0 : ahead); break;
      case 3: dot_few<3, B>(ci, a.from(i, 0), b, n, k, accumulate, i ? 0 : ahead); break;
      default: dot_few<4, B>(ci, a.from(i, 0), b, n, k, accumulate, i ? 0 : ahead); break;
    }
  }
}

// As `dot_packed`, where B lies anyhow: panel by panel is packed into ``local``, which holds (PANEL + m) * k floats. If
// ORDERED, a row's sums are taken as they are among many rows, even where there are few.
template <class Operand, class A, class B, bool ORDERED = false>
inline void dot(Matrix<float> c, Matrix<const A> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k, bool accumulate,
                float* local) {
  using U = Unit<Operand>;
  if constexpr (READS_AS_IT_IS<Operand, B> && !ORDERED) {
    if (b.row == 1 ? m <= FEW_ROWS : b.column == 1 && m <= FEW_ACROSS<B>) {
      constexpr int64_t NEAR = FEW_AHEAD / int64_t(sizeof(B));
      const FewRows<FewUnit<B>> few = few_rows<Operand, FewUnit<B>, A>(a, m, k, local);
      if (b.row == 1) {
        for (int64_t j = 0; j < n; j += FEW_COLUMNS) {
          const Matrix<float> cj = {c.data + j, c.row, 1};
          const Matrix<const B> bj = {b.data + j * b.column, 1, b.column};
          dot_part<B>(cj, few, bj, m, at_most(FEW_COLUMNS, n - j), k, accumulate, NEAR);
        }
        return;
      }
      for (int64_t i = 0; i < m && !accumulate; ++i) std::fill_n(c.data + i * c.row, n, 0.0f);
      const int64_t ahead = at_least(NEAR, FEW_STEPS * b.row);
      for (int64_t p = 0; p < k; p += FEW_STEPS) {
        dot_part<B>(c, few.from(0, p), {b.data + p * b.row, b.row, 1}, m, n, at_most(FEW_STEPS, k - p), true, ahead);
      }
      return;
    }
  }
  const Matrix<const U> rows = rows_of<Operand, A>(a, m, k, local + k * PANEL);
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t width = at_most(PANEL, n - j);
    if constexpr (std::is_same_v<B, float> && std::is_same_v<Operand, float>) {
      if (width == PANEL && b.column == 1) {
        dot_columns(Into{c, accumulate}, j, rows, b.data + j, b.row, width, m, k);
        continue;
      }
    }
    U* const panel = reinterpret_cast<U*>(local);
    pack_panel<Operand, B>({b.data + j * b.column, b.row, b.column}, k, width, panel);
    dot_columns(Into{c, accumulate}, j, rows, static_cast<const U*>(panel), PANEL, width, m, depth<Operand>(k));
  }
}

// B that is made where it is multiplied: make(k, j, n) gives the units of PERIOD rows from k on, a multiple of it, in LANES
// columns from j, of which n exist. Nothing of it is stored but the panel at hand, and for few rows not even that.

// N units along k.
template <class V, int N>
struct Units {
  V data[N];
  static constexpr int DEPTH = N;
};

#if defined(__AVX512BF16__)
template <class A, class B>
CASTILE_INLINE Words pairs(A low, B high) {
  constexpr struct {
    uint16_t lane[32];
  } ORDER = {{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)floats(high), (__m512)floats(low));
  return (Words)_mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.lane), (__m512i)both);
}
// The whole numbers from 0 on as bf16, those of BITS bits again and again.
template <int BITS>
struct Numbers {
  uint16_t lane[32];
  constexpr Numbers() : lane() {
    for (int i = 0; i < 32; ++i) {
      int n = i & ((1 << BITS) - 1), top = 0;
      while (n >> (top + 1)) ++top;
      lane[i] = n == 0 ? 0 : uint16_t((127 + top) << 7 | ((n << (7 - top)) & 0x7f));
    }
  }
};
// Two short fields at once: they are put side by side and looked up.
template <int A, int B, int BITS>
CASTILE_INLINE Words pairs(Field<A, BITS> low, Field<B, BITS> high) {
  if constexpr (BITS <= 5) {
    static constexpr Numbers<BITS> NUMBERS;
    constexpr int LEFT = B < 16 ? 16 - B : 0, RIGHT = B < 16 ? 0 : B - 16;
    const Words x = low.word >> A, y = B < 16 ? high.word << LEFT : high.word >> RIGHT;
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), (__m512i)x, (__m512i)y, 0xca);
    return (Words)_mm512_permutexvar_epi16(both, _mm512_loadu_si512(NUMBERS.lane));
  } else {
    return pairs(floats(low), floats(high));
  }
}
#endif

template <class Operand, int I, class U, class A, class... Rest>
CASTILE_INLINE void fill_units(U& units, A a, Rest... rest) {
  units.data[I] = floats(a);
  if constexpr (sizeof...(rest) > 0) fill_units<Operand, I + 1>(units, rest...);
}
#if defined(__AVX512BF16__)
template <class Operand, int I, class U, class A, class B, class... Rest>
CASTILE_INLINE void fill_pairs(U& units, A a, B b, Rest... rest) {
  units.data[I] = pairs(a, b);
  if constexpr (sizeof...(rest) > 0) fill_pairs<Operand, I + 1>(units, rest...);
}
#endif

// Values of neighbouring rows, an even number, as units.
template <class Operand, class First, class... Rest>
CASTILE_INLINE auto units(First first, Rest... rest) {
  constexpr int COUNT = 1 + sizeof...(rest);
#if defined(__AVX512BF16__)
  if constexpr (PAIRS<Operand>) {
    Units<Words, COUNT / 2> made;
    fill_pairs<Operand, 0>(made, first, rest...);
    return made;
  } else
#endif
  {
    Units<Vector, COUNT> made;
    fill_units<Operand, 0>(made, first, rest...);
    return made;
  }
}

template <class Make>
using Made = decltype(std::declval<Make>()(int64_t(), int64_t(), int64_t()));

// Units of a panel's columns: whole blocks of PERIOD rows.
template <class Operand, int PERIOD>
constexpr int64_t height(int64_t k) {
  return (k + PERIOD - 1) / PERIOD * depth<Operand>(PERIOD);
}

template <class Operand, int PERIOD, class Make>
inline void pack_panel_made(Make make, int64_t k, int64_t j, int64_t n, Unit<Operand>* panel) {
  using U = Made<Make>;
  for (int64_t p = 0; p < k; p += PERIOD) {
    Unit<Operand>* const into = panel + p / PERIOD * U::DEPTH * PANEL;
    CASTILE_UNROLL
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      const int64_t left = n - j - v * LANES;
      U made{};
      if (left > 0) made = make(p, j + v * LANES, left);
      CASTILE_UNROLL
      for (int i = 0; i < U::DEPTH; ++i) store(into + i * PANEL + v * LANES, made.data[i]);
    }
  }
}

template <class Operand, int PERIOD, class Make>
inline void pack_made(Make make, int64_t k, int64_t n, void* panels) {
  for (int64_t j = 0; j < n; j += PANEL) {
    Unit<Operand>* const panel = static_cast<Unit<Operand>*>(panels) + j * height<Operand, PERIOD>(k);
    pack_panel_made<Operand, PERIOD>(make, k, j, n, panel);
  }
}

CASTILE_INLINE void multiply_add(Vector& sum, float x, Vector b) { sum += x * b; }
#if defined(__AVX512BF16__)
CASTILE_INLINE void multiply_add(Vector& sum, uint32_t x, Words b) {
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)b);
}
#endif

// As `dot_packed`, of panels that `pack_made` made. ``local`` holds m * k floats.
template <class Operand, int PERIOD, class Make, class A, class Put>
inline void dot_packed_made(Put put, Matrix<const A> a, const void* panels, int64_t m, int64_t n, int64_t k,
                            float* local) {
  using U = Unit<Operand>;
  const Matrix<const U> rows = rows_of<Operand, A>(a, m, k, local);
  for (int64_t j = 0; j < n; j += PANEL) {
    const U* const panel = static_cast<const U*>(panels) + j * height<Operand, PERIOD>(k);
    dot_columns(put, j, rows, panel, PANEL, at_most(PANEL, n - j), m, depth<Operand>(k));
  }
}

// BLOCKS blocks of rows of B times a few rows of A are added to C, which stays near and has room for whole vectors. Two
// vectors go side by side, as a sum waits for itself; the order of each is that of `dot_block`.
template <int ROWS, int BLOCKS, int PERIOD, int VECTORS, class U, class Make>
CASTILE_INLINE void add_made(Matrix<float> c, const U* a, int64_t a_row, Make make, int64_t k, int64_t j, int64_t n) {
  constexpr int DEPTH = Made<Make>::DEPTH;
  Vector sum[ROWS][VECTORS];
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = load(c.data + i * c.row + j + v * LANES);
  }
  CASTILE_UNROLL
  for (int b = 0; b < BLOCKS; ++b) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const auto made = make(k + b * PERIOD, j + v * LANES, n - j - v * LANES);
      CASTILE_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        CASTILE_UNROLL
        for (int p = 0; p < DEPTH; ++p) multiply_add(sum[i][v], a[i * a_row + b * DEPTH + p], made.data[p]);
      }
    }
  }
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) store(c.data + i * c.row + j + v * LANES, sum[i][v]);
  }
}

template <int ROWS, int BLOCKS, int PERIOD, class U, class Make>
inline void add_blocks(Matrix<float> c, const U* a, int64_t a_row, Make make, int64_t k, int64_t n) {
  int64_t j = 0;
  for (; j + 2 * LANES <= n; j += 2 * LANES) add_made<ROWS, BLOCKS, PERIOD, 2>(c, a, a_row, make, k, j, n);
  for (; j < n; j += LANES) add_made<ROWS, BLOCKS, PERIOD, 1>(c, a, a_row, make, k, j, n);
}

template <int ROWS, class Operand, int PERIOD, class Make>
inline void dot_few_made(Matrix<float> c, const Unit<Operand>* a, int64_t a_row, Make make, int64_t n,
                         int64_t k) {
  constexpr int STEPS = 4, DEPTH = Made<Make>::DEPTH;
  for (int i = 0; i < ROWS; ++i) std::fill_n(c.data + i * c.row, c.row, 0.0f);
  int64_t p = 0;
  for (; p + STEPS * PERIOD <= k; p += STEPS * PERIOD)
    add_blocks<ROWS, STEPS, PERIOD>(c, a + p / PERIOD * DEPTH, a_row, make, p, n);
  for (; p < k; p += PERIOD) add_blocks<ROWS, 1, PERIOD>(c, a + p / PERIOD * DEPTH, a_row, make, p, n);
}

// As `dot_packed`, where B is made. ``local`` holds PANEL * (k + PERIOD) + m * k floats, or, if that is
// more, FEW_BLOCK * (n + LANES + 2 * (k + PERIOD)).
template <class Operand, int PERIOD, class A, class Make, class Put>
inline void dot_made(Put put, Matrix<const A> a, Make make, int64_t m, int64_t n, int64_t k, float* local) {
  using U = Unit<Operand>;
  if (m <= FEW_BLOCK) {
    // Rows of A with zeros after them, as the last block of B goes beyond k.
    const int64_t width = height<Operand, PERIOD>(k);
    const int64_t c_row = tiles(n, LANES) * LANES;
    const Matrix<float> c = {local, c_row, 1};
    float* const rest = local + m * c_row;
    U* const copy = reinterpret_cast<U*>(rest);
    const Matrix<const U> rows = rows_of<Operand, A>(a, m, k, rest + m * width);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t p = 0; p < width; ++p) copy[i * width + p] = p < depth<Operand>(k) ? rows.data[i * rows.row + p * rows.column] : U(0);
    }
    switch (m) {
      case 1: dot_few_made<1, Operand, PERIOD>(c, copy, width, make, n, k); break;
      case 2: dot_few_made<2, Operand, PERIOD>(c, copy, width, make, n, k); break;
      case 3: dot_few_made<3, Operand, PERIOD>(c, copy, width, make, n, k); break;
      case 4: dot_few_made<4, Operand, PERIOD>(c, copy, width, make, n, k); break;
    }
    for (int64_t i = 0; i < m; ++i) {
      int64_t j = 0;
      auto place = put.from(i, 0);
      for (; j + LANES <= n; j += LANES) place.whole(j, load(c.data + i * c.row + j));
      if (j < n) put.some(i, j, load(c.data + i * c.row + j), n - j);
    }
    return;
  }
  U* const panel = reinterpret_cast<U*>(local);
  float* const rest = local + PANEL * (k + PERIOD);
  const Matrix<const U> rows = rows_of<Operand, A>(a, m, k, rest);
  for (int64_t j = 0; j < n; j += PANEL) {
    pack_panel_made<Operand, PERIOD>(make, k, j, n, panel);
    dot_columns(put, j, rows, static_cast<const U*>(panel), PANEL, at_most(PANEL, n - j), m, depth<Operand>(k));
  }
}

template <class T>
inline bool all_finite(Matrix<const T> b, int64_t m, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < m; ++i) {
    with_stride(b.column, [&](auto step) {
#pragma omp simd reduction(& : finite)
      for (int64_t j = 0; j < n; ++j) finite = finite & is_finite<T>(b.data[i * b.row + j * step]);
    });
  }
  return finite;
}

// As `dot`, but a 0 of A (of B if not LEFT) gives 0 even against an infinity or NaN: where not all is finite.
template <class Operand, class A, class B, bool LEFT>
inline void dot_annihilating(Matrix<float> c, Matrix<const A> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k,
                             bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float* const at = c.data + i * c.row + j;
      float sum = accumulate ? *at : 0.0f;
      for (int64_t p = 0; p < k; ++p) {
        const float x = to<float>(to<Operand>(a.data[i * a.row + p * a.column]));
        const float y = to<float>(to<Operand>(b.data[p * b.row + j * b.column]));
        sum += (LEFT ? x : y) == 0.0f ? 0.0f : x * y;
      }
      *at = sum;
    }
  }
}

}  // namespace
}  // namespace castile
