// tile.h: what generated kernels stand on. C++17 for GCC and Clang; no library but the standard one.
//
// Everything here is written for one scalar and left to the compiler to vectorise: no branch where a select does, no call
// that is not inlined. Nothing relies on -ffast-math, so NaN, infinities and signed zeros keep their IEEE meaning.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

#define CASTILE_INLINE inline __attribute__((always_inline))
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
  if constexpr (std::is_floating_point_v<T>) return (b < a) | (b != b) ? b : a;
  else return b < a ? b : a;
}

template <class T>
CASTILE_INLINE T maximum(T a, T b) {  // NaN if either is
  if constexpr (std::is_floating_point_v<T>) return (a < b) | (b != b) ? b : a;
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
    return r + ((r != 0) & ((r ^ d) < 0) ? d : T(0));
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

// ln 2 in two parts, the first so short that its product with an exponent is exact.
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, LOG2_E = 1.44269504f;

CASTILE_INLINE float exp(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;  // a NaN passes both
  const float n = (x * LOG2_E + ROUNDER) - ROUNDER;
  const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
  return scale_by(1.0f + exp_minus_one_near_zero(r), n);
}

CASTILE_INLINE float exp2(float x) {
  x = x > 129.0f ? 129.0f : x;
  x = x < -151.0f ? -151.0f : x;
  const float n = (x + ROUNDER) - ROUNDER;
  return scale_by(1.0f + exp_minus_one_near_zero((x - n) * 0.6931472f), n);
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

CASTILE_INLINE float sigmoid(float x) {
  const float e = exp(-std::fabs(x)), d = 1.0f + e;
  return (x >= 0.0f ? 1.0f : e) / d + (x != x ? x : 0.0f);
}

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

// sin and cos of x by the octant: the reduction is done in f64, exact enough below 2^30; beyond, by the C library.
struct Angle {
  double r;
  int64_t quadrant;
};

CASTILE_INLINE Angle reduced(float x) {
  constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
  const double n = (double(x) * 0.63661977236758134 + ROUND) - ROUND;
  return {(double(x) - n * 1.5707963267341256) - n * 6.0771005065061922e-11, int64_t(n)};
}

CASTILE_INLINE float sine_of(Angle a) {
  const double s = a.r * a.r;
  const double sine = a.r + a.r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880))));
  const double cosine = 1 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 - s * (1.0 / 3628800)))));
  const double y = a.quadrant & 1 ? cosine : sine;
  return float(a.quadrant & 2 ? -y : y);
}

CASTILE_INLINE float sin(float x) {
  if (!(std::fabs(x) < 1073741824.0f)) return float(std::sin(double(x)));
  return sine_of(reduced(x));
}

CASTILE_INLINE float cos(float x) {
  if (!(std::fabs(x) < 1073741824.0f)) return float(std::cos(double(x)));
  Angle a = reduced(x);
  a.quadrant += 1;
  return sine_of(a);
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

// body(first) ... body(last - 1), shared out in small portions among threads; on one where that is asked for, so that
// no thread is started after a fork.
template <class F>
inline void parallel_for(int64_t first, int64_t last, int64_t threads, F body) {
  threads = at_most(threads, last - first);
  if (threads <= 1) {
    for (int64_t point = first; point < last; ++point) body(point);
    return;
  }
  const int64_t portion = at_least(1, (last - first) / (threads * 8));
#ifdef _OPENMP
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, portion)
  for (int64_t point = first; point < last; ++point) body(point);
#else
  std::atomic<int64_t> next(first);
  const auto work = [&] {
    for (int64_t from = next.fetch_add(portion); from < last; from = next.fetch_add(portion))
      for (int64_t point = from; point < at_most(last, from + portion); ++point) body(point);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
#endif
}

// How many threads an amount of work is worth: waking one costs as much as some ten thousand operations.
CASTILE_INLINE int64_t worth(int64_t threads, double work) {
  return work < 20000.0 ? 1 : at_most(threads, 1 + int64_t(work / 20000.0));
}

// Dot --------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;
// Accumulators, a row of B and one broadcast of A must fit the register file: 6 x 4 + 4 + 1 of 32, or 6 x 2 + 2 + 1 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL_VECTORS = 4;
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int BLOCK_ROWS = 6;
constexpr int PANEL = PANEL_VECTORS * LANES;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float VectorInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

CASTILE_INLINE Vector load_vector(const float* p) { return *reinterpret_cast<const VectorInMemory*>(p); }
CASTILE_INLINE void store_vector(float* p, Vector x) { *reinterpret_cast<VectorInMemory*>(p) = x; }

// A matrix by its strides: element (i, j) lies at data[i * row + j * column].
template <class T>
struct Matrix {
  T* data;
  int64_t row, column;
};

// ROWS x (VECTORS * LANES) elements of C, held in registers over the whole of k. ``width`` columns of them exist.
template <int ROWS, int VECTORS>
inline void dot_block(Matrix<float> c, Matrix<const float> a, const float* b, int64_t b_row, int64_t width, int64_t k_n,
                      bool accumulate) {
  Vector sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < k_n; ++k) {
    Vector row[VECTORS];
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) row[v] = load_vector(b + k * b_row + v * LANES);
    CASTILE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const float x = a.data[i * a.row + k * a.column];
      CASTILE_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += x * row[v];
    }
  }
  if (width == VECTORS * LANES) {
    CASTILE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      CASTILE_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        float* const at = c.data + i * c.row + v * LANES;
        store_vector(at, accumulate ? load_vector(at) + sum[i][v] : sum[i][v]);
      }
    }
    return;
  }
  float edge[VECTORS * LANES];
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) store_vector(edge + v * LANES, sum[i][v]);
    float* const at = c.data + i * c.row;
    for (int64_t j = 0; j < width; ++j) at[j] = accumulate ? at[j] + edge[j] : edge[j];
  }
}

