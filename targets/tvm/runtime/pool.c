/* A pool of threads for calls of a few microseconds to a few milliseconds.
 *
 * A call has as many parts as there are threads. Every thread takes its own part if it comes in time, so that the data
 * tend to be in that thread's cache already; then it takes parts that nobody has taken yet. So a thread that the system
 * lets wait holds nobody up, and only a part begun is waited for. One word holds the parts taken and the number of the
 * call. So a late thread can't mistake a part of a later call for one of the call that it read about.
 *
 * A waiting thread spins for some tens of microseconds, since the next call usually follows at once, and then sleeps in
 * the kernel: nothing is burnt between two frames. Workers sleep on `ticket`, which counts the calls; the caller
 * sleeps on `left`, the parts not done. Whoever changes a word looks for sleepers after that, and who goes to
 * sleep says so before the system compares the word again, so no wake is lost. Only pthread_create and pthread_join
 * are used of pthreads: their arguments are the same in every C library. */
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

#define SPIN_NS 30000
#define SPINS_A_LOOK 64

typedef struct {
    pool *pool;
    pthread_t thread;
    int part;
    int core; /* -1: any */
} worker;

struct pool {
    /* apart by cache lines: `ticket` is read by all while they spin, the others are written by all */
    _Alignas(64) atomic_uint ticket;
    atomic_uint sleepers;
    atomic_uint stop;
    _Alignas(64) _Atomic uint64_t taken; /* number of the call << 32 | a bit for every part taken */
    _Alignas(64) atomic_uint left;
    atomic_uint caller_sleeps;
    atomic_uint pinned;
    /* the call; a late thread may read them while they change, and then takes nothing */
    _Alignas(64) _Atomic kernel_function run;
    void *const *_Atomic buffers;
    int threads;
    int started;
    worker workers[DVX_MAX_THREADS];
};

typedef struct {
    kernel_function run;
    void *const *buffers;
} job;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

static void futex_wait(atomic_uint *word, unsigned value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(atomic_uint *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* Spin while *word is `value`; returns 1 once it is another, 0 when it is time to sleep. */
static int spin_while(atomic_uint *word, unsigned value) {
    uint64_t end = 0;
    for (;;) {
        for (int i = 0; i < SPINS_A_LOOK; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
            relax();
        }
        uint64_t time = dvx_now();
        if (!end) end = time + SPIN_NS;
        if (time > end) return 0;
    }
}

/* Wait until there is a call after `seen`, and return its ticket. */
static unsigned wait_for_ticket(pool *p, unsigned seen) {
    if (!spin_while(&p->ticket, seen)) {
        atomic_fetch_add(&p->sleepers, 1);
        while (atomic_load(&p->ticket) == seen) futex_wait(&p->ticket, seen);
        atomic_fetch_sub(&p->sleepers, 1);
    }
    return atomic_load(&p->ticket);
}

static void wake_workers(pool *p) {
    atomic_fetch_add(&p->ticket, 1);
    if (atomic_load(&p->sleepers)) futex_wake(&p->ticket, DVX_MAX_THREADS);
}

static void finish_part(pool *p) {
    if (atomic_fetch_sub(&p->left, 1) == 1 && atomic_load(&p->caller_sleeps)) futex_wake(&p->left, 1);
}

static void wait_until_done(pool *p) {
    unsigned left;
    while ((left = atomic_load_explicit(&p->left, memory_order_acquire)) != 0) {
        if (spin_while(&p->left, left)) continue;
        atomic_store(&p->caller_sleeps, 1);
        while ((left = atomic_load(&p->left)) != 0) futex_wait(&p->left, left);
        atomic_store(&p->caller_sleeps, 0);
    }
}

/* Take part `own` of the call if it is free, else any; returns the part, or -1 if none is left. */
static int take_part(pool *p, int own, job *j) {
    uint32_t all = (uint32_t)(((uint64_t)1 << p->threads) - 1);
    uint64_t taken = atomic_load(&p->taken);
    for (;;) {
        uint32_t free_parts = all & ~(uint32_t)taken;
        if (!free_parts) return -1;
        int part = free_parts >> own & 1 ? own : __builtin_ctz(free_parts);
        j->run = atomic_load_explicit(&p->run, memory_order_relaxed);
        j->buffers = atomic_load_explicit(&p->buffers, memory_order_relaxed);
        /* The call changes only when all its parts are taken and done: success means that these were of this call. */
        if (atomic_compare_exchange_weak(&p->taken, &taken, taken | (uint64_t)1 << part)) return part;
    }
}

static void run_parts(pool *p, int own) {
    job j;
    int part;
    while ((part = take_part(p, own, &j)) >= 0) {
        j.run(j.buffers, part, p->threads);
        finish_part(p);
    }
}

/* As a raw system call: the C libraries disagree on the type of a set of cores. */
static void pin(pool *p, int core) {
    unsigned long set[MOST_CORES / (8 * sizeof(unsigned long))] = {0};
    size_t bits = 8 * sizeof *set;
    if (core < 0) return;
    set[(size_t)core / bits] = 1ul << ((size_t)core % bits);
    if (syscall(SYS_sched_setaffinity, 0, sizeof set, set) == 0) atomic_fetch_add(&p->pinned, 1);
}

static void *work(void *argument) {
    worker *w = argument;
    pool *p = w->pool;
    pin(p, w->core);
    finish_part(p); /* dvx_pool_start waits for it */
    for (unsigned seen = 0;;) {
        seen = wait_for_ticket(p, seen);
        if (atomic_load(&p->stop)) return NULL;
        run_parts(p, w->part);
    }
}

pool *dvx_pool_start(int threads, const int *cores, char *error) {
    pool *p = NULL;
    void *memory;
    if (posix_memalign(&memory, 64, sizeof *p)) {
        dvx_fail(error, "out of memory for the threads");
        return NULL;
    }
    p = memset(memory, 0, sizeof *p);
    p->threads = threads;
    atomic_store(&p->taken, UINT32_MAX); /* nothing to take yet */
    atomic_store(&p->left, (unsigned)threads - 1);
    for (int part = 1; part < threads; part++) {
        worker *w = &p->workers[part];
        *w = (worker){.pool = p, .part = part, .core = cores ? cores[part] : -1};
        int failure = pthread_create(&w->thread, NULL, work, w);
        if (failure) {
            dvx_pool_stop(p);
            dvx_fail(error, "the system gives no %d threads: %.60s", threads, strerror(failure));
            return NULL;
        }
        p->started = part;
    }
    wait_until_done(p);
    return p;
}

void dvx_pool_run(pool *p, kernel_function run, void *const *buffers) {
    atomic_store_explicit(&p->run, run, memory_order_relaxed);
    atomic_store_explicit(&p->buffers, buffers, memory_order_relaxed);
    atomic_store_explicit(&p->left, (unsigned)p->threads, memory_order_relaxed);
    uint64_t number = (atomic_load_explicit(&p->taken, memory_order_relaxed) >> 32) + 1;
    atomic_store(&p->taken, number << 32);
    wake_workers(p);
    run_parts(p, 0);
    wait_until_done(p);
}

int dvx_pool_pinned(const pool *p) { return (int)atomic_load(&p->pinned); }

void dvx_pool_stop(pool *p) {
    atomic_store(&p->stop, 1);
    wake_workers(p);
    for (int part = 1; part <= p->started; part++) pthread_join(p->workers[part].thread, NULL);
    free(p);
}
