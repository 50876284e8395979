// Products of bf16 by the matrix unit of Intel's processors (AMX), where there is one and the system lets it be used.
#pragma once

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define CASTILE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace castile {
namespace {

// Rows of a strip: those whose sums stay in registers over the whole of a product.
template <class Operand>
constexpr int64_t STRIP_ROWS = 6;

#if defined(CASTILE_AMX)
template <>
constexpr int64_t STRIP_ROWS<bf16> = 32;

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
  CASTILE_INLINE Tiles() {
    Shapes shapes;
    for (int t = 0; t < 8; ++t) shapes.row_bytes[t] = TILE * sizeof(uint32_t), shapes.rows[t] = TILE;
    // The instructions are opaque to the compiler: it must not believe that nobody reads what it stores.
    asm volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  CASTILE_INLINE ~Tiles() { _tile_release(); }
};

// Sums of TALL ? 32 : 16 rows and 32 columns over TILE pairs along k, onto those in registers 0 to 3.
template <bool TALL>
CASTILE_INLINE void add_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row) {
  _tile_loadd(6, b, b_row * int64_t(sizeof *b));
  _tile_loadd(7, b + TILE, b_row * int64_t(sizeof *b));
  _tile_loadd(4, a, a_row * int64_t(sizeof *a));
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (TALL) {
    _tile_loadd(5, a + TILE * a_row, a_row * int64_t(sizeof *a));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Pairs past the last whole tile along k, with zeros after them.
struct TileRest {
  alignas(64) uint32_t a[TILE_BLOCK * TILE];
  alignas(64) uint32_t b[TILE * 2 * TILE_BLOCK];
};

template <bool TALL>
CASTILE_INLINE void sum_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t k,
                              const TileRest& rest, int64_t column, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TALL) {
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t p = 0;
  for (; p + TILE <= k; p += TILE) add_tiles<TALL>(a + p, a_row, b + p * b_row, b_row);
  if (p < k) add_tiles<TALL>(rest.a, TILE, rest.b + column, 2 * TILE_BLOCK);
  constexpr int64_t ROW_BYTES = TILE_BLOCK * int64_t(sizeof(float));
  _tile_stored(0, sums, ROW_BYTES);
  _tile_stored(1, sums + TILE, ROW_BYTES);
  if constexpr (TALL) {
    _tile_stored(2, sums + TILE * TILE_BLOCK, ROW_BYTES);
    _tile_stored(3, sums + TILE * TILE_BLOCK + TILE, ROW_BYTES);
  }
}

// All of m >= TILE rows of one panel of at most 2 * TILE_BLOCK columns, of which ``width`` exist and all may be read; k
// pairs. The last rows are taken with those before them, as registers are not cut, and go where they belong alone.
template <class Put>
CASTILE_APART void dot_tiles(const Put& put, int64_t j0, const uint32_t* a, int64_t a_row, const uint32_t* b,
                             int64_t b_row, int64_t width, int64_t m, int64_t k) {
  const Tiles tiles;
  const int64_t whole = k / TILE * TILE, left = k - whole;
  TileRest rest;
  for (int64_t p = 0; p < TILE && left; ++p) {
    for (int64_t j = 0; j < 2 * TILE_BLOCK; ++j) rest.b[p * 2 * TILE_BLOCK + j] = p < left ? b[(whole + p) * b_row + j] : 0;
  }
  const int64_t rows = m < TILE_BLOCK ? TILE : TILE_BLOCK;
  for (int64_t i = 0; i < m; i += rows) {
    const int64_t from = at_most(i, m - rows);
    const uint32_t* const ai = a + from * a_row;
    for (int64_t r = 0; r < rows && left; ++r) {
      for (int64_t p = 0; p < TILE; ++p) rest.a[r * TILE + p] = p < left ? ai[r * a_row + whole + p] : 0;
    }
    for (int64_t j = 0; j < width; j += TILE_BLOCK) {
      alignas(64) float sums[TILE_BLOCK * TILE_BLOCK];
      asm volatile("" ::"r"(&rest) : "memory");
      if (rows == TILE_BLOCK) sum_tiles<true>(ai, a_row, b + j, b_row, k, rest, j, sums);
      else sum_tiles<false>(ai, a_row, b + j, b_row, k, rest, j, sums);
      asm volatile("" ::"r"(sums) : "memory");
      if (j + TILE_BLOCK <= width) {
        auto place = put.from(i, j0 + j);
        for (int64_t r = i - from; r < rows; ++r) {
          place.whole(0, load(sums + r * TILE_BLOCK));
          place.whole(LANES, load(sums + r * TILE_BLOCK + LANES));
          place.next();
        }
      } else {
        for (int64_t r = i - from; r < rows; ++r) {
          for (int64_t c = 0; j + c < width; c += LANES) {
            put.some(from + r, j0 + j + c, load(sums + r * TILE_BLOCK + c), width - j - c);
          }
        }
      }
    }
  }
}
#endif

}  // namespace
}  // namespace castile
