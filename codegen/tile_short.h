// Operands of products that are shorter than a float: bytes, whose products are exact, and floats of 8 bits.
#pragma once

namespace castile {
namespace {

// Operands that are whole numbers of 8 bits, each int8_t or uint8_t.
template <class A, class B>
struct Whole {};
template <class T>
constexpr bool IS_WHOLE = false;
template <class A, class B>
constexpr bool IS_WHOLE<Whole<A, B>> = true;

// Neighbours along k that go into a word: four, where the machine adds the products of such, of unsigned with signed ones;
// two as halves; or one.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <class A, class B>
constexpr int TOGETHER = std::is_same_v<A, uint8_t> && std::is_same_v<B, uint8_t> ? 2 : 4;
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
template <class A, class B>
constexpr int TOGETHER = 2;
#else
template <class A, class B>
constexpr int TOGETHER = 1;
#endif

// Of two signed operands B goes with 128 added; before each row of A stands what its sums begin with to make up for that.
template <class A, class B>
constexpr bool RAISED = TOGETHER<A, B> == 4 && std::is_same_v<A, B>;
constexpr uint32_t RAISE = 0x80808080u;

template <class A, class B>
struct WholeUnit {
  uint32_t word;
};
template <class U>
constexpr bool OF_WHOLE = false;
template <class A, class B>
constexpr bool OF_WHOLE<WholeUnit<A, B>> = true;

template <class Operand>
struct WholeTraits;
template <class A, class B>
struct WholeTraits<Whole<A, B>> {
  using Left = A;
  using Right = B;
  using Unit = WholeUnit<A, B>;
  static constexpr int COUNT = TOGETHER<A, B>, BITS = 32 / COUNT;
  static constexpr bool IS_RAISED = RAISED<A, B>;
  // Words before each row of A.
  static constexpr int LEAD = IS_RAISED ? 1 : 0;
};

// What sums of such units are, lane by lane.
template <class U>
using SumOf = std::conditional_t<OF_WHOLE<U>, Mask, Vector>;
template <class U>
using Element = std::conditional_t<OF_WHOLE<U>, int32_t, float>;

// What the sums of a row of A begin with.
template <class U>
CASTILE_INLINE Element<U> first_of(const U* row) {
  (void)row;
  return 0;
}
template <class A, class B>
CASTILE_INLINE int32_t first_of(const WholeUnit<A, B>* row) {
  if constexpr (RAISED<A, B>) return int32_t(row[-1].word);
  else return 0;
}
CASTILE_INLINE Vector spread(float x) { return splat(x); }
CASTILE_INLINE Mask spread(int32_t x) { return Mask{} + x; }

template <class A, class B>
CASTILE_INLINE void multiply_add(Mask& sum, WholeUnit<A, B> x, Words b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  const __m512i a = _mm512_set1_epi32(int(x.word));
  if constexpr (TOGETHER<A, B> == 2) sum = (Mask)_mm512_dpwssd_epi32((__m512i)sum, a, (__m512i)b);
  else if constexpr (std::is_same_v<A, int8_t>) sum = (Mask)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, a);
  else sum = (Mask)_mm512_dpbusd_epi32((__m512i)sum, a, (__m512i)b);
#elif defined(__AVX512BW__)
  sum += (Mask)_mm512_madd_epi16(_mm512_set1_epi32(int(x.word)), (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  sum += (Mask)_mm256_madd_epi16(_mm256_set1_epi32(int(x.word)), (__m256i)b);
#else
  sum += int32_t(x.word) * (Mask)b;
#endif
}
template <class A, class B>
CASTILE_INLINE void multiply_add(Mask& sum, WholeUnit<A, B> x, const WholeUnit<A, B>* b) {
  multiply_add(sum, x, load(reinterpret_cast<const uint32_t*>(b)));
}
template <class A, class B>
CASTILE_INLINE void store(WholeUnit<A, B>* p, Words x) {
  store(reinterpret_cast<uint32_t*>(p), x);
}

// Numbers of neighbouring rows as a word in each lane.
CASTILE_INLINE Words beside(Mask a) { return (Words)a; }
CASTILE_INLINE Words beside(Mask a, Mask b) { return ((Words)a & 0xffffu) | (Words)b << 16; }
CASTILE_INLINE Words beside(Mask a, Mask b, Mask c, Mask d) {
  const Words low = ((Words)a & 0xffu) | ((Words)b & 0xffu) << 8, high = ((Words)c & 0xffu) | (Words)d << 8;
  return low | high << 16;
}

// Those of one column from a row on, of which there are so many.
template <class Operand, class B>
CASTILE_INLINE uint32_t whole_unit(const B* b, int64_t row, int64_t rows) {
  using W = WholeTraits<Operand>;
  constexpr uint32_t MASK = W::COUNT == 1 ? ~0u : (1u << W::BITS % 32) - 1;
  uint32_t word = 0;
  CASTILE_UNROLL
  for (int i = 0; i < W::COUNT; ++i) {
    if (i < rows) word |= (uint32_t(int32_t(b[i * row])) & MASK) << (i * W::BITS % 32);
  }
  return word;
}

// One panel of B, as `pack_panel` does it, from its row ``done`` units on; ``columns`` go into each row of the panel.
template <class Operand, class B>
inline void pack_whole(const B* data, int64_t row, int64_t column, int64_t done, int64_t k, int64_t width, int64_t columns,
                       uint32_t* panel) {
  using W = WholeTraits<Operand>;
  constexpr int COUNT = W::COUNT;
  constexpr uint32_t RAISED_BY = W::IS_RAISED ? RAISE : 0;
  for (int64_t p = done; p * COUNT < k; ++p) {
    uint32_t* const into = panel + p * columns;
    const B* const from = data + p * COUNT * row;
    int64_t q = 0;
    if (column == 1 && (p + 1) * COUNT <= k) {
      for (; q + LANES <= width; q += LANES) {
        const B* const at = from + q;
        if constexpr (COUNT == 4) store(into + q, beside(load(at), load(at + row), load(at + 2 * row), load(at + 3 * row)) ^ RAISED_BY);
        else if constexpr (COUNT == 2) store(into + q, beside(load(at), load(at + row)));
        else store(into + q, beside(load(at)));
      }
    }
    for (; q < width; ++q) into[q] = whole_unit<Operand>(from + q * column, row, k - p * COUNT) ^ RAISED_BY;
    for (; q < columns; ++q) into[q] = 0;
  }
}

// The sum of n signed bytes.
inline int32_t sum_of_bytes(const int8_t* x, int64_t n) {
  int32_t sum = 0;
  int64_t i = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  __m512i sums = _mm512_setzero_si512();
  for (; i + 64 <= n; i += 64) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(x + i));
  sum = _mm512_reduce_add_epi32(sums);
#endif
  for (; i < n; ++i) sum += x[i];
  return sum;
}

// Rows of A as units, ``width`` words from row to row, each after its lead.
template <class Operand, class A>
inline void copy_whole(const A* data, int64_t row, int64_t column, int64_t m, int64_t k, int64_t width, uint32_t* into) {
  using W = WholeTraits<Operand>;
  for (int64_t i = 0; i < m; ++i) {
    const A* const from = data + i * row;
    uint32_t* const to = into + i * width + W::LEAD;
    int64_t p = 0;
    if (column == 1) {
      if constexpr (W::COUNT == 4) {
        std::memcpy(to, from, size_t(k / 4 * 4));
        p = k / 4;
      } else {
        CASTILE_SIMD
        for (int64_t q = 0; q < k / W::COUNT; ++q) to[q] = whole_unit<Operand>(from + q * W::COUNT, 1, W::COUNT);
        p = k / W::COUNT;
      }
    }
    for (; p * W::COUNT < k; ++p) to[p] = whole_unit<Operand>(from + p * W::COUNT * column, column, k - p * W::COUNT);
    if constexpr (W::IS_RAISED) {
      const int64_t units = (k + W::COUNT - 1) / W::COUNT;
      to[-1] = uint32_t(-128 * sum_of_bytes(reinterpret_cast<const int8_t*>(to), units * W::COUNT));
    }
  }
}

// Floats of 8 bits, of which bf16 holds all.
template <class T>
constexpr bool IN_BF16 = false;
template <int EXPONENT, int MANTISSA, bool FINITE>
constexpr bool IN_BF16<Narrow<uint8_t, EXPONENT, MANTISSA, FINITE>> = true;

#if defined(__AVX512BF16__)
CASTILE_INLINE __m512i halves_of(const bf16* p) { return _mm512_loadu_si512(p); }

// The bf16 of those that are not negative.
template <class T>
struct Codes;
template <int EXPONENT, int MANTISSA, bool FINITE>
struct Codes<Narrow<uint8_t, EXPONENT, MANTISSA, FINITE>> {
  uint16_t lane[128];
  constexpr Codes() : lane() {
    using T = Narrow<uint8_t, EXPONENT, MANTISSA, FINITE>;
    for (uint32_t code = 0; code < 128; ++code) {
      const int exponent = int(code >> MANTISSA);
      const uint32_t mantissa = code & ((1u << MANTISSA) - 1);
      int top = MANTISSA;
      uint32_t digits = mantissa | 1u << MANTISSA;
      if (exponent == 0) {
        digits = mantissa, top = 0;
        while (digits >> (top + 1)) ++top;
      }
      const int power = (exponent ? exponent : 1) - T::BIAS + top - MANTISSA + 127;
      uint32_t value = uint32_t(power) << 7 | ((digits << (7 - top)) & 0x7fu);
      if (digits == 0) value = 0;
      if (FINITE ? code == T::NOT_A_NUMBER : code > T::INFINITE) value = 0x7fc0u;
      if (!FINITE && code == T::INFINITE) value = 0x7f80u;
      lane[code] = uint16_t(value);
    }
  }
};
// 2 * LANES neighbours as bf16: looked up, 64 at a time.
template <int EXPONENT, int MANTISSA, bool FINITE>
CASTILE_INLINE __m512i halves_of(const Narrow<uint8_t, EXPONENT, MANTISSA, FINITE>* p) {
  static constexpr Codes<Narrow<uint8_t, EXPONENT, MANTISSA, FINITE>> CODES;
  const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const auto table = [](int i) CASTILE_INLINED { return _mm512_loadu_si512(CODES.lane + 32 * i); };
  const __m512i low = _mm512_permutex2var_epi16(table(0), code, table(1));
  const __m512i high = _mm512_permutex2var_epi16(table(2), code, table(3));
  const __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), low, high);
  // The sign is taken from one, all else from the other.
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(int16_t(0x8000)), _mm512_slli_epi16(code, 8), size, 0xca);
}
#endif

}  // namespace
}  // namespace castile
