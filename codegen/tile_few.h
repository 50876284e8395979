// Products of few rows, whose other operand is read where it lies; products in which a 0 wins over infinities.
#pragma once

namespace castile {
namespace {

// With so few rows B is read where it lies: packing it would cost more than it saves. FEW_ROWS where it lies along k; where
// its rows lie along n, FEW_ACROSS, of which registers hold FEW_SUMS.
constexpr int64_t FEW_ROWS = 8;
constexpr int FEW_BLOCK = 4;
// Sums have half of the registers. As many times ``sums`` as fit there, a power of two, go side by side: they wait for themselves.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int FEW_REGISTERS = 16;
#else
constexpr int FEW_REGISTERS = 8;
#endif
constexpr int side_by_side(int sums, int most) {
  while (most > 1 && most * sums > FEW_REGISTERS) most /= 2;
  return most;
}
#if defined(__AVX512F__)
template <class B>
constexpr int FEW_SUMS = std::is_same_v<B, bf16> || std::is_same_v<B, float> ? 8 : FEW_BLOCK;
template <class B>
constexpr int64_t FEW_ACROSS = std::is_same_v<B, float> ? 16 : FEW_SUMS<B>;
#else
template <class B>
constexpr int FEW_SUMS = FEW_BLOCK;
template <class B>
constexpr int64_t FEW_ACROSS = 2 * FEW_SUMS<B>;
#endif

// B is asked for so many elements ahead of what is multiplied, not counting what lies between its rows or columns.
template <class B>
constexpr int64_t FEW_AHEAD = 16384 / int64_t(sizeof(B));

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
#if CASTILE_PAIRS
// Adds the products of as many neighbours as a vector of bf16 holds.
CASTILE_INLINE void add_products(Vector& sum, const bf16* x, const bf16* y) {
  const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// The sums of four vectors.
CASTILE_INLINE void sums_of(const Vector* x, float* to) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX__)
  const __m256 ab = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), cd = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int j = 0; j < 4; ++j) to[j] = sum_of(x[j]);
#endif
}

// Two vectors' worth of neighbours, those at even places and those at odd ones: so bf16 is widened in a step for each.
struct Apart {
  Vector even, odd;
};
CASTILE_INLINE Apart apart(const bf16* p) {
  const Words both = *reinterpret_cast<const WordsInMemory*>(p);
  return {(Vector)(both << 16), (Vector)(both & 0xffff0000u)};
}
// The same of whatever lies as f32, or back.
CASTILE_INLINE void apart(float* to, const float* from) {
  float lanes[2 * LANES];
  std::memcpy(lanes, from, sizeof(lanes));
  CASTILE_SIMD
  for (int l = 0; l < LANES; ++l) to[l] = lanes[2 * l], to[LANES + l] = lanes[2 * l + 1];
}
CASTILE_INLINE void together(float* to, const float* from) {
  float lanes[2 * LANES];
  std::memcpy(lanes, from, sizeof(lanes));
  CASTILE_SIMD
  for (int l = 0; l < LANES; ++l) to[2 * l] = lanes[l], to[2 * l + 1] = lanes[LANES + l];
}
// Whether few rows meet B like that. What they meet it with, or put into, then lies so too.
template <class B>
constexpr bool IS_APART = std::is_same_v<B, bf16> && !PAIRS<B>;
template <class F>
CASTILE_INLINE void each_apart(float* x, int64_t row, int64_t m, int64_t n, F f) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j + 2 * LANES <= n; j += 2 * LANES) f(x + i * row + j);
  }
}

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
  constexpr int SUMS = (ROWS * COLUMNS + 3) / 4 * 4;
  Vector sum[SUMS] = {};
  int64_t p = 0;
  if constexpr (std::is_same_v<B, bf16>) {
    for (; p + 2 * LANES <= k; p += 2 * LANES) {
      CASTILE_UNROLL
      for (int j = 0; j < COLUMNS; ++j) {
        const B* const from = b + j * b_column + p;
        if (ahead) prefetch(from + ahead);
        if constexpr (IS_APART<B>) {
          const Apart x = apart(from);
          CASTILE_UNROLL
          for (int i = 0; i < ROWS; ++i) {
            const auto* const row = a.data + i * a.row + p;
            sum[i * COLUMNS + j] += load(row) * x.even;
            sum[i * COLUMNS + j] += load(row + LANES) * x.odd;
          }
        } else {
#if CASTILE_PAIRS
          CASTILE_UNROLL
          for (int i = 0; i < ROWS; ++i) add_products(sum[i * COLUMNS + j], a.data + i * a.row + p, from);
#endif
        }
      }
    }
  }
  for (; p + LANES <= k; p += LANES) {
    CASTILE_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      if (ahead) prefetch(b + j * b_column + p + ahead);
      const Vector x = load(b + j * b_column + p);
      CASTILE_UNROLL
      for (int i = 0; i < ROWS; ++i) sum[i * COLUMNS + j] += load(a.data + i * a.row + p) * x;
    }
  }
  float total[SUMS];
  CASTILE_UNROLL
  for (int s = 0; s < SUMS; s += 4) sums_of(sum + s, total + s);
  for (; p < k; ++p) {
    for (int s = 0; s < ROWS * COLUMNS; ++s) {
      total[s] += a.at(s / COLUMNS, p) * to<float>(b[s % COLUMNS * b_column + p]);
    }
  }
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    float* const at = c + i * c_row;
    CASTILE_UNROLL
    for (int j = 0; j < COLUMNS; ++j) at[j] = accumulate ? at[j] + total[i * COLUMNS + j] : total[i * COLUMNS + j];
  }
}

