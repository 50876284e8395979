// Functions of numbers, one by one: what a loop over them is vectorised from.
#pragma once

namespace castile {
namespace {

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

CASTILE_INLINE float sigmoid(float x) {
  const float e = exp(-std::fabs(x));  // never infinite, so that results below the least normal number are right
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
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

}  // namespace
}  // namespace castile
