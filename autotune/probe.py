"""What this machine is, and what it can do when asked: the `Device` that mappings are judged by, measured.

The rates come from a small C++ program, compiled and run here: reads and copies beyond every cache and within each,
chains of multiply-adds in vector registers, and vectors of exponentials.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from ..codegen.build import load
from ..codegen.compiler import cpu_identity
from ..codegen.runtime import thread_count
from ..ir.device import DEVICES, GIB, KIB, MIB, Device, MemoryLevel, device_of
from ..ir.errors import UsageError

_SOURCE = r"""
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
typedef double vecd __attribute__((vector_size(BYTES)));

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class V, class F> static double chains(double seconds) {
  V a[12];
  for (int i = 0; i < 12; i++) a[i] = V{} + F(i);
  V m = V{} + F(0.999), b = V{} + F(0.001);
  double best = 0;
  for (double end = now() + seconds; now() < end;) {
    double t = now();
    V c[12];
    for (int i = 0; i < 12; i++) c[i] = a[i];
    for (int n = 0; n < 100000; n++)
      for (int i = 0; i < 12; i++) c[i] = c[i] * m + b;
    for (int i = 0; i < 12; i++) a[i] = c[i];
    __asm__ volatile("" : "+m"(a));
    double rate = 100000.0 * 12 * 2 * (BYTES / sizeof(F)) / (now() - t);
    if (rate > best) best = rate;
  }
  volatile F keep = a[3][0];
  (void)keep;
  return best;
}

// Operations in a second of chains of an instruction that adds so many products to each lane of an accumulator.
template <class A, class B, class F> static double dots(double seconds, int operations, B x, B y, F step) {
  A a[12];
  memset(a, 0, sizeof a);
  double best = 0;
  for (double end = now() + seconds; now() < end;) {
    double t = now();
    A c[12];
    for (int i = 0; i < 12; i++) c[i] = a[i];
    for (int n = 0; n < 100000; n++)
      for (int i = 0; i < 12; i++) c[i] = step(c[i], x, y);
    for (int i = 0; i < 12; i++) a[i] = c[i];
    __asm__ volatile("" : "+m"(a));
    double rate = 100000.0 * 12 * operations / (now() - t);
    if (rate > best) best = rate;
  }
  return best;
}

extern "C" {
// Products of bf16 and of i8 by instructions of their own; 0 where there are none.
double dot_bf16(double seconds) {
#if defined(__AVX512BF16__)
  auto step = [](__m512 c, __m512bh x, __m512bh y) { return _mm512_dpbf16_ps(c, x, y); };
  return dots<__m512, __m512bh>(seconds, 64, (__m512bh)_mm512_set1_epi32(1), (__m512bh)_mm512_set1_epi32(1), step);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  auto step = [](float32x4_t c, bfloat16x8_t x, bfloat16x8_t y) { return vbfdotq_f32(c, x, y); };
  bfloat16x8_t one = vreinterpretq_bf16_u16(vdupq_n_u16(1));
  return dots<float32x4_t, bfloat16x8_t>(seconds, 16, one, one, step);
#else
  return 0 * seconds;
#endif
}

double dot_i8(double seconds) {
#if defined(__AVX512VNNI__)
  auto step = [](__m512i c, __m512i x, __m512i y) { return _mm512_dpbusd_epi32(c, x, y); };
  return dots<__m512i, __m512i>(seconds, 128, _mm512_set1_epi8(1), _mm512_set1_epi8(1), step);
#elif defined(__ARM_FEATURE_DOTPROD)
  auto step = [](int32x4_t c, int8x16_t x, int8x16_t y) { return vdotq_s32(c, x, y); };
  return dots<int32x4_t, int8x16_t>(seconds, 32, vdupq_n_s8(1), vdupq_n_s8(1), step);
#else
  return 0 * seconds;
#endif
}

int vector_bits(void) { return BYTES * 8; }

double fma_f32(double seconds) { return chains<vec, float>(seconds); }
double fma_f64(double seconds) { return chains<vecd, double>(seconds); }

// Bytes read in a second from a buffer of so many bytes.
double reads(int64_t bytes, double seconds) {
  int64_t n = bytes / BYTES / 8 * 8;
  vec *x = (vec *)aligned_alloc(64, n * BYTES);
  if (!x) return 0;
  memset(x, 1, n * BYTES);
  double best = 0;
  vec s[8] = {};
  for (double end = now() + seconds; now() < end;) {
    double t = now();
    int64_t rounds = bytes < (1 << 24) ? (1 << 24) / bytes : 1;
    for (int64_t r = 0; r < rounds; r++) {
      for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) s[j] += x[i + j];
      __asm__ volatile("" ::: "memory");
    }
    double rate = double(rounds) * n * BYTES / (now() - t);
    if (rate > best) best = rate;
  }
  volatile float keep = (s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7])[0];
  (void)keep;
  free(x);
  return best;
}

// Bytes read and written in a second by a copy.
double copies(int64_t bytes, double seconds) {
  char *x = (char *)aligned_alloc(64, bytes), *y = (char *)aligned_alloc(64, bytes);
  double best = 0;
  if (x && y) {
    memset(x, 1, bytes);
    memset(y, 2, bytes);
    for (double end = now() + seconds; now() < end;) {
      double t = now();
      memcpy(y, x, bytes);
      __asm__ volatile("" ::: "memory");
      double rate = 2.0 * bytes / (now() - t);
      if (rate > best) best = rate;
    }
  }
  free(x);
  free(y);
  return best;
}