// Up to ROWS rows of C where the columns of B lie along k. All of them meet a few columns before the next ones are asked for.
template <class B, int ROWS = FEW_ROWS>
inline void dot_along(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k,
                      bool accumulate) {
  if constexpr (ROWS > 1) {
    if (m < ROWS) return dot_along<B, ROWS - 1>(c, a, b, m, n, k, accumulate);
  }
  constexpr int COLUMNS = side_by_side(ROWS, 8);
  const int64_t ahead = at_least(COLUMNS, FEW_AHEAD<B> / at_least(k, 1)) * b.column;
  int64_t j = 0;
  for (; j + COLUMNS <= n; j += COLUMNS) {
    dot_columns_along<ROWS, COLUMNS, B>(c.data + j, c.row, a, b.data + j * b.column, b.column, k, accumulate, ahead);
  }
  for (; j < n; ++j) {
    dot_columns_along<ROWS, 1, B>(c.data + j, c.row, a, b.data + j * b.column, b.column, k, accumulate, ahead);
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

// Adds a row of B to the sums of each row of C, or a pair of rows, which are brought side by side once for all of them.
// Sums of a row of C and the next one are WIDE apart.
template <int ROWS, int WIDE, class B>
CASTILE_INLINE void add_next(Vector* left, Vector* right, const FewUnit<B>* a, int64_t a_row, const B* b, int64_t b_row) {
#if CASTILE_PAIRS
  if constexpr (PAIRS<B>) {
    const Beside x = beside(b, b + b_row);
    CASTILE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      int32_t both;
      std::memcpy(&both, a + i * a_row, 4);
      const __m512bh y = (__m512bh)_mm512_set1_epi32(both);
      left[i * WIDE] = (Vector)_mm512_dpbf16_ps((__m512)left[i * WIDE], y, (__m512bh)x.left);
      right[i * WIDE] = (Vector)_mm512_dpbf16_ps((__m512)right[i * WIDE], y, (__m512bh)x.right);
    }
    return;
  }
#endif
  Apart x;
  if constexpr (IS_APART<B>) x = apart(b);
  else x = {load(b), load(b + LANES)};
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    const float weight = to<float>(a[i * a_row]);
    left[i * WIDE] += weight * x.even, right[i * WIDE] += weight * x.odd;
  }
}

// As `add_rows`; k is even where B is taken by pairs, and n a multiple of 2 * LANES. Sums stay in registers, so that B is
// asked for in short steps and not in bursts; they are of WIDE times 2 * LANES columns.
template <int ROWS, class B, int WIDE = PAIRS<B> ? 1 : side_by_side(2 * ROWS, 4)>
inline void add_steps(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t n, int64_t k, int64_t ahead) {
  constexpr int64_t STEP = PAIRS<B> ? 2 : 1, COLUMNS = WIDE * 2 * LANES;
  int64_t j = 0;
  for (; j + COLUMNS <= n; j += COLUMNS) {
    Vector left[ROWS * WIDE], right[ROWS * WIDE];
    CASTILE_UNROLL
    for (int s = 0; s < ROWS * WIDE; ++s) {
      const float* const at = c.data + s / WIDE * c.row + j + s % WIDE * 2 * LANES;
      left[s] = load(at), right[s] = load(at + LANES);
    }
    for (int64_t p = 0; p < k; p += STEP) {
      CASTILE_UNROLL
      for (int w = 0; w < WIDE; ++w) {
        const B* const from = b.data + p * b.row + j + w * 2 * LANES;
        if (ahead) {
          prefetch(from + ahead);
          if (STEP == 2 || sizeof(B) == 4) prefetch(from + ahead + (STEP == 2 ? b.row : LANES));
        }
        add_next<ROWS, WIDE, B>(left + w, right + w, a.data + p, a.row, from, b.row);
      }
    }
    CASTILE_UNROLL
    for (int s = 0; s < ROWS * WIDE; ++s) {
      float* const at = c.data + s / WIDE * c.row + j + s % WIDE * 2 * LANES;
      store(at, left[s]), store(at + LANES, right[s]);
    }
  }
  if constexpr (WIDE > 1) {
    if (j < n) add_steps<ROWS, B, 1>({c.data + j, c.row, 1}, a, {b.data + j, b.row, 1}, n - j, k, ahead);
  }
}

