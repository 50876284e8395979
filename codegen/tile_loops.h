// Reductions, memory that kernels work in, loops over strides and over threads.
#pragma once

namespace castile {
namespace {

// Reductions -------------------------------------------------------------------------------------------------------

struct Sum {
  template <class T>
  static constexpr T identity = T(0);
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a + b;
  }
};

struct Prod {
  template <class T>
  static constexpr T identity = T(1);
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a * b;
  }
};

struct Max {
  template <class T>
  static constexpr T identity = std::is_floating_point_v<T> ? T(-inf) : std::numeric_limits<T>::min();
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return maximum(a, b);
  }
};

struct Min {
  template <class T>
  static constexpr T identity = std::is_floating_point_v<T> ? T(inf) : std::numeric_limits<T>::max();
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return minimum(a, b);
  }
};

struct Any {
  template <class T>
  static constexpr T identity = false;
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a | b;
  }
};

struct All {
  template <class T>
  static constexpr T identity = true;
  template <class T>
  static CASTILE_INLINE T join(T a, T b) {
    return a & b;
  }
};

// start joined with element(0) ... element(n - 1), in independent lanes: a single accumulator would wait for itself.
template <class Op, class T, class F>
CASTILE_INLINE T fold(int64_t n, T start, F element) {
  constexpr int VECTOR = 64 / sizeof(T), ALL = 4 * VECTOR;
  int64_t i = 0;
  if (n >= VECTOR) {
    T lanes[ALL];
    for (int l = 0; l < ALL; ++l) lanes[l] = Op::template identity<T>;
    for (; i + ALL <= n; i += ALL) {
      CASTILE_SIMD
      for (int l = 0; l < ALL; ++l) lanes[l] = Op::template join<T>(lanes[l], element(i + l));
    }
    for (; i + VECTOR <= n; i += VECTOR) {
      CASTILE_SIMD
      for (int l = 0; l < VECTOR; ++l) lanes[l] = Op::template join<T>(lanes[l], element(i + l));
    }
    CASTILE_UNROLL
    for (int half = ALL / 2; half; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] = Op::template join<T>(lanes[l], lanes[l + half]);
    }
    start = Op::template join<T>(start, lanes[0]);
  }
  for (; i < n; ++i) start = Op::template join<T>(start, element(i));
  return start;
}

CASTILE_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
CASTILE_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// A part of numbered things: from the first on, before the last.
struct Span {
  int64_t first, last;
};
// Of n elements the whole vectors from ``first`` on and before ``last``.
CASTILE_INLINE Span whole_vectors(int64_t first, int64_t last, int64_t n) {
  const int64_t from = at_most((at_least(0, first) + LANES - 1) / LANES * LANES, n / LANES * LANES);
  return {from, at_least(from, at_most(last, n) / LANES * LANES)};
}

// The lanes of four vectors, and a number before them, joined.
template <class Op>
CASTILE_INLINE float joined(float start, const Vector (&sum)[4]) {
  const Vector all = Op::join(Op::join(sum[0], sum[1]), Op::join(sum[2], sum[3]));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Op, Sum>) return start + _mm512_reduce_add_ps((__m512)all);
  if constexpr (std::is_same_v<Op, Max> || std::is_same_v<Op, Min>) {
    // Which is greater nobody foresees, so that no branch may hang on it; a NaN is told apart before.
    const __m512 both = (__m512)Op::join(all, splat(start));
    if (__builtin_expect(_mm512_cmp_ps_mask(both, both, _CMP_UNORD_Q) != 0, 0)) return __builtin_nanf("");
    return std::is_same_v<Op, Max> ? _mm512_reduce_max_ps(both) : _mm512_reduce_min_ps(both);
  }
#endif
  float lanes[LANES];
  store(lanes, all);
  CASTILE_UNROLL
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = Op::join(lanes[l], lanes[l + half]);
  }
  return Op::join(start, lanes[0]);
}

// start joined with n elements, a vector each of element(0, LANES), element(LANES, LANES), ...: where it begins, and how
// many there are from there on, at most LANES. It is inlined by force: it stands here several times, and a call for
// each vector costs as much as its exponential.
template <class Op, class F>
CASTILE_INLINE float fold_vectors(int64_t n, float start, F element) {
  const Vector nothing = splat(Op::template identity<float>);
  Vector sum[4] = {nothing, nothing, nothing, nothing};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    CASTILE_UNROLL
    for (int v = 0; v < 4; ++v) sum[v] = Op::join(sum[v], element(i + v * LANES, LANES));
  }
  for (; i < n; i += LANES) sum[0] = Op::join(sum[0], choose(lanes_below(n - i), element(i, n - i), nothing));
  return joined<Op>(start, sum);
}

// The same, where element(i, LANES, std::true_type()) is enough within a span of whole vectors, with no mask to be made.
template <class Op, class F>
CASTILE_INLINE float fold_vectors(int64_t n, Span inside, float start, F element) {
  const Vector nothing = splat(Op::template identity<float>);
  Vector sum[4] = {nothing, nothing, nothing, nothing};
  int64_t i = inside.first;
  for (; i + 4 * LANES <= inside.last; i += 4 * LANES) {
    CASTILE_UNROLL
    for (int v = 0; v < 4; ++v) sum[v] = Op::join(sum[v], element(i + v * LANES, LANES, std::true_type()));
  }
  for (; i < inside.last; i += LANES) sum[0] = Op::join(sum[0], element(i, LANES, std::true_type()));
  for (i = inside.first > 0 ? 0 : inside.last; i < n; i = i + LANES == inside.first ? inside.last : i + LANES) {
    sum[1] = Op::join(sum[1], choose(lanes_below(n - i), element(i, n - i, std::false_type()), nothing));
  }
  return joined<Op>(start, sum);
}