// Exponentials in a second, by a polynomial of the fifth degree over a tile in L1.
double exponentials(double seconds) {
  alignas(64) float x[1024], y[1024];
  for (int i = 0; i < 1024; i++) x[i] = -0.01f * i;
  double best = 0;
  for (double end = now() + seconds; now() < end;) {
    double t = now();
    for (int r = 0; r < 1000; r++) {
      for (int i = 0; i < 1024; i++) {
        float z = x[i] * 1.44269504f, n = (z + 12582912.f) - 12582912.f, f = z - n;
        float p = 1.f + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * 0.00133336f))));
        int32_t e = (int32_t)n << 23, bits;
        memcpy(&bits, &p, 4);
        bits += e;
        memcpy(&y[i], &bits, 4);
      }
      __asm__ volatile("" ::"r"(y) : "memory");
    }
    double rate = 1024000.0 / (now() - t);
    if (rate > best) best = rate;
  }
  return best;
}
}
"""


@cache
def device_name(target: str = "cpu") -> str:
    """What tells this device from others in records: for a CPU its model, its vectors and the threads in use."""
    if target != "cpu":
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
        return device_of(target).name
    lines = cpu_identity().split("\n")
    model = next((x.split(":", 1)[1].strip() for x in lines if x.lower().startswith("model name")), "")
    flags = next((x.split(":", 1)[1].split() for x in lines if x.lower().startswith(("flags", "features"))), [])
    vectors = next((v for v in ("avx512f", "avx2", "sve", "asimd") if v in flags), "")
    name = model or platform.processor() or platform.machine()
    threads = thread_count()
    return f"{' '.join(name.split())} ({', '.join(filter(None, (vectors, f'{threads} thread' + 's' * (threads > 1))))})"


def caches() -> tuple[tuple[str, int], ...]:
    """The data caches of a core, nearest first, as (name, bytes); what the system does not tell is taken as usual."""
    found: dict[int, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((folder / f).read_text().strip() for f in ("type", "level", "size"))
        except OSError:
            continue
        unit = {"K": KIB, "M": MIB}.get(size[-1:], 1)
        if kind != "Instruction" and size.rstrip("KM").isdecimal():
            found[int(level)] = int(size.rstrip("KM")) * unit
    shipped = DEVICES["cpu"].memory
    return tuple((shipped[i].name, found.get(i + 1, shipped[i].bytes)) for i in range(3))


def memory_bytes() -> int:
    """Main memory of this machine in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 16 * GIB


@cache
def describe_cpu() -> Device:
    """This CPU as the system tells it: caches, memory and name; the rates are the shipped ones, not measured."""
    shipped = DEVICES["cpu"]
    sizes = (*(size for _, size in caches()), memory_bytes())
    levels = tuple(replace(level, bytes=size) for level, size in zip(shipped.memory, sizes, strict=True))
    return replace(shipped, name=device_name("cpu"), memory=levels)


def measure_cpu(seconds: float = 0.15, threads: int = 1) -> Device:
    """This CPU measured for ``seconds`` a rate, on so many threads at once, whose rates are added up.

    A dtype without instructions of its own, or whose own are slower, runs as f32. Raises `UsageError` where no compiler
    is found.
    """
    library = load(_SOURCE)

    def rates(name: str, *args: float) -> float:
        function = getattr(library, name)
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_double for a in args]
        with ThreadPoolExecutor(threads) as pool:
            return sum(float(f.result()) for f in [pool.submit(function, *args) for _ in range(threads)])

    def ask(name: str, *args: float) -> float:
        rate = rates(name, *args)
        if not rate > 0:
            raise UsageError(f"the device could not be measured: `{name}` came to nothing", hint="is there memory?")
        return rate

    told = describe_cpu()
    f32, f64 = ask("fma_f32", seconds), ask("fma_f64", seconds)
    bf16, i8 = (max(rates(name, seconds), f32) for name in ("dot_bf16", "dot_i8"))
    levels = []
    for place, level in enumerate(told.memory):
        last = place == len(told.memory) - 1
        size = min(512 * MIB, max(64 * MIB, 3 * told.memory[2].bytes)) if last else level.bytes * 3 // 4
        size //= threads if place >= 2 else 1  # the first two levels are a core's own
        levels.append(MemoryLevel(level.name, level.bytes, 1, ask("reads", int(size), seconds)))
    return replace(
        told,
        flops=MappingProxyType({"f64": f64, "f32": f32, "bf16": bf16, "f16": f32, "i8": i8}),
        special_per_s=ask("exponentials", seconds),
        memory=tuple(levels),
        vector_bits=int(library.vector_bits()),
    )


def measure_copy(seconds: float = 0.15) -> float:
    """Bytes read and written in a second by a copy between buffers of 128 MiB."""
    library = load(_SOURCE)
    library.copies.restype = ctypes.c_double
    library.copies.argtypes = [ctypes.c_int64, ctypes.c_double]
    return float(library.copies(128 * MIB, seconds))
