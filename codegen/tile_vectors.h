// Vectors of f32: as wide as the machine has them, loads and stores of every element type, what processors compute in one step.
#pragma once

namespace castile {
namespace {

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
#if defined(__AVX512F__)
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  const Halves h = *reinterpret_cast<const HalvesInMemory*>(p);
  return (Vector)(__builtin_convertvector(h, Words) << 16);
#endif
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
CASTILE_INLINE void store(int32_t* p, Mask x) { *reinterpret_cast<MaskInMemory*>(p) = x; }
CASTILE_INLINE void store(float* p, Vector x) { *reinterpret_cast<VectorInMemory*>(p) = x; }
// The nearest bf16, as f32.
CASTILE_INLINE Vector rounded(Vector x) {
  constexpr uint32_t KEPT = 0xffff0000u, ALMOST_HALF = 0x7fffu, LAST = 0x10000u;
#if defined(__AVX512F__)
  const __m512i u = (__m512i)x, up = _mm512_add_epi32(u, _mm512_set1_epi32(ALMOST_HALF));
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(LAST));
  const __m512i nearest = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  // Where x is NaN, of either kind, itself, and quiet.
  const __m512 all = _mm512_fixupimm_ps((__m512)nearest, (__m512)x, _mm512_set1_epi32(0x22), 0);
  return (Vector)((Words)all & KEPT);
#else
  const Words u = (Words)x;
  const Words nearest = (u + ALMOST_HALF + (u / LAST & 1u)) & KEPT;
  return (Vector)(x != x ? Words{} + 0x7fc00000u : nearest);
#endif
}
// What a kernel stores, to the last bit.
CASTILE_INLINE void keep(bf16* p, Vector x) {
  *reinterpret_cast<HalvesInMemory*>(p) = __builtin_convertvector((Words)rounded(x) >> 16, Halves);
}
template <class T, class V>
CASTILE_INLINE void keep(T* p, V x) {
  store(p, x);
}
// What stays within a kernel: AVX-512 takes numbers below the least normal one for 0.
CASTILE_INLINE void store(bf16* p, Vector x) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<HalvesInMemory*>(p) = bits<Halves>(_mm512_cvtneps_pbh((__m512)x));
#else
  keep(p, x);
#endif
}

template <class T>
__attribute__((noinline, cold)) void store_some(T* p, int64_t stride, Vector x, int64_t n) {
  T lanes[LANES];
  keep(lanes, x);
  for (int64_t l = 0; l < LANES && l < n; ++l) p[l * stride] = lanes[l];
}

// The first n lanes only, elements ``stride`` apart.
template <class T>
CASTILE_INLINE void store(T* p, int64_t stride, Vector x, int64_t n) {
  if (__builtin_expect(stride == 1 && n >= LANES, 1)) keep(p, x);
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
#elif defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1 && n >= LANES && bits<uintptr_t>(p) % 32 == 0) {
      _mm256_stream_ps(p, (__m256)x);
      return;
    }
  }
#endif
  store(p, stride, x, n);
}

// Waits until what was streamed is seen by all.
CASTILE_INLINE void fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Asks for what will be read soon; any address will do.
CASTILE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
template <class T>
constexpr int64_t IN_A_LINE = 64 / int64_t(sizeof(T));
// A few rows that are wanted soon; nobody foresees where the next begins.
template <class T>
CASTILE_INLINE void prefetch_rows(const T* first, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  for (int64_t i = 0; column == 1 && i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += IN_A_LINE<T>) prefetch(first + i * row + j);
  }
}
// The same of rows that will be written, each line of which is read first.
template <class T>
CASTILE_INLINE void prefetch_rows_to_write(const T* first, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  for (int64_t i = 0; column == 1 && i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += IN_A_LINE<T>) __builtin_prefetch(first + i * row + j, 1, 2);
  }
}
// Where as many rows begin that come after these; what is read one line after another is foreseen from there on.
template <class T>
CASTILE_INLINE void prefetch_next_rows(const T* first, int64_t row, int64_t column, int64_t rows, int64_t) {
  for (int64_t i = rows; column == 1 && i < 2 * rows; ++i) prefetch(first + i * row);
}

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

// The same, and those from n on, where ``inside`` tells whether these are all lanes.
CASTILE_INLINE Mask lanes_below(int64_t n, std::false_type) { return lanes_below(n); }
CASTILE_INLINE bool lanes_below(int64_t, std::true_type) { return true; }
CASTILE_INLINE Mask lanes_past(int64_t n, std::false_type) { return ~lanes_below(n); }
CASTILE_INLINE bool lanes_past(int64_t, std::true_type) { return true; }

CASTILE_INLINE bool any(Mask m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)m) != 0;
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
  const bool safe = (size > 1e-37f) & (size < 1e37f);
  return safe ? x * inverse : x / d;
}

