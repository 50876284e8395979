// Operands of products as these read them: B in panels, A along k.
#pragma once

namespace castile {
namespace {

template <class Operand, class T>
CASTILE_INLINE uint32_t pair(T low, T high) {
  return uint32_t(to<Operand>(low).raw) | uint32_t(to<Operand>(high).raw) << 16;
}

#if defined(__AVX512F__)
// into[j * into_row + i] = from[i * row + j] for 16 x 16 words, of which ``read`` gives a row.
template <class B, class F>
CASTILE_INLINE void transpose(const B* from, int64_t row, uint32_t* into, int64_t into_row, F read) {
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
    _mm512_storeu_si512(into + j * into_row, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(into + (j + 8) * into_row, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}
#endif

#if CASTILE_PAIRS
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

// One panel of B: ``width`` columns, the rest of PANEL filled with zeros; ``ahead`` rows further are asked for.
template <class Operand, class B>
inline void pack_panel(Matrix<const B> b, int64_t k, int64_t width, Unit<Operand>* data, int64_t ahead = PACK_AHEAD) {
  const Panel<Unit<Operand>> panel = panel_at(data, depth<Operand>(k));
  (void)ahead;
  [[maybe_unused]] constexpr bool AS_IT_IS = std::is_same_v<Operand, B>;
  int64_t done = 0;  // units along k
#if defined(__AVX512F__)
  // Columns that lie along k: their words go by squares of 16.
  const auto by_squares = [&](auto read) {
    constexpr int64_t COUNT = Traits<Operand>::COUNT;
    if (b.row != 1 || width % 16 != 0) return;
    for (; (done + 16) * COUNT <= k; done += 16) {
      for (int64_t q = 0; q < width; q += 16) {
        uint32_t* const into = reinterpret_cast<uint32_t*>(panel.data + done * panel.row + q / LANES * panel.slice);
        transpose(b.data + done * COUNT + q * b.column, b.column, into, panel.row, read);
      }
    }
  };
  (void)by_squares;
  if constexpr (AS_IT_IS && sizeof(B) == 4) by_squares([](const B* p) CASTILE_INLINED { return _mm512_loadu_si512(p); });
#endif
#if CASTILE_PAIRS
  if constexpr (PAIRS<Operand> && (AS_IT_IS || IN_BF16<B>)) by_squares([](const B* p) CASTILE_INLINED { return halves_of(p); });
#elif defined(__AVX512F__)
  if constexpr (std::is_same_v<B, bf16> && std::is_same_v<Unit<Operand>, float>) {
    by_squares([](const B* p) CASTILE_INLINED { return (__m512i)load(p); });
  }
#endif
  if constexpr (IS_WHOLE<Operand>) {
#if defined(__AVX512F__)
    if constexpr (Traits<Operand>::COUNT == 4) {
      constexpr uint32_t RAISED_BY = Traits<Operand>::IS_RAISED ? RAISE : 0;
      by_squares([](const B* p) CASTILE_INLINED { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(RAISED_BY))); });
    }
#endif
    uint32_t* const into = reinterpret_cast<uint32_t*>(data);
    pack_whole<Operand, B>(b.data, b.row, b.column, done, k, width, PANEL, into);
  } else {
#if CASTILE_PAIRS
  if constexpr (PAIRS<Operand> && (AS_IT_IS || IN_BF16<B>)) {
    if (b.column == 1 && width == PANEL) {
      for (; done < k / 2; ++done) {
        const B* const low = b.data + 2 * done * b.row;
        CASTILE_UNROLL
        for (int64_t q = 0; q < PANEL; q += 2 * LANES) {
          prefetch(low + ahead * b.row + q), prefetch(low + (ahead + 1) * b.row + q);
          const Beside both = beside(low + q, low + b.row + q);
          Unit<Operand>* const into = panel.data + done * panel.row + q / LANES * panel.slice;
          _mm512_storeu_si512(into, both.left);
          _mm512_storeu_si512(into + panel.slice, both.right);
        }
      }
    }
  }
#endif
  // Columns whose units of a row are neighbours: a loop over fewer takes products of f32 7% longer.
  constexpr int64_t TOGETHER = IN_SLICES<Unit<Operand>> ? LANES : PANEL;
  for (int64_t p = done; p < depth<Operand>(k); ++p) {
    for (int64_t q0 = 0; q0 < PANEL; q0 += TOGETHER) {
      Unit<Operand>* const into = panel.data + p * panel.row + q0 / LANES * panel.slice;
      const int64_t some = at_least(0, at_most(TOGETHER, width - q0));
      with_stride(b.column, [&](auto step) {
        if constexpr (PAIRS<Operand>) {
          const B* const low = b.data + 2 * p * b.row + q0 * step;
          if (2 * p + 1 < k) {
            const B* const high = low + b.row;
            CASTILE_SIMD
            for (int64_t q = 0; q < some; ++q) into[q] = pair<Operand>(low[q * step], high[q * step]);
          } else {
            for (int64_t q = 0; q < some; ++q) into[q] = to<Operand>(low[q * step]).raw;
          }
        } else {
          const B* const from = b.data + p * b.row + q0 * step;
          if constexpr (std::is_same_v<decltype(step), std::integral_constant<int64_t, 1>>) {
            for (int64_t q = 0; q < TOGETHER; q += IN_A_LINE<B>) prefetch(from + ahead * b.row + q);
          }
          CASTILE_SIMD
          for (int64_t q = 0; q < some; ++q) into[q] = to<float>(to<Operand>(from[q * step]));
        }
      });
      for (int64_t q = some; q < TOGETHER; ++q) into[q] = 0;
    }
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
#if CASTILE_PAIRS
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

// Rows of A as `dot_panels` takes them: where they lie if that will do, else brought near, some AT_ONCE. They are brought
// again for each panel of B, which is little beside their product with it, and stay in the first cache meanwhile, where all
// rows of a tile would not: those that are narrower than the micro-kernel reads them as it would have them; those that
// lie across memory as many side by side as a line holds, as they lie. A tile of few columns of f32 that lies across, its
// columns close to each other, is in the caches already.
template <class Operand, class A>
struct NearRows {
  using U = Unit<Operand>;
  static constexpr int64_t SIDE = 24;

  const U* data;
  int64_t row, column;  // of what is read
  Matrix<const A> a = {};
  int64_t m = 0, k = 0, at_once = 0, first = 0;

  CASTILE_INLINE const U* from(int64_t i, int64_t rows) {
    if (at_once == 0) return data + i * row;
    if (i < first || i + rows > first + at_once) bring(i);
    return data + (i - first) * row;
  }

 private:
  CASTILE_APART void bring(int64_t i) {
    first = i;
    const int64_t rows = at_most(at_once, m - i);
    U* const into = const_cast<U*>(data);
    if constexpr (!IS_WHOLE<Operand>) {
      if (a.column == 1) along(into, rows);
      else if (rows == SIDE) across(into, std::integral_constant<int64_t, SIDE>());
      else across(into, rows);
    }
  }
  template <class Count>
  CASTILE_INLINE void across(U* into, Count rows) const {
    const A* at = a.data + first;
    int64_t p = 0;
    if constexpr (PAIRS<Operand>) {
      for (; p + 1 < k; p += 2, at += 2 * a.column, into += column) {
        CASTILE_SIMD
        for (int64_t r = 0; r < rows; ++r) into[r] = pair<Operand>(at[r], at[a.column + r]);
      }
    }
    for (; p < k; ++p, at += a.column, into += column) {
      CASTILE_SIMD
      for (int64_t r = 0; r < rows; ++r) {
        if constexpr (PAIRS<Operand>) into[r] = to<Operand>(at[r]).raw;
        else into[r] = to<float>(to<Operand>(at[r]));
      }
    }
  }
  CASTILE_INLINE void along(U* into, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r, into += row) {
      const A* const at = a.data + (first + r) * a.row;
      int64_t p = 0;
      if constexpr (!PAIRS<Operand>) {
        if constexpr (std::is_same_v<A, bf16> || (std::is_same_v<A, float> && std::is_same_v<Operand, bf16>)) {
          for (; p + LANES <= k; p += LANES) {
            store(into + p, std::is_same_v<Operand, A> ? load(at + p) : rounded(load(at + p)));
          }
        }
        CASTILE_SIMD
        for (int64_t q = p; q < k; ++q) into[q] = to<float>(to<Operand>(at[q]));
      }
    }
  }
};

// Those of a product; ``room`` is for m * k floats.
template <class Operand, class A>
CASTILE_INLINE NearRows<Operand, A> rows_for(Matrix<const A> a, int64_t m, int64_t k, float* room) {
  using U = Unit<Operand>;
  if constexpr (!IS_WHOLE<Operand> && !IN_SLICES<U>) {
    constexpr bool WIDENED = !PAIRS<Operand> && !(std::is_same_v<A, Operand> && sizeof(A) == 4);
    constexpr int64_t SIDE = NearRows<Operand, A>::SIDE;
    if (m >= BLOCK_ROWS && a.row == 1 && a.column != 1) {
      if constexpr (std::is_same_v<A, U> && std::is_same_v<A, Operand>) {
        if (k <= 384 && a.column * int64_t(sizeof(A)) <= 1024) return {a.data, 1, a.column};
      }
      return {reinterpret_cast<U*>(room), 1, at_most(SIDE, m), a, m, k, SIDE, -SIDE};
    }
    if (WIDENED && a.column == 1) {
      return {reinterpret_cast<U*>(room), k, 1, a, m, k, BLOCK_ROWS, -BLOCK_ROWS};
    }
  }
  const Matrix<const U> rows = rows_of<Operand, A>(a, m, k, room);
  return {rows.data, rows.row, rows.column};
}

// B[k, n] as the micro-kernel reads it, from its first column and row on or from others.
template <class Operand>
struct Panels {
  Panel<const Unit<Operand>> first;
  int64_t step;  // for each column on, in units

  // From a column on, a multiple of PANEL, or from a row on, an even one.
  CASTILE_INLINE Panels from_column(int64_t j) const { return {at(j), step}; }
  CASTILE_INLINE Panels from_row(int64_t p) const {
    return {{first.data + depth<Operand>(p) * first.row, first.row, first.slice}, step};
  }
  CASTILE_INLINE Panel<const Unit<Operand>> at(int64_t j) const {
    return {first.data + j * step, first.row, first.slice};
  }
};

template <class Operand, class B>
inline Panels<Operand> packed(Matrix<const B> b, int64_t k, int64_t n, void* room) {
  pack<Operand, B>(b, k, n, room);
  const int64_t height = depth<Operand>(k);
  return {panel_at(static_cast<const Unit<Operand>*>(room), height), height};
}

// The same, of what does not change meanwhile: in place where it lies as panels do, or nearly so.
template <class Operand, class B>
CASTILE_INLINE Panels<Operand> in_panels(Matrix<const B> b, int64_t k, int64_t n, void* room) {
  if constexpr (std::is_same_v<B, float> && std::is_same_v<Operand, float>) {
    const bool whole = n % PANEL == 0 && b.row % LANES == 0 && reinterpret_cast<uintptr_t>(b.data) % 64 == 0;
    if (b.column == 1 && whole && b.row <= 2 * PANEL) return {{b.data, b.row, LANES}, 1};
  }
  return packed<Operand, B>(b, k, n, room);
}

// Of n columns, those in whole panels before some; and the others in whole vectors up to some.
CASTILE_INLINE int64_t panels_before(int64_t first, int64_t n) {
  return at_least(0, at_most(first, n)) / PANEL * PANEL;
}
CASTILE_INLINE int64_t vectors_to(int64_t last, int64_t n) {
  return at_least(0, at_most((last + LANES - 1) / LANES * LANES, n));
}

}  // namespace
}  // namespace castile