// The same for as many rows as there are, at most ROWS.
template <class B, int ROWS = FEW_SUMS<B>>
CASTILE_INLINE void add_steps_of(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t m, int64_t n,
                                 int64_t k, int64_t ahead) {
  if constexpr (ROWS > 1) {
    if (m < ROWS) return add_steps_of<B, ROWS - 1>(c, a, b, m, n, k, ahead);
  }
  add_steps<ROWS, B>(c, a, b, n, k, ahead);
}

// A few rows of B, which lie along n, are added to a few rows of C.
template <int ROWS, class B>
inline void add_across(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t n, int64_t k) {
  int64_t p = 0;
  for (; p + 4 <= k; p += 4) add_rows<ROWS, 4, B>(c, a.from(0, p), {b.data + p * b.row, b.row, 1}, n);
  for (; p < k; ++p) add_rows<ROWS, 1, B>(c, a.from(0, p), {b.data + p * b.row, b.row, 1}, n);
}

// The same for any number of rows.
template <class B>
inline void add_rest(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; i += FEW_BLOCK) {
    const Matrix<float> ci = {c.data + i * c.row, c.row, 1};
    switch (at_most(FEW_BLOCK, m - i)) {
      case 1: add_across<1, B>(ci, a.from(i, 0), b, n, k); break;
      case 2: add_across<2, B>(ci, a.from(i, 0), b, n, k); break;
      case 3: add_across<3, B>(ci, a.from(i, 0), b, n, k); break;
      default: add_across<4, B>(ci, a.from(i, 0), b, n, k); break;
    }
  }
}

// Rows of B that lie along n and are added together.
constexpr int64_t FEW_STEPS = 16;

// At most FEW_STEPS of them are added to all rows of C.
template <class B>
inline void add_part(Matrix<float> c, FewRows<FewUnit<B>> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k,
                     int64_t ahead) {
  const int64_t whole = !PAIRS<B> || k % 2 == 0 ? n / (2 * LANES) * (2 * LANES) : 0;
  int64_t blocks = (m + FEW_SUMS<B> - 1) / FEW_SUMS<B>;
  for (int64_t i = 0; i < m && whole > 0; --blocks) {
    const int64_t rows = (m - i + blocks - 1) / blocks;
    add_steps_of<B>({c.data + i * c.row, c.row, 1}, a.from(i, 0), b, rows, whole, k, i ? 0 : ahead);
    i += rows;
  }
  c.data += whole, b.data += whole, n -= whole;
  if (n > 0) add_rest<B>(c, a, b, m, n, k);
}

#if defined(CASTILE_AMX)
// Rows of B that are brought into a panel together, a tile deep: what comes next is asked for meanwhile.
constexpr int64_t FEW_TILES = 2 * TILE;

// A few rows of C where rows of B lie along n, by the matrix unit.
template <class A, class B>
inline void add_tiles_across(Matrix<float> c, Matrix<const A> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k,
                             bool accumulate, float* local) {
  using U = Unit<bf16>;
  U* const panel = reinterpret_cast<U*>(local);
  const Matrix<const U> rows = rows_of<bf16, A>(a, m, k, local + k * PANEL);
  for (int64_t p = 0; p < k; p += FEW_TILES) {
    const int64_t steps = at_most(FEW_TILES, k - p);
    const NearRows<bf16, bf16> ap = {rows.data + p / 2 * rows.column, rows.row, rows.column};
    dot_panels<U>(Into<float>{c, accumulate || p > 0}, ap, m, n, depth<bf16>(steps), [&](int64_t j, int64_t width) CASTILE_INLINED {
      pack_panel<bf16, B>({b.data + p * b.row + j, b.row, 1}, steps, width, panel, FEW_TILES);
      return panel_at<const U>(panel, depth<bf16>(steps));
    });
  }
}
#endif

