/* Opens a plan and its weights thousands of times, changed at random, and steps through what opens.
 *
 *     fuzz_plan PLAN WEIGHTS SEED CASES
 *
 * Prints the error text of every case, or "opened". Every file and all working memory end where memory does: a byte
 * read or written after it is a fault, and so is one written to the weights. Built with sanitizers, around compiled
 * kernels: whatever opens must step. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#define HEADER 136
#define PORT 80
#define CALL 64
#define VARIANT 56
#define PLACE 16
#define DERIVATION 80
#define LINE 64
#define THREADS 4 /* at least those of the plans that are changed */
#define RUN_LIMIT (1u << 26)
#define CONSTANT 4096 /* bytes up to which a constant is taken for a `shape` or a list */

typedef struct {
    uint8_t *data, *map;
    size_t size, map_size;
} guarded;

static uint64_t random_state;

static uint32_t random_below(uint32_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % (limit ? limit : 1));
}

/* Memory between two pages that can't be read; its last byte is the last before the second. */
static guarded guard(const uint8_t *data, size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    guarded g = {.size = size, .map_size = (size + page - 1) / page * page + 2 * page};
    g.map = mmap(NULL, g.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (g.map == MAP_FAILED) abort();
    mprotect(g.map, page, PROT_NONE);
    mprotect(g.map + g.map_size - page, page, PROT_NONE);
    g.data = g.map + g.map_size - page - size;
    if (size && data) memcpy(g.data, data, size);
    return g;
}

/* In place of the runtime's (by the linker's --wrap): the same limits, and pages around it that can't be read. */
int __wrap_dvx_memory_take(memory *m, uint64_t size, const char *what, char *error);
void __wrap_dvx_memory_free(memory *m);

int __wrap_dvx_memory_take(memory *m, uint64_t size, const char *what, char *error) {
    if (size > RUN_LIMIT)
        return dvx_fail(error, "this test gives no %llu bytes for %s", (unsigned long long)size, what);
    guarded g = guard(NULL, (size_t)(size + LINE - 1) / LINE * LINE);
    *m = (memory){.data = g.data, .size = (size_t)size, .map = g.map, .map_size = g.map_size};
    return 0;
}

void __wrap_dvx_memory_free(memory *m) {
    if (m->map) munmap(m->map, m->map_size);
}

static uint64_t strange_value(void) {
    static const uint64_t values[] = {0, 1, 2, 7, 63, 64, 127, 128, 200, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                                      0xFFFFFFFE, 1ull << 32, 1ull << 56, 5ull << 56, 6ull << 56, 1ull << 63, ~0ull, ~63ull};
    uint32_t count = sizeof values / sizeof *values, which = random_below(count + 8);
    if (which < count) return values[which];
    return (uint64_t)random_below(6) << 56 | random_below(9000); /* a place */
}

static void change(uint8_t *data, size_t size) {
    uint64_t value = strange_value();
    switch (random_below(4)) {
    case 0:
        data[random_below((uint32_t)size)] ^= (uint8_t)(1u << random_below(8));
        break;
    case 1:
        data[random_below((uint32_t)size)] = (uint8_t)random_below(256);
        break;
    case 2:
        if (size >= 4) memcpy(data + random_below((uint32_t)size / 4) * 4, &value, 4);
        break;
    default:
        if (size >= 8) memcpy(data + random_below((uint32_t)size / 8) * 8, &value, 8);
    }
}

static guarded changed(const bytes *file, int changes) {
    size_t size = file->size;
    if (changes && random_below(16) == 0) size = random_below((uint32_t)size + 1);
    guarded g = guard(file->data, size);
    for (int i = 0; size && i < changes; i++) change(g.data, size);
    return g;
}

/* --- changes that keep the form of a plan ------------------------------------------------------------------------ */

typedef struct {
    uint32_t ports, calls, variants, arguments, derivations;
} counts;

static uint32_t u32_at(const uint8_t *data) {
    uint32_t value;
    memcpy(&value, data, sizeof value);
    return value;
}

static uint64_t u64_at(const uint8_t *data) {
    uint64_t value;
    memcpy(&value, data, sizeof value);
    return value;
}

static void set_u64(uint8_t *data, uint64_t value) { memcpy(data, &value, sizeof value); }

static counts counts_of(const guarded *plan) {
    const uint8_t *at = plan->data + 104;
    return (counts){u32_at(at) + u32_at(at + 4), u32_at(at + 8), u32_at(at + 12), u32_at(at + 16), u32_at(at + 20)};
}

static uint8_t *calls_of(const guarded *plan, counts n) { return plan->data + HEADER + (size_t)n.ports * PORT; }

static uint8_t *variants_of(const guarded *plan, counts n) { return calls_of(plan, n) + (size_t)n.calls * CALL; }

static uint8_t *arguments_of(const guarded *plan, counts n) {
    return variants_of(plan, n) + (size_t)n.variants * VARIANT;
}

/* A number near another: what a wrong size looks like. */
static uint64_t near(uint64_t value) {
    switch (random_below(8)) {
    case 0:
        return value / 2;
    case 1:
        return value * 2;
    case 2:
        return value + LINE;
    case 3:
        return value - LINE;
    case 4:
        return value + 1 + random_below(16);
    case 5:
        return value - 1 - random_below(16);
    case 6:
        return random_below((uint32_t)value + 1);
    default:
        return LINE;
    }
}

static void change_place(uint8_t *at, const uint8_t *other) {
    uint64_t where = u64_at(at), size = u64_at(at + 8);
    switch (random_below(6)) {
    case 0:
        set_u64(at, where >> 56 << 56 | near(where & UINT64_MAX >> 8));
        break;
    case 1:
        set_u64(at, where + (1ull << 56));
        break;
    case 2:
        memcpy(at, other, PLACE); /* another's, and all of it */
        break;
    case 3:
        memcpy(at, other, 8); /* another's, in the same size */
        break;
    default:
        set_u64(at + 8, near(size));
    }
}

static void swap(uint8_t *a, uint8_t *b, size_t size) {
    uint8_t held[CALL];
    memcpy(held, a, size);
    memcpy(a, b, size);
    memcpy(b, held, size);
}

/* Change a number of a constant that kernels take their extents from, or one of a list. */
static void change_constant(const guarded *plan, const guarded *weights, counts n) {
    for (int tries = 0; tries < 64; tries++) {
        const uint8_t *at = arguments_of(plan, n) + (size_t)random_below(n.arguments) * PLACE;
        uint64_t where = u64_at(at), size = u64_at(at + 8);
        if (where >> 56 || size < 4 || size > CONSTANT || where > weights->size || size > weights->size - where) continue;
        uint8_t *word = weights->data + where + random_below((uint32_t)size / 4) * 4;
        uint32_t value = random_below(4) ? (uint32_t)near(u32_at(word)) : (uint32_t)strange_value();
        memcpy(word, &value, sizeof value);
        return;
    }
}

/* Change a place or a number of weights that are made when the plan is opened. */
static void change_derivation(uint8_t *arguments, counts n) {
    if (!n.derivations) return;
    uint8_t *at = arguments + (size_t)n.arguments * PLACE + (size_t)random_below(n.derivations) * DERIVATION;
    uint32_t which = random_below(9);
    if (which < 3) {
        change_place(at + which * PLACE, arguments + (size_t)random_below(n.arguments) * PLACE);
    } else if (which < 7) {
        uint8_t *word = at + 3 * PLACE + (which - 3) * 4;
        uint32_t value = (uint32_t)near(u32_at(word));
        memcpy(word, &value, sizeof value);
    } else {
        uint8_t *row = at + 4 * PLACE + (which - 7) * 8;
        set_u64(row, near(u64_at(row)));
    }
}

static void change_form(guarded *plan, guarded *weights) {
    counts n = counts_of(plan);
    uint8_t *calls = calls_of(plan, n), *variants = variants_of(plan, n), *arguments = arguments_of(plan, n);
    uint8_t *call = calls + (size_t)random_below(n.calls) * CALL;
    uint8_t *variant = variants + (size_t)random_below(n.variants) * VARIANT;
    switch (random_below(11)) {
    case 0:
        swap(call, calls + (size_t)random_below(n.calls) * CALL, CALL);
        break;
    case 1:
        memcpy(variant, variants + (size_t)random_below(n.variants) * VARIANT, 4 + 4 * random_below(3));
        break;
    case 2:
        change_place(call + 16 + random_below(3) * PLACE, arguments + (size_t)random_below(n.arguments) * PLACE);
        break;
    case 3:
        set_u64(plan->data + 40 + 8 * random_below(4), near(u64_at(plan->data + 48)));
        break;
    case 4:
    case 5:
    case 6:
        change_constant(plan, weights, n);
        break;
    case 7:
        change_derivation(arguments, n);
        break;
    default:
        change_place(arguments + (size_t)random_below(n.arguments) * PLACE,
                     arguments + (size_t)random_below(n.arguments) * PLACE);
    }
}

/* Make lengths and checksums right, so that the checks behind them are reached. */
static void fix(guarded *plan, const guarded *weights) {
    if (plan->size < HEADER) return;
    uint64_t total = plan->size;
    uint32_t crc = dvx_crc32(plan->data + HEADER, plan->size - HEADER);
    uint32_t weights_crc = dvx_crc32(weights->data, weights->size);
    memcpy(plan->data + 16, &total, sizeof total);
    memcpy(plan->data + 24, &crc, sizeof crc);
    memcpy(plan->data + 28, &weights_crc, sizeof weights_crc);
}

static void step(dvx *net) {
    int count = dvx_input_count(net);
    dvx_blob *inputs = calloc((size_t)count + 1, sizeof *inputs);
    for (int i = 0; i < count; i++) {
        size_t size = dvx_input(net, i)->bytes;
        uint8_t *data = calloc(size, 1);
        for (size_t k = 0; k < size / 4 && dvx_input(net, i)->type == DVX_FLOAT32; k++)
            ((float *)(void *)data)[k] = (float)random_below(1000) / 500 - 1;
        inputs[i] = (dvx_blob){.data = data, .size = size};
    }
    dvx_reset(net);
    for (int i = 0; i < 3; i++)
        if (dvx_step(net, inputs, count)) abort();
    for (int i = 0; i < count; i++) free((void *)(uintptr_t)inputs[i].data);
    free(inputs);
}

/* Read all that can be asked for: every byte of every output and of every text. */
static void look(dvx *net) {
    volatile uint8_t seen = 0;
    for (int i = 0; i < dvx_output_count(net); i++) {
        const dvx_port *port = dvx_output(net, i);
        const uint8_t *data = dvx_output_data(net, i);
        for (size_t k = 0; k < port->bytes; k++) seen ^= data[k];
        seen ^= (uint8_t)strlen(port->name);
    }
    for (int i = 0; i < dvx_call_count(net); i++) {
        dvx_call_info call;
        if (dvx_call(net, i, &call)) abort();
        seen ^= (uint8_t)(strlen(call.label) ^ strlen(call.gate));
    }
}

static void try_case(const bytes *plan_file, const bytes *weights_file) {
    int form = random_below(4) != 0;
    guarded plan = changed(plan_file, form ? 0 : 1 + (int)random_below(4));
    guarded weights = changed(weights_file, form ? 0 : random_below(8) == 0);
    for (int i = (int)random_below(3); form && i >= 0; i--) change_form(&plan, &weights);
    if (form || random_below(8)) fix(&plan, &weights);
    mprotect(weights.map, weights.map_size, PROT_NONE); /* but for the file itself, and that only to be read */
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    mprotect(weights.map + page, weights.map_size - 2 * page, PROT_READ);
    dvx_options options = {.threads = random_below(16) ? 1 : 1 + (int)random_below(THREADS),
                           .profile = (int)random_below(2)};
    char error[DVX_ERROR_SIZE];
    dvx_blob blobs[] = {{.data = plan.data, .size = plan.size}, {.data = weights.data, .size = weights.size}};
    dvx *net;
    int failed = dvx_open(blobs[0], blobs[1], &options, &net, error);
    puts(failed ? error : "opened");
    if (failed && net) abort();
    munmap(plan.map, plan.map_size); /* an open network needs it no more */
    if (net) {
        dvx_info info;
        dvx_get_info(net, &info);
        if (info.memory < RUN_LIMIT) {
            step(net);
            look(net);
        }
    }
    dvx_close(net);
    munmap(weights.map, weights.map_size);
}

int main(int count, char **values) {
    char error[DVX_ERROR_SIZE];
    bytes plan, weights;
    if (count != 5 || dvx_bytes_open(&plan, (dvx_blob){.path = values[1]}, "plan", error) ||
        dvx_bytes_open(&weights, (dvx_blob){.path = values[2]}, "weights", error))
        return 2;
    random_state = strtoull(values[3], NULL, 10);
    for (long i = atol(values[4]); i > 0; i--) try_case(&plan, &weights);
    return 0;
}
