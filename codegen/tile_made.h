// Products whose right operand is made where it is multiplied: unpacked, looked up, scaled.
#pragma once

namespace castile {
namespace {

// B that is made where it is multiplied: make(k, j, n) gives the units of PERIOD rows from k on, a multiple of it, in LANES
// columns from j, of which n exist. Nothing of it is stored but the panel at hand, and for few rows not even that.

// N units along k.
template <class V, int N>
struct Units {
  V data[N];
  static constexpr int DEPTH = N;
};

#if CASTILE_PAIRS
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
template <int A, int B, int BITS, int V, int W>
CASTILE_INLINE Words pairs(Field<A, BITS, V> low, Field<B, BITS, W> high) {
  if constexpr (BITS <= 5) {
    static constexpr Numbers<BITS> NUMBERS;
    constexpr int LEFT = B < 16 ? 16 - B : 0, RIGHT = B < 16 ? 0 : B - 16;
    __m512i both;
#if defined(__AVX512VBMI__)
    if constexpr (V == W) {
      both = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(A | B << 16 | int64_t(A | 32 | (B | 32) << 16) << 32), (__m512i)low.word);
    } else
#endif
    {
      const Words x = low.word >> A, y = B < 16 ? high.word << LEFT : high.word >> RIGHT;
      both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), (__m512i)x, (__m512i)y, 0xca);
    }
    return (Words)_mm512_permutexvar_epi16(both, _mm512_loadu_si512(NUMBERS.lane));
  } else {
    return pairs(floats(low), floats(high));
  }
}
#endif

// Four fields of one word, a byte each.
template <int A, int B, int C, int D, int BITS, int WORD>
CASTILE_INLINE Words beside(Field<A, BITS, WORD> a, Field<B, BITS, WORD> b, Field<C, BITS, WORD> c, Field<D, BITS, WORD> d) {
#if defined(__AVX512VBMI__)
  if constexpr (BITS <= 8) {
    constexpr int64_t AT = A | B << 8 | C << 16 | int64_t(D) << 24;
    const __m512i places = _mm512_set1_epi64(AT | (AT + 0x20202020) << 32);
    return (Words)_mm512_multishift_epi64_epi8(places, (__m512i)a.word) & (a.MASK * 0x01010101u);
  }
#endif
  return beside(integers(a), integers(b), integers(c), integers(d));
}
template <class A, class B, class C, class D>
CASTILE_INLINE Words beside(A a, B b, C c, D d) {
  return beside(integers(a), integers(b), integers(c), integers(d));
}

template <class Operand, int I, class U>
CASTILE_INLINE void fill_whole(U&) {}
template <class Operand, int I, class U, class A, class B, class C, class D, class... Rest>
CASTILE_INLINE void fill_whole(U& units, A a, B b, C c, D d, Rest... rest) {
  using W = Traits<Operand>;
  if constexpr (W::COUNT == 4) {
    units.data[I] = beside(a, b, c, d) ^ (W::IS_RAISED ? RAISE : 0u);
  } else if constexpr (W::COUNT == 2) {
    units.data[I] = beside(integers(a), integers(b)), units.data[I + 1] = beside(integers(c), integers(d));
  } else {
    units.data[I] = beside(integers(a)), units.data[I + 1] = beside(integers(b));
    units.data[I + 2] = beside(integers(c)), units.data[I + 3] = beside(integers(d));
  }
  fill_whole<Operand, I + 4 / W::COUNT>(units, rest...);
}

template <class Operand, int I, class U, class A, class... Rest>
CASTILE_INLINE void fill_units(U& units, A a, Rest... rest) {
  units.data[I] = floats(a);
  if constexpr (sizeof...(rest) > 0) fill_units<Operand, I + 1>(units, rest...);
}
#if CASTILE_PAIRS
template <class Operand, int I, class U, class A, class B, class... Rest>
CASTILE_INLINE void fill_pairs(U& units, A a, B b, Rest... rest) {
  units.data[I] = pairs(a, b);
  if constexpr (sizeof...(rest) > 0) fill_pairs<Operand, I + 1>(units, rest...);
}
#endif

