/* The machine's own float32 FMA rate, in FLOP/s: a yardstick laid beside every row.
 *
 * Each thread keeps CHAINS independent fused multiply-adds in registers and touches no memory, so the reading depends on
 * nothing but clocks and cores: whatever lowers it (another process, a throttled core, a stolen virtual CPU) lowers
 * every compute-bound kernel measured at that moment.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define CHAINS 12 /* covers latency 4-5 on two FMA pipes and leaves room in 16 registers */
#define STEPS 2000 /* about 10 us between two looks at the clock */
#define MAX_THREADS 1024

typedef float vec __attribute__((vector_size(WIDTH)));

typedef struct {
    atomic_int *arrived;
    int threads, cpu;
    double warm_s, window_s;
    double flops, begin_s, end_s; /* out */
    float sink;                   /* out: keeps the arithmetic alive */
} job;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* x = x * a + b with a < 1 converges to b / (1 - a) = 1: no infinity, no denormal, whatever the number of steps. */
static void work(vec chains[CHAINS]) {
    vec x[CHAINS];
    const vec a = (vec){0} + 0.75f, b = (vec){0} + 0.25f;
    for (int i = 0; i < CHAINS; i++) x[i] = chains[i];
    for (int s = 0; s < STEPS; s++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) x[i] = x[i] * a + b;
    for (int i = 0; i < CHAINS; i++) chains[i] = x[i];
}

static void *run(void *argument) {
    job *j = argument;
    vec chains[CHAINS];
    for (int i = 0; i < CHAINS; i++) chains[i] = (vec){0} + (float)i;
#ifdef __linux__
    if (j->cpu >= 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(j->cpu, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    }
#endif
    for (double until = now_s() + j->warm_s; now_s() < until;) work(chains);
    atomic_fetch_add(j->arrived, 1);
    while (atomic_load(j->arrived) < j->threads) sched_yield();
    j->begin_s = j->end_s = now_s();
    for (long done = 0; j->end_s - j->begin_s < j->window_s;) {
        work(chains);
        j->flops = 2.0 * (WIDTH / 4) * CHAINS * STEPS * (double)++done;
        j->end_s = now_s();
    }
    for (int i = 0; i < CHAINS; i++) j->sink += chains[i][0];
    return 0;
}

/* FLOP/s of `threads` threads over `window_s` seconds; thread i is pinned to cpus[i] unless that is negative; < 0 on failure. */
double castile_fma_peak(int threads, const int *cpus, double warm_s, double window_s) {
    static pthread_t ids[MAX_THREADS];
    static job jobs[MAX_THREADS];
    atomic_int arrived = 0;
    double flops = 0, begin_s = 0, end_s = 0;
    if (threads < 1 || threads > MAX_THREADS) return -1;
    for (int i = 0; i < threads; i++) {
        jobs[i] = (job){&arrived, threads, cpus[i], warm_s, window_s, 0, 0, 0, 0};
        if (pthread_create(&ids[i], 0, run, &jobs[i])) {
            atomic_fetch_add(&arrived, threads); /* frees those that wait */
            for (int k = 0; k < i; k++) pthread_join(ids[k], 0);
            return -1;
        }
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], 0);
        flops += jobs[i].flops;
        if (!i || jobs[i].begin_s < begin_s) begin_s = jobs[i].begin_s;
        if (!i || jobs[i].end_s > end_s) end_s = jobs[i].end_s;
    }
    return flops / (end_s - begin_s);
}