// Whole numbers in the lanes of words: what of a word they are, and their floats.
CASTILE_INLINE Words words(Mask x) { return (Words)x; }
CASTILE_INLINE Words words(Words x) { return x; }
CASTILE_INLINE Mask integers(Mask x) { return x; }
CASTILE_INLINE Mask integers(Words x) { return (Mask)x; }
CASTILE_INLINE Vector floats(Vector x) { return x; }
CASTILE_INLINE Vector floats(Mask x) { return __builtin_convertvector(x, Vector); }
CASTILE_INLINE Vector floats(Words x) { return __builtin_convertvector(x, Vector); }

// BITS bits of each word, from bit SHIFT on; equal numbers WORD say that words are the same.
template <int SHIFT, int BITS, int WORD>
struct Field {
  Words word;
  static constexpr uint32_t MASK = BITS < 32 ? (1u << BITS % 32) - 1 : ~0u;
};
template <int SHIFT, int BITS, int WORD>
CASTILE_INLINE Vector floats(Field<SHIFT, BITS, WORD> x) {
#if defined(__AVX512F__)
  // Short ones are looked up, by the last four bits of each lane.
  if constexpr (BITS <= 4) {
    constexpr struct {
      float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    } NUMBERS;
    const __m512i places = (__m512i)(x.word >> SHIFT & (BITS < 4 ? x.MASK : ~0u));
    return (Vector)_mm512_permutexvar_ps(places, _mm512_loadu_ps(NUMBERS.lane));
  }
#endif
  const Words value = x.word >> SHIFT & x.MASK;
  if constexpr (BITS < 32) return floats((Mask)value);
  else return floats(value);
}

template <int SHIFT, int BITS, int WORD>
CASTILE_INLINE Mask integers(Field<SHIFT, BITS, WORD> x) {
  return (Mask)(x.word >> SHIFT & x.MASK);
}
CASTILE_INLINE Mask integers(int32_t x) { return Mask{} + x; }

// base, base + step, ...
__attribute__((noinline, cold)) Vector far_lanes_from(int64_t base, int64_t step) {
  Vector x;
  for (int l = 0; l < LANES; ++l) x[l] = float(base + l * step);
  return x;
}
CASTILE_INLINE Vector lanes_from(int64_t base, int64_t step) {
  const int64_t last = base + (LANES - 1) * step;
  const bool near = base == int32_t(base) && last == int32_t(last);
  return __builtin_expect(near, 1) ? floats(lane_numbers() * int32_t(step) + int32_t(base)) : far_lanes_from(base, step);
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
#elif defined(__AVX__)
  return a != a ? a : (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return ((a < b) | (b != b)) ? b : a;
#endif
}
CASTILE_INLINE Vector minimum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_mask_min_ps((__m512)a, _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q), (__m512)a, (__m512)b);
#elif defined(__AVX__)
  return a != a ? a : (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return ((b < a) | (b != b)) ? b : a;
#endif
}
CASTILE_INLINE Vector abs(Vector x) { return (Vector)((Words)x & 0x7fffffffu); }
CASTILE_INLINE Vector sqrt(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
  return (Vector)_mm256_sqrt_ps((__m256)x);
#else
  for (int l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
CASTILE_INLINE Vector rsqrt(Vector x) { return 1.0f / sqrt(x); }
// To the nearest whole number, ties to even; and down.
CASTILE_INLINE Vector rint(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX__)
  return (Vector)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int l = 0; l < LANES; ++l) x[l] = std::rint(x[l]);
  return x;
#endif
}
CASTILE_INLINE Vector floor(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX__)
  return (Vector)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  for (int l = 0; l < LANES; ++l) x[l] = std::floor(x[l]);
  return x;
#endif
}
CASTILE_INLINE Vector copysign(Vector size, Vector sign) {
  return (Vector)(((Words)size & 0x7fffffffu) | ((Words)sign & 0x80000000u));
}
CASTILE_INLINE Vector at_most(Vector x, float high) {  // a NaN stays
#if defined(__AVX512F__)
  return (Vector)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#elif defined(__AVX__)
  return (Vector)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
  return x > high ? splat(high) : x;
#endif
}
CASTILE_INLINE Vector clamp(Vector x, float low, float high) {  // a NaN stays
#if defined(__AVX512F__)
  // Both give their second operand if either is NaN.
  return (Vector)_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), (__m512)x));
#elif defined(__AVX__)
  return (Vector)_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), (__m256)x));
#else
  x = x > high ? splat(high) : x;
  return x < low ? splat(low) : x;
#endif
}

template <int N>
CASTILE_INLINE Vector power(Vector x) {
  if constexpr (N < 0) return 1.0f / power<-N>(x);
  else if constexpr (N == 0) return splat(1.0f);
  else if constexpr (N == 1) return x;
  else if constexpr (N % 2 == 0) return power<N / 2>(x * x);
  else return x * power<N / 2>(x * x);
}

}  // namespace
}  // namespace castile