// Values of neighbouring rows as units: an even number, of bytes a multiple of four.
template <class Operand, class First, class... Rest>
CASTILE_INLINE auto units(First first, Rest... rest) {
  constexpr int COUNT = 1 + sizeof...(rest);
  if constexpr (IS_WHOLE<Operand>) {
    Units<Words, COUNT / Traits<Operand>::COUNT> made;
    fill_whole<Operand, 0>(made, first, rest...);
    return made;
  } else
#if CASTILE_PAIRS
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
inline void pack_panel_made(Make make, int64_t k, int64_t j, int64_t n, Unit<Operand>* data) {
  using U = Made<Make>;
  const Panel<Unit<Operand>> panel = panel_at(data, height<Operand, PERIOD>(k));
  for (int64_t p = 0; p < k; p += PERIOD) {
    Unit<Operand>* const into = panel.data + p / PERIOD * U::DEPTH * panel.row;
    CASTILE_UNROLL
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      const int64_t left = n - j - v * LANES;
      U made{};
      if (left > 0) made = make(p, j + v * LANES, left);
      CASTILE_UNROLL
      for (int i = 0; i < U::DEPTH; ++i) store(into + i * panel.row + v * panel.slice, made.data[i]);
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
#if CASTILE_PAIRS
CASTILE_INLINE void multiply_add(Vector& sum, uint32_t x, Words b) {
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)b);
}
#endif

// As `dot_packed`, of panels that `pack_made` made. ``local`` holds m * k floats.
template <class Operand, int PERIOD, class Make, class A, class Put>
inline void dot_packed_made(Put put, Matrix<const A> a, const void* panels, int64_t m, int64_t n, int64_t k,
                            float* local) {
  using U = Unit<Operand>;
  const auto rows = rows_for<Operand, A>(a, m, k, local);
  const int64_t high = height<Operand, PERIOD>(k);
  const auto panel_of = [&](int64_t j, int64_t) CASTILE_INLINED {
    return panel_at(static_cast<const U*>(panels) + j * high, high);
  };
  dot_panels<U>(put, rows, m, n, depth<Operand>(k), panel_of);
}

// BLOCKS blocks of rows of B times a few rows of A are added to C, which stays near and has room for whole vectors. Some
// vectors go side by side, as a sum waits for itself; the order of each is that of `dot_block`.
template <int ROWS, int BLOCKS, int PERIOD, int VECTORS, class U, class Make>
CASTILE_INLINE void add_made(Matrix<Element<U>> c, const U* a, int64_t a_row, Make make, int64_t k, int64_t j, int64_t n) {
  constexpr int DEPTH = Made<Make>::DEPTH;
  SumOf<U> sum[ROWS][VECTORS];
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
inline void add_blocks(Matrix<Element<U>> c, const U* a, int64_t a_row, Make make, int64_t k, int64_t n) {
  constexpr int VECTORS = ROWS == 1 && PANEL_VECTORS == 4 ? 4 : 2;
  int64_t j = 0;
  for (; j + VECTORS * LANES <= n; j += VECTORS * LANES) add_made<ROWS, BLOCKS, PERIOD, VECTORS>(c, a, a_row, make, k, j, n);
  for (; j < n; j += LANES) add_made<ROWS, BLOCKS, PERIOD, 1>(c, a, a_row, make, k, j, n);
}

template <int ROWS, class Operand, int PERIOD, class Make>
inline void dot_few_made(Matrix<Element<Unit<Operand>>> c, const Unit<Operand>* a, int64_t a_row, Make make, int64_t n,
                         int64_t k) {
  constexpr int STEPS = 4, DEPTH = Made<Make>::DEPTH;
  for (int i = 0; i < ROWS; ++i) std::fill_n(c.data + i * c.row, c.row, first_of(a + i * a_row));
  int64_t p = 0;
  for (; p + STEPS * PERIOD <= k; p += STEPS * PERIOD)
    add_blocks<ROWS, STEPS, PERIOD>(c, a + p / PERIOD * DEPTH, a_row, make, p, n);
  for (; p < k; p += PERIOD) add_blocks<ROWS, 1, PERIOD>(c, a + p / PERIOD * DEPTH, a_row, make, p, n);
}

// Where what B is made of lies in tiles, a panel of columns after another, a few rows' sums stay in registers for all of k.
template <int ROWS, int VECTORS, int PERIOD, class Put, class U, class Make>
CASTILE_INLINE void dot_made_columns(const Put& put, const U* a, int64_t a_row, Make make, int64_t j, int64_t n,
                                     int64_t k) {
  constexpr int DEPTH = Made<Make>::DEPTH;
  SumOf<U> sum[ROWS][VECTORS];
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = spread(first_of(a + i * a_row));
  }
  for (int64_t p = 0; p < k; p += PERIOD) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const auto made = make(p, j + v * LANES, n - j - v * LANES);
      CASTILE_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        CASTILE_UNROLL
        for (int q = 0; q < DEPTH; ++q) multiply_add(sum[i][v], a[i * a_row + p / PERIOD * DEPTH + q], made.data[q]);
      }
    }
  }
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) put.some(i, j + v * LANES, sum[i][v], n - j - v * LANES);
  }
}