// at(i, count) for each vector of n elements: where it begins and how many there are from there on, at most LANES.
template <class F>
CASTILE_INLINE void each_vector(int64_t n, F at) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) at(i, LANES);
  if (i < n) at(i, n - i);
}

// Where the greatest element(0) ... element(n - 1) first stands; the first NaN is greater than all.
template <class F>
CASTILE_INLINE int64_t fold_argmax(int64_t n, F element) {
  if (n <= 0) return 0;
  int64_t best = 0;
  auto top = element(0);
  for (int64_t i = 1; i < n; ++i) {
    const auto x = element(i);
    if (x > top || (x != x && top == top)) top = x, best = i;
  }
  return best;
}

// Memory and loops -------------------------------------------------------------------------------------------------

CASTILE_INLINE int64_t tiles(int64_t extent, int64_t size) { return extent <= 0 ? 0 : (extent + size - 1) / size; }

// Calls body(stride), with a stride of 1 known when the loop is compiled: only then does it load whole vectors.
template <class F>
CASTILE_INLINE void with_stride(int64_t stride, F body) {
  if (stride == 1) body(std::integral_constant<int64_t, 1>());
  else body(stride);
}

// An index that came from data: kept inside the axis, and told about.
CASTILE_INLINE int64_t inside(int64_t index, int64_t size, bool& outside) {
  outside |= uint64_t(index) >= uint64_t(size);
  return at_least(0, at_most(index, size - 1));
}

// This thread's memory for tiles, aligned to a cache line; it is kept from call to call.
struct Workspace {
  char* memory = nullptr;
  size_t size = 0;
  ~Workspace() { std::free(memory); }
  char* of(size_t wanted) {
    if (wanted > size) {
      std::free(memory);
      size = (wanted + 4095) / 4096 * 4096;
      memory = static_cast<char*>(std::aligned_alloc(4096, size));
      if (memory == nullptr) std::abort();
    }
    return memory;
  }
};

inline char* workspace(size_t wanted) {
  static thread_local Workspace own;
  return own.of(wanted);
}

// What a thread is to do. Any thread may take of it, its owner first.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t last;
};

// body(from) ... body(last - 1). The body is a copy of this function's own, so that no store to a tensor can be taken for
// one to what it holds, which then stays in registers.
template <class F>
CASTILE_APART void each_point(F body, int64_t from, int64_t last) {
  for (int64_t point = from; point < last; ++point) body(point);
}

// What becomes of results below the least normal number of their type. Processors of Intel take a hundred cycles and more
// over each instruction that meets one, so that zeros are made of those that exponentials leave to products. Processors of
// ARM lose no time: there only `exp_flushed` makes such zeros.
enum class Subnormals { KEPT, FLUSHED };

// Until the end of a scope, in this thread.
template <Subnormals RULE>
struct Underflow {
#if defined(__AVX2__)
  static constexpr unsigned FLUSH = 1u << 15;
  const unsigned before = _mm_getcsr();
  Underflow() {
    if (RULE == Subnormals::FLUSHED) _mm_setcsr(before | FLUSH);
  }
  ~Underflow() {
    if (RULE == Subnormals::FLUSHED) _mm_setcsr(before);
  }
#endif
};

// body(first) ... body(last - 1), shared out among threads; on one where that is asked for, so that no thread is started
// after a fork. A thread gets one stretch, the same from kernel to kernel, so that it mostly reads what it wrote itself
// and has in its own cache; it takes portions of that, and then helps the others.
template <Subnormals RULE = Subnormals::KEPT, class F>
inline void parallel_for(int64_t first, int64_t last, int64_t threads, F body) {
  threads = at_most(threads, last - first);
  if (threads <= 1) {
    [[maybe_unused]] const Underflow<RULE> underflow;
    each_point(body, first, last);
    fence();
    return;
  }
  constexpr int64_t MOST = 64;
  const int64_t count = at_most(threads, MOST), portion = at_least(1, (last - first) / (threads * 32));
  Share shares[MOST];
  for (int64_t t = 0; t < count; ++t) {
    shares[t].next.store(first + (last - first) * t / count, std::memory_order_relaxed);
    shares[t].last = first + (last - first) * (t + 1) / count;
  }
  const auto work = [&](int64_t own) {
    [[maybe_unused]] const Underflow<RULE> underflow;
    for (int64_t t = 0; t < count; ++t) {
      Share& share = shares[(own + t) % count];
      int64_t from;
      while ((from = share.next.fetch_add(portion, std::memory_order_relaxed)) < share.last) {
        each_point(body, from, at_most(share.last, from + portion));
      }
    }
    fence();
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (auto& other : others) other.join();
#endif
}

// How many threads an amount of work is worth: waking one costs as much as some ten thousand operations.
CASTILE_INLINE int64_t worth(int64_t threads, double work) {
  return work < 20000.0 ? 1 : at_most(threads, 1 + int64_t(work / 20000.0));
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

}  // namespace
}  // namespace castile
