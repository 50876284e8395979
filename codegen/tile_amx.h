// Products of bf16 by the matrix unit of Intel's processors (AMX), where there is one and the system lets it be used.
#pragma once

namespace castile {
namespace {

// Rows of a strip: those whose sums stay in registers over the whole of a product.
template <class Operand>
constexpr int64_t STRIP_ROWS = 6;
// Those of a strip whose rows lie across memory: as many as `NearRows` brings at once.
template <class Operand>
constexpr int64_t ROWS_ACROSS = 24;

#if defined(CASTILE_AMX)
template <>
constexpr int64_t STRIP_ROWS<bf16> = 32;
template <>
constexpr int64_t ROWS_ACROSS<bf16> = 32;

// Rows of a tile register; as many words go in a row: columns of B and of the sums, pairs along k of A.
constexpr int64_t TILE = 16;
// Rows and columns of the sums that four registers hold.
constexpr int64_t TILE_BLOCK = 2 * TILE;

// The system gives a process the registers when it asks for them, all its threads at once.
inline bool has_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// The registers of a thread as whole tiles while this lives; others may use them before and after.
struct Tiles {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  // Of m rows of A; those of B, in registers 6 and 7, have all that there are.
  CASTILE_INLINE explicit Tiles(int64_t m) {
    Shapes shapes;
    for (int t = 0; t < 8; ++t) {
      shapes.row_bytes[t] = TILE * sizeof(uint32_t);
      shapes.rows[t] = uint8_t(t < 6 ? at_most(m, TILE) : TILE);
    }
    // The instructions are opaque to the compiler: it must not believe that nobody reads what it stores.
    asm volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  CASTILE_INLINE ~Tiles() { _tile_release(); }
};

// Sums of TALL ? 32 : 16 rows and 32 columns over TILE pairs along k, onto those in registers 0 to 3. Columns lie in slices of
// 16. Loads stand between products, each as late as it can.
template <bool TALL>
CASTILE_INLINE void add_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_slice) {
  const int64_t row_bytes = a_row * int64_t(sizeof *a);
  constexpr int64_t B_BYTES = TILE * int64_t(sizeof *b);
  _tile_loadd(6, b, B_BYTES);
  _tile_loadd(4, a, row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + b_slice, B_BYTES);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (TALL) {
    _tile_loadd(5, a + TILE * a_row, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Pairs past the last whole tile along k, with zeros after them.
struct TileRest {
  static constexpr int64_t SLICE = TILE * TILE;
  alignas(64) uint32_t a[TILE_BLOCK * TILE];
  alignas(64) uint32_t b[2 * TILE_BLOCK / TILE * SLICE];
};

// Sums of k pairs into a place whose rows lie ``row`` apart, over what is there or onto it.
template <bool TALL>
CASTILE_INLINE void sum_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_slice, int64_t k,
                              const TileRest& rest, int64_t column, float* sums, int64_t row, bool accumulate) {
  const int64_t row_bytes = row * int64_t(sizeof *sums);
  float* const lower = sums + TILE * row;
  if (accumulate) {
    _tile_loadd(0, sums, row_bytes);
    _tile_loadd(1, sums + TILE, row_bytes);
    if constexpr (TALL) {
      _tile_loadd(2, lower, row_bytes);
      _tile_loadd(3, lower + TILE, row_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TALL) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  int64_t p = 0;
  for (; p + TILE <= k; p += TILE) add_tiles<TALL>(a + p, a_row, b + p * TILE, b_slice);
  if (p < k) add_tiles<TALL>(rest.a, TILE, rest.b + column / TILE * TileRest::SLICE, TileRest::SLICE);
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + TILE, row_bytes);
  if constexpr (TALL) {
    _tile_stored(2, lower, row_bytes);
    _tile_stored(3, lower + TILE, row_bytes);
  }
}

// Where a block's sums go that do not lie as registers are stored: rows from ``first`` on, at most ``width`` columns.
template <class Put>
CASTILE_INLINE void put_block(const Put& put, int64_t i, int64_t j, const float* sums, int64_t first, int64_t rows,
                              int64_t width) {
  if (width >= TILE_BLOCK) {
    auto place = put.from(i + first, j);
    for (int64_t r = first; r < rows; ++r) {
      place.whole(0, load(sums + r * TILE_BLOCK));
      place.whole(LANES, load(sums + r * TILE_BLOCK + LANES));
      place.next();
    }
    return;
  }
  for (int64_t r = first; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += LANES) put.some(i + r, j + c, load(sums + r * TILE_BLOCK + c), width - c);
  }
}

// All m rows of one panel, of which ``width`` columns exist and all may be read; k pairs. The last rows are taken with
// those before them, as registers are not cut, and go where they belong alone. A sum is added up in the same order wherever
// its block lies.
template <class Put>
CASTILE_APART void dot_tiles(const Put& put, int64_t j0, const uint32_t* a, int64_t a_row, const uint32_t* b,
                             int64_t b_slice, int64_t width, int64_t m, int64_t k) {
  const int64_t whole = k / TILE * TILE, left = k - whole;
  TileRest rest;
  for (int64_t s = 0; s < 2 * TILE_BLOCK / TILE && left; ++s) {
    const uint32_t* const from = b + s * b_slice + whole * TILE;
    uint32_t* const into = rest.b + s * TileRest::SLICE;
    std::fill_n(std::copy_n(from, left * TILE, into), (TILE - left) * TILE, 0u);
  }
  const int64_t rows = m >= TILE_BLOCK ? TILE_BLOCK : at_most(m, TILE);
  for (int64_t i = 0; i < m; i += rows) {
    const int64_t from = at_most(i, m - rows), first = i - from;
    const uint32_t* const ai = a + from * a_row;
    for (int64_t r = 0; r < rows && left; ++r) {
      const __mmask16 there = __mmask16((1u << left) - 1);
      _mm512_store_si512(rest.a + r * TILE, _mm512_maskz_loadu_epi32(there, ai + r * a_row + whole));
    }
    for (int64_t j = 0; j < width; j += TILE_BLOCK) {
      const uint32_t* const bj = b + j / TILE * b_slice;
      const auto sum = [&](float* sums, int64_t row, bool accumulate) CASTILE_INLINED {
        asm volatile("" ::"r"(&rest), "r"(sums) : "memory");
        if (rows == TILE_BLOCK) sum_tiles<true>(ai, a_row, bj, b_slice, k, rest, j, sums, row, accumulate);
        else sum_tiles<false>(ai, a_row, bj, b_slice, k, rest, j, sums, row, accumulate);
        asm volatile("" ::"r"(sums) : "memory");
      };
      const int64_t some = at_most(TILE_BLOCK, width - j);
      alignas(64) float sums[TILE_BLOCK * TILE_BLOCK];
      if constexpr (TO_MEMORY<Put>) {
        if (some == TILE_BLOCK && first == 0) {
          sum(put.c.data + i * put.c.row + j0 + j, put.c.row, put.accumulate);
          continue;
        }
        if (put.accumulate) {
          std::fill_n(sums, TILE_BLOCK * TILE_BLOCK, 0.0f);
          for (int64_t r = first; r < rows; ++r) {
            std::copy_n(put.c.data + (from + r) * put.c.row + j0 + j, some, sums + r * TILE_BLOCK);
          }
        }
        sum(sums, TILE_BLOCK, put.accumulate);
        put_block(Put{put.c, false}, from, j0 + j, sums, first, rows, some);
      } else {
        sum(sums, TILE_BLOCK, false);
        put_block(put, from, j0 + j, sums, first, rows, some);
      }
    }
  }
}
#endif

}  // namespace
}  // namespace castile