template <int ROWS, int PERIOD, class Put, class U, class Make>
inline void dot_made_rows(const Put& put, const U* a, int64_t a_row, Make make, int64_t n, int64_t k) {
  int64_t j = 0;
  if constexpr (ROWS == 1 && PANEL_VECTORS == 4) {  // as a sum waits for itself
    for (; j + 2 * PANEL <= n; j += 2 * PANEL) dot_made_columns<1, 2 * PANEL_VECTORS, PERIOD>(put, a, a_row, make, j, n, k);
  }
  for (; j + PANEL <= n; j += PANEL) dot_made_columns<ROWS, PANEL_VECTORS, PERIOD>(put, a, a_row, make, j, n, k);
  for (; j < n; j += LANES) dot_made_columns<ROWS, 1, PERIOD>(put, a, a_row, make, j, n, k);
}

// As `dot_packed`, where B is made. ``local`` holds PANEL * (k + PERIOD) + m * k floats, or, if that is
// more, FEW_BLOCK * (n + LANES + 2 * (k + PERIOD)).
template <class Operand, int PERIOD, class A, class Make, class Put>
inline void dot_made_anyhow(Put put, Matrix<const A> a, Make make, int64_t m, int64_t n, int64_t k, float* local) {
  using U = Unit<Operand>;
  if (m <= FEW_BLOCK) {
    constexpr int LEAD = Traits<Operand>::LEAD;
    const int64_t width = height<Operand, PERIOD>(k) + LEAD;
    const int64_t c_row = tiles(n, LANES) * LANES;
    const Matrix<Element<U>> c = {reinterpret_cast<Element<U>*>(local), c_row, 1};
    float* const rest = local + m * c_row;
    Matrix<const U> rows = rows_of<Operand, A>(a, m, k, rest + m * width);
    if (k % PERIOD != 0) {
      // With zeros after them, as the last block of B goes beyond k.
      U* const copy = reinterpret_cast<U*>(rest) + LEAD;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t p = -LEAD; p < width - LEAD; ++p) {
          copy[i * width + p] = p < depth<Operand>(k) ? rows.data[i * rows.row + p] : U{};
        }
      }
      rows = {copy, width, 1};
    }
    switch (m) {
      case 1: dot_few_made<1, Operand, PERIOD>(c, rows.data, rows.row, make, n, k); break;
      case 2: dot_few_made<2, Operand, PERIOD>(c, rows.data, rows.row, make, n, k); break;
      case 3: dot_few_made<3, Operand, PERIOD>(c, rows.data, rows.row, make, n, k); break;
      case 4: dot_few_made<4, Operand, PERIOD>(c, rows.data, rows.row, make, n, k); break;
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
  const auto rows = rows_for<Operand, A>(a, m, k, rest);
  const auto panel_of = [&](int64_t j, int64_t) CASTILE_INLINED {
    pack_panel_made<Operand, PERIOD>(make, k, j, n, panel);
    return panel_at<const U>(panel, height<Operand, PERIOD>(k));
  };
  dot_panels<U>(put, rows, m, n, depth<Operand>(k), panel_of);
}

// The same; few rows of whole blocks and columns that are TILED leave the registers once.
template <class Operand, int PERIOD, bool TILED, class A, class Make, class Put>
CASTILE_INLINE void dot_made(Put put, Matrix<const A> a, Make make, int64_t m, int64_t n, int64_t k, float* local) {
  if constexpr (TILED) {
    if (m <= FEW_BLOCK && k % PERIOD == 0) {
      const auto rows = rows_of<Operand, A>(a, m, k, local);
      switch (m) {
        case 1: dot_made_rows<1, PERIOD>(put, rows.data, rows.row, make, n, k); break;
        case 2: dot_made_rows<2, PERIOD>(put, rows.data, rows.row, make, n, k); break;
        case 3: dot_made_rows<3, PERIOD>(put, rows.data, rows.row, make, n, k); break;
        case 4: dot_made_rows<4, PERIOD>(put, rows.data, rows.row, make, n, k); break;
      }
      return;
    }
  }
  dot_made_anyhow<Operand, PERIOD, A>(put, a, make, m, n, k, local);
}

}  // namespace
}  // namespace castile
