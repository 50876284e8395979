// Matrices: how they lie, what of them a product reads at once, and where it puts its sums.
#pragma once

namespace castile {
namespace {

// Whether the matrix unit of Intel's processors (AMX) can be meant; the system may refuse it still.
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define CASTILE_AMX 1
#endif

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

// Whether products of bf16 go by pairs, two to a step of each sum. On AMD's processors such a step takes as long as one
// multiply-add of f32; on an Intel of the fifth generation four times as long. Those with AVX512-FP16, which came a
// generation before, are taken to be like it: without the matrix unit, which reads pairs, operands are widened there as they
// are packed.
#if !defined(__AVX512BF16__)
#undef CASTILE_PAIRS
#define CASTILE_PAIRS 0
#elif !defined(CASTILE_PAIRS)
#if defined(__AVX512FP16__) && !defined(CASTILE_AMX) && !defined(__znver3__) && !defined(__znver4__) && !defined(__znver5__)
#define CASTILE_PAIRS 0
#else
#define CASTILE_PAIRS 1
#endif
#endif

// Operands as the micro-kernel reads them: pairs of bf16 along k, a word each, or f32.
#if CASTILE_PAIRS
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

// A panel of B: units from a row along k to the next, and from LANES columns to the next ones. Its rows lie one after
// another, but for a matrix unit: what fills its registers is to lie in one piece, so LANES columns have all rows together.
#if defined(CASTILE_AMX)
template <class U>
constexpr bool IN_SLICES = std::is_same_v<U, uint32_t>;
#else
template <class U>
constexpr bool IN_SLICES = false;
#endif
template <class U>
struct Panel {
  U* data;
  int64_t row, slice;
};
template <class U>
CASTILE_INLINE Panel<U> panel_at(U* data, int64_t height) {
  if constexpr (IN_SLICES<std::remove_const_t<U>>) return {data, LANES, height * LANES};
  else return {data, PANEL, LANES};
}
// From one vector of a row to the next, told to the compiler where it is always the same.
template <class U>
CASTILE_INLINE int64_t to_next_vector(int64_t slice) {
  if constexpr (IN_SLICES<U>) return slice;
  else return LANES;
}

// Units along k.
template <class Operand>
constexpr int64_t depth(int64_t k) {
  return (k + Traits<Operand>::COUNT - 1) / Traits<Operand>::COUNT;
}

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

}  // namespace
}  // namespace castile