// All rows of one panel of columns. The rows are split evenly: 16 are 6 + 5 + 5, as a block of few rows waits for loads.
template <int VECTORS>
inline void dot_panel(Matrix<float> c, Matrix<const float> a, const float* b, int64_t b_row, int64_t width, int64_t m,
                      int64_t k, bool accumulate) {
  int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t i = 0; i < m; --blocks) {
    const int64_t rows = (m - i + blocks - 1) / blocks;
    const Matrix<float> ci = {c.data + i * c.row, c.row, 1};
    const Matrix<const float> ai = {a.data + i * a.row, a.row, a.column};
    switch (rows) {
      case 1: dot_block<1, VECTORS>(ci, ai, b, b_row, width, k, accumulate); break;
      case 2: dot_block<2, VECTORS>(ci, ai, b, b_row, width, k, accumulate); break;
      case 3: dot_block<3, VECTORS>(ci, ai, b, b_row, width, k, accumulate); break;
      case 4: dot_block<4, VECTORS>(ci, ai, b, b_row, width, k, accumulate); break;
      case 5: dot_block<5, VECTORS>(ci, ai, b, b_row, width, k, accumulate); break;
      default: dot_block<6, VECTORS>(ci, ai, b, b_row, width, k, accumulate); break;
    }
    i += rows;
  }
}

// Floats that `dot` needs of its caller: a panel of B, and A where it must be converted.
constexpr int64_t dot_floats(int64_t m, int64_t k) { return k * PANEL + m * k; }

// C[m, n] (+)= A[m, k] B[k, n] in f32, operands rounded to Operand first. C's columns are contiguous; A and B lie anyhow.
// The place for a matrix unit: a specialisation for Operand = bf16 may multiply pairs (vdpbf16ps) instead of converting.
template <class Operand, class A, class B>
inline void dot(Matrix<float> c, Matrix<const A> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k, bool accumulate,
                float* local) {
  constexpr bool EXACT = std::is_same_v<Operand, float>;
  float* const panel = local;
  Matrix<const float> rows = {nullptr, k, 1};
  if constexpr (EXACT && std::is_same_v<A, float>) {
    rows = a;
  } else {
    float* const copy = local + k * PANEL;
    for (int64_t i = 0; i < m; ++i) {
      with_stride(a.column, [&](auto step) {
        CASTILE_SIMD
        for (int64_t j = 0; j < k; ++j) copy[i * k + j] = to<float>(to<Operand>(a.data[i * a.row + j * step]));
      });
    }
    rows.data = copy;
  }
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t width = at_most(PANEL, n - j);
    const float* columns = panel;
    int64_t b_row = PANEL;
    bool packed = true;
    if constexpr (EXACT && std::is_same_v<B, float>) {
      if (width == PANEL && b.column == 1) columns = b.data + j, b_row = b.row, packed = false;
    }
    if (packed) {
      for (int64_t p = 0; p < k; ++p) {
        const B* const from = b.data + p * b.row + j * b.column;
        float* const into = panel + p * PANEL;
        with_stride(b.column, [&](auto step) {
          CASTILE_SIMD
          for (int64_t q = 0; q < width; ++q) into[q] = to<float>(to<Operand>(from[q * step]));
        });
        for (int64_t q = width; q < PANEL; ++q) into[q] = 0.0f;
      }
    }
    const Matrix<float> cj = {c.data + j, c.row, 1};
    if (width <= LANES) dot_panel<1>(cj, rows, columns, b_row, width, m, k, accumulate);
    else dot_panel<PANEL_VECTORS>(cj, rows, columns, b_row, width, m, k, accumulate);
  }
}

}  // namespace
}  // namespace castile
