// Products of matrices: blocks of sums held in registers, over rows and panels as `tile_pack.h` lays them.
#pragma once

namespace castile {
namespace {

CASTILE_INLINE void multiply_add(Vector& sum, float x, const float* b) { sum += x * load(b); }
#if CASTILE_PAIRS
CASTILE_INLINE void multiply_add(Vector& sum, uint32_t x, const uint32_t* b) {
  const __m512i pairs = _mm512_loadu_si512(b);
  sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)pairs);
}
#endif

// ROWS x (VECTORS * LANES) sums from (i, j) on, held in registers over the whole of k. Matrices come as their members: what
// is copied as a whole has to wait for its parts to be stored, and these for the sums of the block before.
template <int ROWS, int VECTORS, class Put, class U>
CASTILE_APART void dot_block(const Put& put, int64_t i0, int64_t j0, const U* a, int64_t a_row, int64_t a_column,
                             const U* b, int64_t b_row, int64_t b_slice, int64_t k_n) {
  const int64_t vector = to_next_vector<U>(b_slice);
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
      for (int v = 0; v < VECTORS; ++v) multiply_add(sum[i][v], x, b + k * b_row + v * vector);
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
                             int64_t a_column, const U* b, int64_t b_row, int64_t b_slice, int64_t k) {
  switch (rows) {
    case 1: dot_block<1, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, b_slice, k); break;
    case 2: dot_block<2, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, b_slice, k); break;
    case 3: dot_block<3, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, b_slice, k); break;
    case 4: dot_block<4, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, b_slice, k); break;
    case 5: dot_block<5, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, b_slice, k); break;
    default: dot_block<6, VECTORS>(put, i, j, a, a_row, a_column, b, b_row, b_slice, k); break;
  }
}

// All rows of one panel of columns, of which ``width`` exist. The rows are split evenly: 16 are 6 + 5 + 5, as a block
// of few rows waits for loads.
template <int VECTORS, class Put, class U, class RowsOfA>
inline void dot_panel(const Put& put, int64_t j, RowsOfA& a, const U* b, int64_t b_row, int64_t b_slice,
                      int64_t width, int64_t m, int64_t k) {
  constexpr int64_t COLUMNS = VECTORS * LANES;
  // Only whole blocks go from registers into a function: those at an edge go by way of memory, as each block that is made
  // for a function takes the compiler as long as the rest of a kernel.
  constexpr bool to_memory = TO_MEMORY<Put>;
  const int64_t a_row = a.row, a_column = a.column;
  int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t i = 0; i < m; --blocks) {
    const int64_t rows = (m - i + blocks - 1) / blocks;
    const U* const ai = a.from(i, rows);
    if (width == COLUMNS && (to_memory || (VECTORS == PANEL_VECTORS && rows == BLOCK_ROWS))) {
      if constexpr (to_memory) dot_rows<VECTORS>(put, i, j, rows, ai, a_row, a_column, b, b_row, b_slice, k);
      else dot_block<BLOCK_ROWS, PANEL_VECTORS>(put, i, j, ai, a_row, a_column, b, b_row, b_slice, k);
    } else {
      Element<U> edge[BLOCK_ROWS * COLUMNS];
      const Into<Element<U>> into = {{edge, COLUMNS, 1}, false};
      dot_rows<VECTORS>(into, 0, 0, rows, ai, a_row, a_column, b, b_row, b_slice, k);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; c += LANES) put.some(i + r, j + c, load(&edge[r * COLUMNS + c]), width - c);
      }
    }
    i += rows;
  }
}

// A[m, k] B[k, n] of operands as they are read; ``panel_of(j, width)`` gives the panel of so many columns from j on.
template <class U, class Put, class RowsOfA, class PanelOf>
CASTILE_INLINE void dot_panels(const Put& put, RowsOfA a, int64_t m, int64_t n, int64_t k, PanelOf panel_of) {
#if defined(CASTILE_AMX)
  if constexpr (IN_SLICES<U>) {
    if (m > 0 && a.column == 1 && has_tiles()) {
      const Tiles tiles(m);
      for (int64_t j = 0; j < n; j += PANEL) {
        const int64_t width = at_most(PANEL, n - j);
        const Panel<const U> b = panel_of(j, width);
        dot_tiles(put, j, a.data, a.row, b.data, b.slice, width, m, k);
      }
      return;
    }
  }
#endif
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t width = at_most(PANEL, n - j);
    const Panel<const U> b = panel_of(j, width);
    if (width <= LANES) dot_panel<1>(put, j, a, b.data, b.row, b.slice, width, m, k);
    else dot_panel<PANEL_VECTORS>(put, j, a, b.data, b.row, b.slice, width, m, k);
  }
}

// A[m, k] B[k, n] in f32, operands rounded to Operand first, B packed. ``local`` holds m * k floats.
template <class Operand, class A, class Put>
inline void dot_packed(Put put, Matrix<const A> a, Panels<Operand> b, int64_t m, int64_t n, int64_t k, float* local) {
  using U = Unit<Operand>;
  const auto rows = rows_for<Operand, A>(a, m, k, local);
  dot_panels<U>(put, rows, m, n, depth<Operand>(k), [&](int64_t j, int64_t) CASTILE_INLINED { return b.at(j); });
}

}  // namespace
}  // namespace castile
