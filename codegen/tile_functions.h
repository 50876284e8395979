// Functions of f32 numbers and of vectors of them, by polynomials fitted to minimise the greatest relative error; of f64
// by the C library.
//
// What is written for F is one text for both: a number, in loops that the compiler vectorises, or a `Vector`. So equal
// values stay equal whichever way they are computed. Nothing branches.
#pragma once

namespace castile {
namespace {

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
CASTILE_INLINE float copysign(float size, float sign) { return std::copysign(size, sign); }

// The integers that have the bits of an F, unsigned and signed.
template <class F>
using Unsigned = std::conditional_t<std::is_same_v<F, float>, uint32_t, Words>;
template <class F>
using Signed = std::conditional_t<std::is_same_v<F, float>, int32_t, Mask>;
template <class F>
using Only = std::enable_if_t<std::is_same_v<F, float> || std::is_same_v<F, Vector>, F>;

CASTILE_INLINE float as_floats(int32_t x) { return float(x); }
CASTILE_INLINE Vector as_floats(Mask x) { return floats(x); }

// The same number in all lanes.
template <class F>
CASTILE_INLINE F all(float x) {
  return x - F{};
}

CASTILE_INLINE float clamp(float x, float low, float high) {  // a NaN stays
  x = x > high ? high : x;
  return x < low ? low : x;
}

// A sum with this, 1.5 * 2^23, is a number rounded to an integer: its low bits are the integer.
constexpr float ROUNDER = 12582912.0f;

// 2^n for -126 <= n <= 127, where ``rounded`` is n + ROUNDER.
template <class F>
CASTILE_INLINE Only<F> power_of_two(F rounded) {
  return bits<F>((bits<Unsigned<F>>(rounded) - (bits<uint32_t>(ROUNDER) - 127u)) << 23);
}

CASTILE_INLINE float nothing_where(bool c, float x) { return c ? 0.0f : x; }
CASTILE_INLINE Vector nothing_where(Mask c, Vector x) { return choose(c, 0.0f, x); }

// x * 2^n for any n that exp meets, where ``rounded`` is n + ROUNDER: by one instruction, or by two factors, so that
// overflow and subnormal results come out right. Processors of Intel take a hundred cycles over a result that is too small,
// and masks leave little else: what becomes 0 whatever x is, is not computed.
template <class F>
CASTILE_INLINE Only<F> scale_by(F x, F rounded) {
  constexpr float LEAST = -150.0f;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<F, Vector>) {
    const __m512 n = (__m512)(rounded - ROUNDER);
    return (Vector)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(LEAST), _CMP_NLT_UQ), (__m512)x, n);
  }
#endif
  x = nothing_where(rounded < F{} + (ROUNDER + LEAST), x);
  constexpr uint32_t EXPONENT = 0xff800000u, ONE = 0x3f800000u;
  const auto n = bits<Unsigned<F>>(rounded) << 23;  // n, in the place of an exponent
  const auto half = bits<Unsigned<F>>(bits<Signed<F>>(n) >> 1) & EXPONENT;
  return x * bits<F>(n - half + ONE) * bits<F>(half + ONE);
}

// exp(r) - 1 = r + r^2 p(r) on [-0.35, 0.35].
template <class F>
CASTILE_INLINE Only<F> exp_quadratic(F r) {
  return (((0.0013951716f * r + 0.008369599f) * r + 0.041666187f) * r + 0.16666512f) * r + 0.5f;
}

template <class F>
CASTILE_INLINE Only<F> exp_near_zero(F r) {
  return (exp_quadratic(r) * r + 1.0f) * r + 1.0f;
}

// ln 2 in two parts, the first so short that its product with an exponent is exact.
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, LOG2_E = 1.44269504f;

