// Element types: narrow floats as their bits, casts as the language has them, arithmetic with its rules.
#pragma once

namespace castile {
namespace {

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

}  // namespace
}  // namespace castile
