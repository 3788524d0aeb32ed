/* Opens a plan and its weights thousands of times, changed at random, and steps through what opens.
 *
 *     fuzz_plan PLAN WEIGHTS SEED CASES
 *
 * Prints the error text of every case, or "opened". Every file ends where memory does: a byte read after it is a fault.
 * Built with sanitizers and with kernels that do nothing: what is tested is the runtime. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#define HEADER 128
#define RUN_LIMIT (1u << 20)

typedef struct {
    uint8_t *data, *map;
    size_t size, map_size;
} guarded;

static uint64_t random_state;

static uint32_t random_below(uint32_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % (limit ? limit : 1));
}

/* Memory whose last byte is followed by a page that can't be read. */
static guarded guard(const uint8_t *data, size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    guarded g = {.size = size, .map_size = (size + page - 1) / page * page + page};
    g.map = mmap(NULL, g.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED) abort();
    mprotect(g.map + g.map_size - page, page, PROT_NONE);
    g.data = g.map + g.map_size - page - size;
    if (size) memcpy(g.data, data, size);
    return g;
}

static uint64_t strange_value(void) {
    static const uint64_t values[] = {0, 1, 2, 7, 63, 64, 127, 128, 200, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                                      0xFFFFFFFE, 1ull << 32, 1ull << 56, 5ull << 56, 1ull << 63, ~0ull, ~63ull};
    uint32_t count = sizeof values / sizeof *values, which = random_below(count + 8);
    if (which < count) return values[which];
    return (uint64_t)random_below(5) << 56 | random_below(9000); /* a place */
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
    if (random_below(8) == 0) size = random_below((uint32_t)size + 1);
    guarded g = guard(file->data, size);
    for (int i = 0; size && i < changes; i++) change(g.data, size);
    return g;
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
        inputs[i] = (dvx_blob){.data = calloc(size, 1), .size = size};
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
    guarded plan = changed(plan_file, 1 + (int)random_below(4)), weights = changed(weights_file, random_below(8) == 0);
    if (random_below(8)) fix(&plan, &weights);
    dvx_options options = {.threads = 1 + (random_below(16) == 0), .profile = (int)random_below(2)};
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