template <class F>
CASTILE_INLINE Only<F> exp(F x) {
#if defined(__AVX512F__)
  // What is far below becomes 0 whatever n is.
  if constexpr (std::is_same_v<F, Vector>) x = at_most(x, 89.0f);
  else
#endif
  x = clamp(x, -104.5f, 89.0f);  // n from -151 on
  const F rounded = x * LOG2_E + ROUNDER, n = rounded - ROUNDER;
  const F r = (x - n * LN2_HIGH) - n * LN2_LOW;
  return scale_by(exp_near_zero(r), rounded);
}

// One of a row: by the steps of vectors, which have no branch to be foreseen.
CASTILE_INLINE float exp_alone(float x) { return exp(splat(x))[0]; }

// 2^r on [-0.5, 0.5].
CASTILE_INLINE Vector exp2_near_zero(Vector r) {
  Vector p = 0.00015594678f * r + 0.0013406643f;
  p = p * r + 0.009617693f;
  p = p * r + 0.055503104f;
  p = p * r + 0.24022652f;
  p = p * r + 0.69314724f;
  return p * r + 1.0f;
}

#if defined(__AVX512DQ__)
// x less the nearest integer; 0 for infinities.
CASTILE_INLINE Vector fraction(Vector x) { return (Vector)_mm512_reduce_ps((__m512)x, 0); }
#endif

template <class F>
CASTILE_INLINE Only<F> exp2(F x) {
#if defined(__AVX512DQ__)
  if constexpr (std::is_same_v<F, Vector>) {
    constexpr float LEAST = -150.5f;
    const F r = fraction(x);
    const auto enough = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(LEAST), _CMP_NLT_UQ);
    return (F)_mm512_maskz_scalef_ps(enough, (__m512)exp2_near_zero(r), (__m512)(x - r));
  }
#endif
  x = clamp(x, -151.0f, 129.0f);
  const F rounded = x + ROUNDER;
  return scale_by(exp_near_zero((x - (rounded - ROUNDER)) * 0.6931472f), rounded);
}

// exp of what was rounded as it was computed, which counts for more than that log2 e is multiplied in at once.
CASTILE_INLINE Vector exp_rough(Vector x) {
#if defined(__AVX512DQ__)
  return exp2(x * LOG2_E);
#else
  return exp(x);
#endif
}

// The same where what is below the least normal number becomes 0 and takes no time. Else n is added to the exponent, up to
// 2^128, which is infinity; that would make a number of a NaN.
CASTILE_INLINE Vector exp_flushed(Vector x) {
#if defined(__AVX512DQ__)
  x = x * LOG2_E;
  const Vector r = fraction(x);
  return (Vector)_mm512_scalef_ps((__m512)exp2_near_zero(r), (__m512)(x - r));
#else
  const Vector n = at_most(x * LOG2_E, 128.0f), rounded = n + ROUNDER;
  const Vector y = exp2_near_zero(n - (rounded - ROUNDER));
  const Mask scaled = bits<Mask>(y) + (bits<Mask>(rounded) << 23);
  return nothing_where(n < -126.0f, bits<Vector>(scaled | (x != x)));
#endif
}

// Powers of two, exact.
CASTILE_INLINE Vector exp2(Mask n) { return scale_by(splat(1.0f), clamp(floats(n), -151.0f, 129.0f) + ROUNDER); }

template <class F>
CASTILE_INLINE Only<F> expm1(F x) {
  x = clamp(x, -20.0f, 88.8f);
  const F n = (x * LOG2_E + ROUNDER) - ROUNDER;
  const F r = (x - n * LN2_HIGH) - n * LN2_LOW;
  const F half = power_of_two((n - 1.0f) + ROUNDER);  // 2^128 is no f32
  return (half * (r + r * r * exp_quadratic(r)) + (half - 0.5f)) * 2.0f;
}

// x = m 2^e with m in [sqrt 1/2, sqrt 2]; gives e and log(m) = f + tail.
template <class F>
struct Logarithm {
  F exponent, f, tail;
};

