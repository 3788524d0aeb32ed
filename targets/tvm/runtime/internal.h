/* What the files of the runtime share. */
#ifndef DVX_INTERNAL_H
#define DVX_INTERNAL_H

#include "dvx.h"

#define COST_TERMS 10
#define COUNTS 3

/* --- the generated table, see link.py ------------------------------------------------------------------ */

typedef int32_t (*kernel_function)(void *const *buffers, int32_t part, int32_t parts);

/* A list tells a kernel what to compute; the numbers are those of bounds.py. */
enum { LIST_NONE, LIST_CHANNELS, LIST_LINES, LIST_RUNS };

typedef struct {
    uint32_t bytes;   /* size of an element */
    uint32_t align;   /* alignment of the first byte */
    uint32_t written; /* 1: the kernel writes it */
    uint32_t over;    /* bits of the buffers that it may be */
    uint32_t list;    /* the kind of list that it is read as */
    uint32_t pieces;  /* items of a vector of a LIST_RUNS */
} buffer_entry;

typedef struct bounds bounds;

typedef struct {
    const char *name;
    kernel_function run;
    uint32_t buffers; /* that it takes */
    uint32_t splits;  /* 1: several threads may share a call */
    const buffer_entry *buffer;
    void (*touches)(bounds *b); /* compares what it touches with its arguments */
} kernel_entry;

extern const kernel_entry dvx_kernels[];
extern const uint32_t dvx_kernel_count;
extern const uint8_t dvx_library_sha256[32];
extern const char *const dvx_cpu_features[]; /* that the kernels need, by LLVM's names; NULL ends them */

/* --- system.c ------------------------------------------------------------------------------------------- */

#define MOST_CORES 1024 /* numbers of cores are below this */

typedef struct {
    uint8_t *data; /* zeros at first, starts on a page, on 2 MiB if it is large */
    size_t size;
    void *map;
    size_t map_size;
} memory;

int dvx_memory_take(memory *m, uint64_t size, const char *what, char *error);
void dvx_memory_free(memory *m);

typedef struct {
    const uint8_t *data;
    size_t size;
    memory own; /* what a file was read into */
} bytes;

int dvx_bytes_open(bytes *b, dvx_blob blob, const char *what, char *error);
void dvx_bytes_close(bytes *b);

uint64_t dvx_now(void); /* nanoseconds of a clock that never goes back */

/* Write a text of at most DVX_ERROR_SIZE bytes; returns -1. */
int dvx_fail(char *error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* --- plan.c: the plan, decoded and checked ---------------------------------------------------------------- */

enum { SPACE_WEIGHTS, SPACE_ARENA, SPACE_STATE, SPACE_BEFORE, SPACE_AFTER, SPACE_DERIVED, SPACES };

typedef struct {
    uint32_t space; /* SPACES: none */
    uint64_t offset, size;
} place;

typedef struct {
    const kernel_entry *kernel;
    uint32_t first_argument;
    uint32_t costed; /* 1: the cost model is known */
    uint32_t only;   /* fits only so many vectors of pixels; 0: any */
    float cost[COST_TERMS];
} variant;

typedef struct {
    uint32_t first_variant, variants;
    const char *label, *gate;
    place counts[COUNTS];
} call;

typedef struct {
    dvx_port port;
    place place;
} plan_port;

/* Weights that are made of others: see derive.c. */
typedef struct {
    place source, matrix, target;
    uint32_t points, edge, outputs, inputs;
    uint64_t source_row, target_row; /* elements */
} derivation;

typedef struct {
    uint64_t weights, derived, arena, state, flip; /* bytes */
    uint32_t weights_crc;
    uint32_t threads; /* the most that may share a step; 1 to DVX_MAX_THREADS */
    uint32_t inputs, outputs, calls, variants, arguments, derivations, string_bytes;
    plan_port *ports; /* inputs, then outputs */
    call *call;
    variant *variant;
    place *argument;
    derivation *derivation;
    char *strings;
} plan;

uint32_t dvx_crc32(const uint8_t *data, size_t size);
int dvx_plan_read(plan *p, const uint8_t *data, size_t size, char *error);
void dvx_plan_free(plan *p);

/* --- derive.c: weights made of others ---------------------------------------------------------------------------- */

int dvx_derivation_check(const derivation *d, uint32_t index, char *error);
/* Make all of a plan's; `derived` holds zeros. */
void dvx_derive(const plan *p, const uint8_t *weights, uint8_t *derived);

/* --- bounds.c: calls stay inside their arguments --------------------------------------------------------------- */

/* Check every call; `weights` are those that the plan is for. */
int dvx_bounds_check(const plan *p, const uint8_t *weights, char *error);

/* What the kernel table is written in: see bounds.py. A sum that has no value is refused, whatever is made of it. */
uint64_t dvx_parts(const bounds *b);
uint64_t dvx_list_count(const bounds *b, uint32_t buffer);
uint64_t dvx_list_limit(const bounds *b, uint32_t buffer);
uint64_t dvx_list_inputs(const bounds *b, uint32_t buffer);
uint64_t dvx_entry(bounds *b, uint32_t buffer, uint64_t index);
uint64_t dvx_largest(bounds *b, uint32_t buffer, uint64_t first, uint64_t count, uint64_t step);
uint64_t dvx_rising(bounds *b, uint32_t buffer, uint64_t first, uint64_t count);
uint64_t dvx_add(bounds *b, uint64_t x, uint64_t y);
uint64_t dvx_sub(const bounds *b, uint64_t x, uint64_t y);
uint64_t dvx_mul(bounds *b, uint64_t x, uint64_t y);
uint64_t dvx_div(bounds *b, uint64_t x, uint64_t y);
uint64_t dvx_max(const bounds *b, uint64_t x, uint64_t y);
uint64_t dvx_min(const bounds *b, uint64_t x, uint64_t y);
void dvx_touches(bounds *b, uint32_t buffer, uint64_t elements);
void dvx_needs(bounds *b, uint64_t less, uint64_t more);
void dvx_makes(bounds *b, uint32_t buffer, uint32_t kind, uint64_t count, uint64_t limit, uint64_t inputs,
               uint64_t pieces);

/* --- pool.c: threads ---------------------------------------------------------------------------------------- */

typedef struct pool pool;

/* Start threads - 1 workers; NULL and a text on failure. */
pool *dvx_pool_start(int threads, const int *cores, char *error);
/* Run every part of a call; returns when all are done. */
void dvx_pool_run(pool *p, kernel_function run, void *const *buffers);
int dvx_pool_pinned(const pool *p);
void dvx_pool_stop(pool *p);

/* --- cpu.c -------------------------------------------------------------------------------------------------- */

/* The first of the features that this processor lacks, or NULL. */
const char *dvx_cpu_lacks(const char *const *features);

#endif
