// Products of matrices: operands packed into panels, blocks of sums held in registers.
#pragma once

namespace castile {
namespace {

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
struct Traits {
  using Unit = std::conditional_t<PAIRS<Operand>, uint32_t, float>;
  static constexpr int COUNT = PAIRS<Operand> ? 2 : 1, LEAD = 0;
};
template <class A, class B>
struct Traits<Whole<A, B>> : WholeTraits<Whole<A, B>> {};

template <class Operand>
using Unit = typename Traits<Operand>::Unit;

// Units along k.
template <class Operand>
constexpr int64_t depth(int64_t k) {
  return (k + Traits<Operand>::COUNT - 1) / Traits<Operand>::COUNT;
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
template <class T>
struct Into {
  Matrix<T> c;
  bool accumulate;

  struct Place {
    T* at;
    int64_t row;
    bool accumulate;

    CASTILE_INLINE void whole(int64_t j, Loaded<T> x) const { store(at + j, accumulate ? load(at + j) + x : x); }
    CASTILE_INLINE void next() {
      at += row;
      // Step by step: with all addresses at hand before the sums are, there are too few registers for them.
      asm("" : "+r"(at));
    }
  };
  CASTILE_INLINE Place from(int64_t i, int64_t j) const { return {c.data + i * c.row + j, c.row, accumulate}; }
  CASTILE_INLINE void some(int64_t i, int64_t j, Loaded<T> x, int64_t left) const {
    T* const at = c.data + i * c.row + j;
    T edge[LANES];
    store(edge, x);
    for (int64_t l = 0; l < left && l < LANES; ++l) at[l] = accumulate ? at[l] + edge[l] : edge[l];
  }
};
template <class T>
Into(Matrix<T>, bool) -> Into<T>;
template <class Put>
constexpr bool TO_MEMORY = false;
template <class T>
constexpr bool TO_MEMORY<Into<T>> = true;

// Sums that go from registers into a function of row, column and value; rows of tiles have room for whole vectors.
template <class F>
struct Through {
  F take;

  struct Place {
    F take;
    int64_t i, j;

    template <class V>
    CASTILE_INLINE void whole(int64_t further, V x) const {
      take(i, j + further, x);
    }
    CASTILE_INLINE void next() { ++i; }
  };
  CASTILE_INLINE Place from(int64_t i, int64_t j) const { return {take, i, j}; }
  template <class V>
  CASTILE_INLINE void some(int64_t i, int64_t j, V x, int64_t left) const {
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
  SumOf<U> sum[ROWS][VECTORS];
  CASTILE_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CASTILE_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = spread(first_of(a + i * a_row));
  }
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
  constexpr bool to_memory = TO_MEMORY<Put>;
  int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t i = 0; i < m; --blocks) {
    const int64_t rows = (m - i + blocks - 1) / blocks;
    const U* const ai = a + i * a_row;
    if (width == COLUMNS && (to_memory || (VECTORS == PANEL_VECTORS && rows == BLOCK_ROWS))) {
      if constexpr (to_memory) dot_rows<VECTORS>(put, i, j, rows, ai, a_row, a_column, b, b_row, k);
      else dot_block<BLOCK_ROWS, PANEL_VECTORS>(put, i, j, ai, a_row, a_column, b, b_row, k);
    } else {
      Element<U> edge[BLOCK_ROWS * COLUMNS];
      dot_rows<VECTORS>(Into<Element<U>>{{edge, COLUMNS, 1}, false}, 0, 0, rows, ai, a_row, a_column, b, b_row, k);
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
#if defined(CASTILE_AMX)
  if constexpr (std::is_same_v<U, uint32_t>) {
    if (m >= TILE && k >= TILE && a.column == 1 && has_tiles()) {
      dot_tiles(put, j, a.data, a.row, b, b_row, width, m, k);
      return;
    }
  }
#endif
  if (width <= LANES) dot_panel<1>(put, j, a.data, a.row, a.column, b, b_row, width, m, k);
  else dot_panel<PANEL_VECTORS>(put, j, a.data, a.row, a.column, b, b_row, width, m, k);
}

template <class Operand, class T>
CASTILE_INLINE uint32_t pair(T low, T high) {
  return uint32_t(to<Operand>(low).raw) | uint32_t(to<Operand>(high).raw) << 16;
}

#if defined(__AVX512F__)
// into[j * PANEL + i] = from[i * row + j] for 16 x 16 words, of which ``read`` gives a row.
template <class B, class F>
CASTILE_INLINE void transpose(const B* from, int64_t row, uint32_t* into, F read) {
  __m512i a[16], b[16];
  CASTILE_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = read(from + i * row);
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
template <class B>
CASTILE_INLINE Beside beside(const B* low, const B* high) {
  static constexpr BesideOrder ORDER;
  const __m512i a = halves_of(low), b = halves_of(high);
  return {_mm512_permutex2var_epi16(a, _mm512_loadu_si512(ORDER.lane[0]), b),
          _mm512_permutex2var_epi16(a, _mm512_loadu_si512(ORDER.lane[1]), b)};
}
#endif

// Rows of B that are asked for ahead of those that are packed: a panel has a few lines of each, which nobody foresees.
constexpr int64_t PACK_AHEAD = 16;

// One panel of B: ``width`` columns, the rest of PANEL filled with zeros.
template <class Operand, class B>
inline void pack_panel(Matrix<const B> b, int64_t k, int64_t width, Unit<Operand>* panel) {
  [[maybe_unused]] constexpr bool AS_IT_IS = std::is_same_v<Operand, B>;
  int64_t done = 0;  // units along k
#if defined(__AVX512F__)
  // Columns that lie along k: their words go by squares of 16.
  const auto by_squares = [&](auto read) {
    constexpr int64_t COUNT = Traits<Operand>::COUNT;
    if (b.row != 1 || width % 16 != 0) return;
    for (; (done + 16) * COUNT <= k; done += 16) {
      for (int64_t q = 0; q < width; q += 16) {
        uint32_t* const into = reinterpret_cast<uint32_t*>(panel) + done * PANEL + q;
        transpose(b.data + done * COUNT + q * b.column, b.column, into, read);
      }
    }
  };
  (void)by_squares;
  if constexpr (AS_IT_IS && sizeof(B) == 4) by_squares([](const B* p) CASTILE_INLINED { return _mm512_loadu_si512(p); });
#endif
#if defined(__AVX512BF16__)
  if constexpr (PAIRS<Operand> && (AS_IT_IS || IN_BF16<B>)) by_squares([](const B* p) CASTILE_INLINED { return halves_of(p); });
#endif
  if constexpr (IS_WHOLE<Operand>) {
#if defined(__AVX512F__)
    if constexpr (Traits<Operand>::COUNT == 4) {
      constexpr uint32_t RAISED_BY = Traits<Operand>::IS_RAISED ? RAISE : 0;
      by_squares([](const B* p) CASTILE_INLINED { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(RAISED_BY))); });
    }
#endif
    uint32_t* const into = reinterpret_cast<uint32_t*>(panel);
    pack_whole<Operand, B>(b.data, b.row, b.column, done, k, width, PANEL, into);
  } else {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS<Operand> && (AS_IT_IS || IN_BF16<B>)) {
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
  }
}

// B[k, n] as panels, one after another.
template <class Operand, class B>
inline void pack(Matrix<const B> b, int64_t k, int64_t n, void* panels) {
  for (int64_t j = 0; j < n; j += PANEL) {
    Unit<Operand>* const panel = static_cast<Unit<Operand>*>(panels) + j * depth<Operand>(k);
    pack_panel<Operand, B>({b.data + j * b.column, b.row, b.column}, k, at_most(PANEL, n - j), panel);
  }
}

// Calls body(i, j, column) for m rows and k columns, along memory.
template <class F>
CASTILE_INLINE void along_memory(int64_t column, int64_t m, int64_t k, F body) {
  if (column == 1) {
    for (int64_t i = 0; i < m; ++i) {
      CASTILE_SIMD
      for (int64_t j = 0; j < k; ++j) body(i, j, std::integral_constant<int64_t, 1>());
    }
  } else {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t i = 0; i < m; ++i) body(i, j, column);
    }
  }
}

// Rows of A that lie as the micro-kernel reads them: along k, and in need of no change. No others are told.
template <class Operand, class A>
CASTILE_INLINE bool lie_as_read(Matrix<const A> a, int64_t k) {
  constexpr int64_t COUNT = Traits<Operand>::COUNT;
  const bool in_words = a.row % COUNT == 0 && k % COUNT == 0 && reinterpret_cast<uintptr_t>(a.data) % sizeof(uint32_t) == 0;
  if constexpr (IS_WHOLE<Operand>) return COUNT == 4 && !Traits<Operand>::LEAD && a.column == 1 && in_words;
  else if constexpr (std::is_same_v<A, Operand>) return a.column == 1 && (PAIRS<Operand> ? in_words : sizeof(A) == 4);
  else return false;
}

// A as the micro-kernel reads it: where it lies if its rows lie along k and need no change, else copied.
template <class Operand, class A>
Matrix<const Unit<Operand>> copied_rows(Matrix<const A> a, int64_t m, int64_t k, float* copy);
template <class Operand, class A>
CASTILE_INLINE Matrix<const Unit<Operand>> rows_of(Matrix<const A> a, int64_t m, int64_t k, float* copy) {
  if (lie_as_read<Operand, A>(a, k)) {
    return {reinterpret_cast<const Unit<Operand>*>(a.data), a.row / Traits<Operand>::COUNT, 1};
  }
  return copied_rows<Operand, A>(a, m, k, copy);
}
template <class Operand, class A>
Matrix<const Unit<Operand>> copied_rows(Matrix<const A> a, int64_t m, int64_t k, float* copy) {
  if constexpr (IS_WHOLE<Operand>) {
    using W = Traits<Operand>;
    using U = Unit<Operand>;
    const int64_t width = depth<Operand>(k) + W::LEAD;
    copy_whole<Operand, A>(a.data, a.row, a.column, m, k, width, reinterpret_cast<uint32_t*>(copy));
    return {reinterpret_cast<const U*>(copy) + W::LEAD, width, 1};
  } else if constexpr (PAIRS<Operand>) {
    const int64_t n = depth<Operand>(k);
    uint32_t* const into = reinterpret_cast<uint32_t*>(copy);
#if defined(__AVX512BF16__)
    if constexpr (IN_BF16<A>) {
      if (a.column == 1) {
        for (int64_t i = 0; i < m; ++i) {
          const A* const from = a.data + i * a.row;
          int64_t p = 0;
          for (; p + 2 * LANES <= k; p += 2 * LANES) _mm512_storeu_si512(into + i * n + p / 2, halves_of(from + p));
          for (; p + 1 < k; p += 2) into[i * n + p / 2] = pair<Operand>(from[p], from[p + 1]);
          if (p < k) into[i * n + p / 2] = to<Operand>(from[p]).raw;
        }
        return {into, n, 1};
      }
    }
#endif
    along_memory(a.column, m, k / 2, [&](int64_t i, int64_t p, auto column) {
      const A* const from = a.data + i * a.row + 2 * p * column;
      into[i * n + p] = pair<Operand>(from[0], from[column]);
    });
    for (int64_t i = 0; i < m && k % 2; ++i) {
      into[i * n + n - 1] = to<Operand>(a.data[i * a.row + (k - 1) * a.column]).raw;
    }
    return {into, n, 1};
  } else {
    along_memory(a.column, m, k, [&](int64_t i, int64_t j, auto column) {
      copy[i * k + j] = to<float>(to<Operand>(a.data[i * a.row + j * column]));
    });
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

}  // namespace
}  // namespace castile