template <class F>
CASTILE_INLINE Logarithm<F> logarithm(F x) {
  constexpr float LEAST_NORMAL = 1.17549435e-38f;
  const auto u = bits<Unsigned<F>>(x < LEAST_NORMAL ? x * 8388608.0f : x);
  const auto shifted = u - 0x3f3504f3u;  // the bits of sqrt 1/2
  const F e = as_floats(bits<Signed<F>>(shifted) >> 23) - (x < LEAST_NORMAL ? all<F>(23.0f) : F{});
  const F f = bits<F>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  F p = all<F>(0.06913567f);
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

template <class F>
CASTILE_INLINE Only<F> at_ends_of_log(F x, F y) {
  y = x == 0.0f ? all<F>(-inf) : y;
  y = x < 0.0f ? all<F>(__builtin_nanf("")) : y;
  return x < inf ? y : x;  // infinity and NaN are their own logarithms
}

template <class F>
CASTILE_INLINE Only<F> log(F x) {
  const Logarithm<F> l = logarithm(x);
  return at_ends_of_log(x, l.exponent * LN2_HIGH + (l.f + (l.tail + l.exponent * LN2_LOW)));
}

template <class F>
CASTILE_INLINE Only<F> log2(F x) {
  const Logarithm<F> l = logarithm(x);
  // log2(e) = 1 + 0.4427: f itself is kept whole, so nothing is lost near x = 1.
  constexpr float REST = 0.44269504f;
  return at_ends_of_log(x, l.exponent + (l.f + (l.tail + (l.f * REST + l.tail * REST))));
}

template <class F>
CASTILE_INLINE Only<F> log1p(F x) {
  const F u = 1.0f + x, rounded = u - 1.0f;
  // log(u) x / (u - 1) undoes the rounding of 1 + x (Kahan).
  const F y = log(u) * (x / rounded);
  const F finite = x < inf ? y : x;
  return rounded == 0.0f ? x : finite;
}

template <class F>
CASTILE_INLINE Only<F> tanh(F x) {
  const F e = expm1(-2.0f * abs(x));
  return copysign(-e / (e + 2.0f), x);
}

template <class F>
CASTILE_INLINE Only<F> sigmoid(F x) {
  const F e = exp(-abs(x));  // never infinite, so that results below the least normal number are right
  return (x >= 0.0f ? all<F>(1.0f) : e) / (1.0f + e);
}

template <class F>
CASTILE_INLINE Only<F> erf(F x) {
  const F s = x * x, t = abs(x) > 4.0f ? all<F>(4.0f) : abs(x);
  F near = all<F>(8.2652026e-05f);
  near = near * s - 0.00081200514f;
  near = near * s + 0.0051993257f;
  near = near * s - 0.026858896f;
  near = near * s + 0.11283693f;
  near = near * s - 0.37612635f;
  near = near * s + 0.12837917f;  // 2 / sqrt(pi) - 1
  F far = all<F>(-2.1095055e-05f);  // log(1 - erf(t))
  far = far * t + 0.00043446265f;
  far = far * t - 0.004171063f;
  far = far * t + 0.025119428f;
  far = far * t - 0.10828009f;
  far = far * t - 0.6333469f;
  far = far * t - 1.1295149f;
  far = far * t + 0.0001746845f;
  const F tail = copysign(1.0f - exp(far), x);
  return abs(x) > 0.92f ? tail : x + x * near;
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

// sin and cos as for one value, half a vector at a time in f64. Below this angle the products are exact whether the
// compiler fuses them or not: nothing tells it to.
constexpr float NEAR_ANGLE = 1048576.0f;
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
  return __builtin_expect(any(~(abs(x) < NEAR_ANGLE)), 0) ? far_sines<0>(x) : sines<0>(x);
}
CASTILE_INLINE Vector cos(Vector x) {
  return __builtin_expect(any(~(abs(x) < NEAR_ANGLE)), 0) ? far_sines<1>(x) : sines<1>(x);
}

}  // namespace
}  // namespace castile