// As `dot_packed`, where B lies anyhow: panel by panel is packed into ``local``, which holds (PANEL + m) * k floats. If
// ORDERED, a row's sums are taken as they are among many rows, even where there are few.
template <class Operand, class A, class B, bool ORDERED = false, class C>
inline void dot(Matrix<C> c, Matrix<const A> a, Matrix<const B> b, int64_t m, int64_t n, int64_t k, bool accumulate,
                float* local) {
  using U = Unit<Operand>;
  if constexpr (READS_AS_IT_IS<Operand, B> && !ORDERED) {
#if defined(CASTILE_AMX)
    if constexpr (PAIRS<B>) {
      if (b.column == 1 && b.row != 1 && m > FEW_BLOCK && m <= TILE && has_tiles()) {
        return add_tiles_across(c, a, b, m, n, k, accumulate, local);
      }
    }
#endif
    if (b.row == 1 ? m <= FEW_ROWS : b.column == 1 && m <= FEW_ACROSS<B>) {
      const FewRows<FewUnit<B>> few = few_rows<Operand, FewUnit<B>, A>(a, m, k, local);
      if (b.row == 1) {
        // They are a copy, as bf16 had to be widened.
        if constexpr (IS_APART<B>) each_apart(const_cast<float*>(few.data), few.row, m, k, [](float* x) { apart(x, x); });
        return dot_along<B>({c.data, c.row, 1}, few, b, m, n, k, accumulate);
      }
      for (int64_t i = 0; i < m && !accumulate; ++i) std::fill_n(c.data + i * c.row, n, 0.0f);
      if (IS_APART<B> && accumulate) each_apart(c.data, c.row, m, n, [](float* x) { apart(x, x); });
      const int64_t ahead = at_least(FEW_STEPS, FEW_AHEAD<B> / at_least(n, 1)) * b.row;
      for (int64_t p = 0; p < k; p += FEW_STEPS) {
        add_part<B>(c, few.from(0, p), {b.data + p * b.row, b.row, 1}, m, n, at_most(FEW_STEPS, k - p), ahead);
      }
      if (IS_APART<B>) each_apart(c.data, c.row, m, n, [](float* x) { together(x, x); });
      return;
    }
  }
  const auto rows = rows_for<Operand, A>(a, m, k, local + k * PANEL);
  const auto panel_of = [&](int64_t j, int64_t width) CASTILE_INLINED -> Panel<const U> {
    if constexpr (std::is_same_v<B, float> && std::is_same_v<Operand, float>) {
      if (width == PANEL && b.column == 1) return {b.data + j, b.row, LANES};
    }
    U* const panel = reinterpret_cast<U*>(local);
    pack_panel<Operand, B>({b.data + j * b.column, b.row, b.column}, k, width, panel);
    return panel_at<const U>(panel, depth<Operand>(k));
  };
  dot_panels<U>(Into{c, accumulate}, rows, m, n, depth<Operand>(k), panel_of);
}

// How large a number is, by its bits without the sign; from ENDLESS on it is an infinity or no number.
template <class T>
struct Size {
  using Code = uint32_t;
  static constexpr Code MASK = 0x7fffffffu, ENDLESS = 0x7f800000u;
};
template <class Bits, int EXPONENT, int MANTISSA, bool FINITE>
struct Size<Narrow<Bits, EXPONENT, MANTISSA, FINITE>> {
  using Code = Bits;
  static constexpr Code MASK = Code((1u << (EXPONENT + MANTISSA)) - 1);
  static constexpr Code ENDLESS = Code(FINITE ? MASK : Narrow<Bits, EXPONENT, MANTISSA, FINITE>::INFINITE);
};

template <class T>
inline bool all_finite(Matrix<const T> b, int64_t m, int64_t n) {
  if (b.row == 1 && b.column != 1) return all_finite<T>({b.data, b.column, 1}, n, m);
  using S = Size<T>;
  using Code = typename S::Code;
  constexpr int MANY = VECTOR_BYTES / int(sizeof(Code));
  typedef Code Codes __attribute__((vector_size(VECTOR_BYTES)));
  typedef Codes CodesInMemory __attribute__((aligned(alignof(Code)), may_alias));
  const auto larger = [](auto x, auto y) { return x > y ? x : y; };
  Codes most[2] = {};
  Code alone = 0;
  for (int64_t i = 0; i < m; ++i) {
    const T* const row = b.data + i * b.row;
    int64_t j = 0;
    for (; b.column == 1 && j + 2 * MANY <= n; j += 2 * MANY) {
      CASTILE_UNROLL
      for (int v = 0; v < 2; ++v) {
        most[v] = larger(*reinterpret_cast<const CodesInMemory*>(row + j + v * MANY) & S::MASK, most[v]);
      }
    }
    for (; j < n; ++j) alone = larger(Code(bits<Code>(row[j * b.column]) & S::MASK), alone);
  }
  most[0] = larger(most[0], most[1]);
  for (int l = 0; l < MANY; ++l) alone = larger(Code(most[0][l]), alone);
  return alone < S::ENDLESS;
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
