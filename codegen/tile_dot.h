// Products of matrices: blocks of sums held in registers, over rows and panels as `tile_pack.h` lays them.
#pragma once

namespace castile {
namespace {

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
