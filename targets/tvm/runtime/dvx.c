/* Opening a network and stepping through it; see dvx.h. */
#include "dvx.h"

#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define LINE 64
#define HALVES 2
#define INPUT_CHANNELS 1 /* among the counts of a call */
#define PIXELS 2
/* Below this, waking and meeting the other threads costs more than they save. */
#define SHARED_NS 4000

typedef struct {
    const int32_t *counts[HALVES][COUNTS]; /* first elements of the lists; NULL: none */
    const variant *chosen;                 /* in the last step; NULL: skipped */
    uint64_t ns;
    int32_t count[COUNTS];
    int threads;
} call_state;

struct dvx {
    plan plan;
    bytes weights;
    memory copy; /* the weights, if they were not aligned */
    memory derived; /* weights made of those */
    memory work; /* arena, state, and the two halves of the flip space */
    uint8_t *state, *flip;
    size_t state_bytes, flip_bytes; /* flip: both halves */
    void **arguments[HALVES];       /* for all variants, by which half is BEFORE */
    call_state *calls;
    pool *pool;
    int threads, profile;
    int half;  /* which half of the flip space is BEFORE in the next step */
    int ready; /* 1: reset; 0: not yet */
    uint64_t steps, last_step_ns;
    char error[DVX_ERROR_SIZE];
};

/* --- opening ------------------------------------------------------------------------------------------------- */

/* The threads to start; -1 and a text if the options can't be met. */
static int check_options(const plan *p, const dvx_options *options, char *error) {
    int threads = options->threads ? options->threads : 1, most = (int)p->threads;
    if (threads < 0 || threads > most)
        return dvx_fail(error, "threads is %d; this plan is laid out for 1 to %d", threads, most);
    if (!options->cores) return threads;
    if (options->core_count < threads)
        return dvx_fail(error, "%d cores were given for %d threads", options->core_count, threads);
    if (options->core_count > MOST_CORES)
        return dvx_fail(error, "%d cores were given, there are at most %d", options->core_count, MOST_CORES);
    for (int i = 0; i < options->core_count; i++)
        if (options->cores[i] < 0 || options->cores[i] >= MOST_CORES)
            return dvx_fail(error, "there is no core %d: they are 0 to %d", options->cores[i], MOST_CORES - 1);
    return threads;
}

static int check_weights(const plan *p, const bytes *weights, char *error) {
    unsigned long long has = weights->size, needs = p->weights;
    if (has < needs) return dvx_fail(error, "the weights are truncated: %llu of %llu bytes", has, needs);
    if (has != needs) return dvx_fail(error, "the weights are of another plan: %llu bytes, not %llu", has, needs);
    if (dvx_crc32(weights->data, weights->size) != p->weights_crc)
        return dvx_fail(error, "the weights are damaged or of another plan: their checksum is wrong");
    return 0;
}

static int open_weights(dvx *net, dvx_blob blob, char *error) {
    if (dvx_bytes_open(&net->weights, blob, "weights", error) || check_weights(&net->plan, &net->weights, error))
        return -1;
    if ((uintptr_t)net->weights.data % LINE == 0) return 0;
    if (dvx_memory_take(&net->copy, net->weights.size, "weights", error)) return -1;
    memcpy(net->copy.data, net->weights.data, net->weights.size);
    return 0;
}

static const uint8_t *weights_of(const dvx *net) { return net->copy.data ? net->copy.data : net->weights.data; }

static int make_derived(dvx *net, char *error) {
    if (!net->plan.derived) return 0;
    if (dvx_memory_take(&net->derived, net->plan.derived, "weights made when opened", error)) return -1;
    dvx_derive(&net->plan, weights_of(net), net->derived.data);
    return 0;
}

static uint64_t lines(uint64_t size) { return (size + LINE - 1) / LINE * LINE; }

static int take_memory(dvx *net, char *error) {
    const plan *p = &net->plan;
    const uint64_t limit = UINT64_MAX / 16; /* sums below can't overflow */
    if (p->arena > limit || p->state > limit || p->flip > limit)
        return dvx_fail(error, "damaged plan: it needs more memory than there can be");
    uint64_t arena = lines(p->arena), state = lines(p->state), flip = lines(p->flip);
    if (dvx_memory_take(&net->work, arena + state + HALVES * flip, "network", error)) return -1;
    net->state = net->work.data + arena;
    net->flip = net->state + state;
    net->state_bytes = (size_t)state;
    net->flip_bytes = (size_t)(HALVES * flip);
    return 0;
}

static void *address(const dvx *net, const place *at, int half) {
    size_t offset = (size_t)at->offset, half_bytes = net->flip_bytes / HALVES;
    switch (at->space) {
    case SPACE_WEIGHTS:
        return (void *)((uintptr_t)weights_of(net) + offset); /* not through a pointer: an empty file has none */
    case SPACE_ARENA:
        return net->work.data + offset;
    case SPACE_STATE:
        return net->state + offset;
    case SPACE_BEFORE:
        return net->flip + (size_t)half * half_bytes + offset;
    case SPACE_AFTER:
        return net->flip + (size_t)(1 - half) * half_bytes + offset;
    case SPACE_DERIVED:
        return net->derived.data + offset;
    default:
        return NULL;
    }
}

static int resolve(dvx *net, char *error) {
    const plan *p = &net->plan;
    net->calls = calloc((size_t)p->calls + 1, sizeof *net->calls);
    for (int half = 0; half < HALVES; half++)
        net->arguments[half] = calloc((size_t)p->arguments + 1, sizeof *net->arguments[half]);
    if (!net->calls || !net->arguments[0] || !net->arguments[1])
        return dvx_fail(error, "out of memory for the plan's tables");
    for (int half = 0; half < HALVES; half++) {
        for (uint32_t i = 0; i < p->arguments; i++) net->arguments[half][i] = address(net, &p->argument[i], half);
        for (uint32_t i = 0; i < p->calls; i++)
            for (int k = 0; k < COUNTS; k++)
                net->calls[i].counts[half][k] = address(net, &p->call[i].counts[k], half);
    }
    return 0;
}

static int read_plan(dvx *net, dvx_blob blob, char *error) {
    bytes file;
    if (dvx_bytes_open(&file, blob, "plan", error)) return -1;
    int result = dvx_plan_read(&net->plan, file.data, file.size, error);
    dvx_bytes_close(&file);
    return result;
}

static int open_all(dvx *net, dvx_blob plan_blob, dvx_blob weights, const dvx_options *options, char *error) {
    const char *lacking = dvx_cpu_lacks(dvx_cpu_features);
    if (lacking) return dvx_fail(error, "this processor lacks %s, which the library was compiled for", lacking);
    if (read_plan(net, plan_blob, error)) return -1;
    net->threads = check_options(&net->plan, options, error);
    if (net->threads < 0 || open_weights(net, weights, error) ||
        dvx_bounds_check(&net->plan, address(net, &(place){0}, 0), error) || make_derived(net, error) ||
        take_memory(net, error) || resolve(net, error))
        return -1;
    net->profile = options->profile;
    if (net->threads == 1) return 0;
    net->pool = dvx_pool_start(net->threads, options->cores, error);
    return net->pool ? 0 : -1;
}

int dvx_open(dvx_blob plan_blob, dvx_blob weights, const dvx_options *options, dvx **net, char *error) {
    const dvx_options defaults = {0};
    *net = calloc(1, sizeof **net);
    if (!*net) return dvx_fail(error, "out of memory");
    if (open_all(*net, plan_blob, weights, options ? options : &defaults, error)) {
        dvx_close(*net);
        *net = NULL;
        return -1;
    }
    return 0;
}

void dvx_close(dvx *net) {
    if (!net) return;
    if (net->pool) dvx_pool_stop(net->pool);
    for (int half = 0; half < HALVES; half++) free(net->arguments[half]);
    free(net->calls);
    dvx_memory_free(&net->work);
    dvx_memory_free(&net->derived);
    dvx_memory_free(&net->copy);
    dvx_bytes_close(&net->weights);
    dvx_plan_free(&net->plan);
    free(net);
}

/* --- stepping ------------------------------------------------------------------------------------------------ */

int dvx_reset(dvx *net) {
    if (!net->ready) memset(net->work.data, 0, net->work.size); /* touched once: no step meets a new page */
    memset(net->state, 0, net->state_bytes);
    memset(net->flip, 0, net->flip_bytes);
    net->half = 0;
    net->steps = 0;
    net->ready = 1;
    return 0;
}

static int all_finite(const uint32_t *values, size_t count) {
    uint32_t bad = 0;
    for (size_t i = 0; i < count; i++) bad |= (values[i] & 0x7F800000u) == 0x7F800000u;
    return !bad;
}

static int all_bool(const uint8_t *values, size_t count) {
    uint8_t seen = 0;
    for (size_t i = 0; i < count; i++) seen |= values[i];
    return seen <= 1;
}

static int check_input(dvx *net, const dvx_port *port, const dvx_blob *input) {
    if (!input->data || input->size != port->bytes)
        return dvx_fail(net->error, "input %.100s has %llu bytes, not %llu", port->name,
                        (unsigned long long)(input->data ? input->size : 0), (unsigned long long)port->bytes);
    if (port->type == DVX_FLOAT32 && (uintptr_t)input->data % sizeof(uint32_t))
        return dvx_fail(net->error, "input %.100s is not aligned to its elements", port->name);
    if (port->type == DVX_FLOAT32 && !all_finite(input->data, port->bytes / sizeof(uint32_t)))
        return dvx_fail(net->error, "input %.100s has NaN or infinite values", port->name);
    if (port->type == DVX_BOOL && !all_bool(input->data, port->bytes))
        return dvx_fail(net->error, "input %.100s has bytes that are neither 0 nor 1", port->name);
    return 0;
}

/* All are checked before the first is copied: one may lie in a state. */
static int take_inputs(dvx *net, const dvx_blob *inputs, int count) {
    const plan *p = &net->plan;
    if (count < 0 || (uint32_t)count != p->inputs)
        return dvx_fail(net->error, "%d inputs were given, the network has %u", count, p->inputs);
    for (int i = 0; i < count; i++)
        if (check_input(net, &p->ports[i].port, &inputs[i])) return -1;
    for (int i = 0; i < count; i++)
        memcpy(address(net, &p->ports[i].place, net->half), inputs[i].data, inputs[i].size);
    return 0;
}

static float cost_of(const variant *v, const float n[COUNTS]) {
    const float *c = v->cost;
    float a = n[0], b = n[1], t = n[2];
    float work = c[0] + c[1] * a + c[2] * b + c[3] * t + c[4] * a * b + c[5] * a * t + c[6] * b * t + c[7] * a * b * t;
    return work + a * (b * c[8] < c[9] ? b * c[8] : c[9]); /* waiting for weights: by cache lines, or all in a row */
}

/* Read the counts; returns 0 if there is nothing to do: no output channel, or no pixel. What has no input channel
 * is still its bias. */
static int read_counts(call_state *state, int half, float n[COUNTS]) {
    int any = 1;
    for (int k = 0; k < COUNTS; k++) {
        const int32_t *list = state->counts[half][k];
        state->count[k] = list ? *list : -1;
        n[k] = list ? (float)*list : 1;
        any &= n[k] > 0 || k == INPUT_CHANNELS;
    }
    return any;
}

/* The cheapest variant that fits; the first always does. */
static const variant *choose(const plan *p, const call *c, const float n[COUNTS], float *ns) {
    const variant *best = &p->variant[c->first_variant];
    *ns = cost_of(best, n);
    for (uint32_t i = 1; i < c->variants; i++) {
        const variant *v = &p->variant[c->first_variant + i];
        float cost = cost_of(v, n);
        int fits = !v->only || (float)v->only == n[PIXELS];
        if (fits && cost < *ns) {
            best = v;
            *ns = cost;
        }
    }
    return best;
}

static void run_call(dvx *net, uint32_t index) {
    const plan *p = &net->plan;
    call_state *state = &net->calls[index];
    float n[COUNTS], ns;
    state->chosen = NULL;
    state->threads = 0;
    if (!read_counts(state, net->half, n)) return;
    const variant *v = choose(p, &p->call[index], n, &ns);
    void *const *buffers = net->arguments[net->half] + v->first_argument;
    int shared = net->pool && v->kernel->splits && (!v->costed || ns > SHARED_NS);
    state->chosen = v;
    state->threads = shared ? net->threads : 1;
    if (shared)
        dvx_pool_run(net->pool, v->kernel->run, buffers);
    else
        v->kernel->run(buffers, 0, 1);
}

static void run_calls(dvx *net) {
    for (uint32_t i = 0; i < net->plan.calls; i++) run_call(net, i);
}

static void run_calls_timed(dvx *net) {
    uint64_t before = dvx_now();
    for (uint32_t i = 0; i < net->plan.calls; i++) {
        run_call(net, i);
        uint64_t after = dvx_now();
        net->calls[i].ns = after - before;
        before = after;
    }
}

int dvx_step(dvx *net, const dvx_blob *inputs, int count) {
    uint64_t start = dvx_now();
    if (!net->ready) return dvx_fail(net->error, "step before reset: call dvx_reset first");
    if (take_inputs(net, inputs, count)) return -1;
    if (net->profile)
        run_calls_timed(net);
    else
        run_calls(net);
    net->half = 1 - net->half;
    net->steps++;
    net->last_step_ns = dvx_now() - start;
    return 0;
}

/* --- asking -------------------------------------------------------------------------------------------------- */

const void *dvx_output_data(const dvx *net, int index) {
    if (index < 0 || (uint32_t)index >= net->plan.outputs || !net->steps) return NULL;
    return address(net, &net->plan.ports[net->plan.inputs + (uint32_t)index].place, 1 - net->half); /* as in that step */
}

int dvx_input_count(const dvx *net) { return (int)net->plan.inputs; }

int dvx_output_count(const dvx *net) { return (int)net->plan.outputs; }

const dvx_port *dvx_input(const dvx *net, int index) {
    if (index < 0 || (uint32_t)index >= net->plan.inputs) return NULL;
    return &net->plan.ports[index].port;
}

const dvx_port *dvx_output(const dvx *net, int index) {
    if (index < 0 || (uint32_t)index >= net->plan.outputs) return NULL;
    return &net->plan.ports[net->plan.inputs + (uint32_t)index].port;
}

static int find(const dvx *net, uint32_t first, uint32_t count, const char *name) {
    for (uint32_t i = 0; name && i < count; i++)
        if (!strcmp(net->plan.ports[first + i].port.name, name)) return (int)i;
    return -1;
}

int dvx_input_index(const dvx *net, const char *name) { return find(net, 0, net->plan.inputs, name); }

int dvx_output_index(const dvx *net, const char *name) {
    return find(net, net->plan.inputs, net->plan.outputs, name);
}

const char *dvx_error(const dvx *net) { return net->error; }

void dvx_get_info(const dvx *net, dvx_info *info) {
    *info = (dvx_info){
        .threads = net->threads,
        .max_threads = (int)net->plan.threads,
        .pinned = net->pool ? dvx_pool_pinned(net->pool) : 0,
        .memory = net->work.size,
        .weights = net->weights.size,
        .derived = net->derived.size,
        .weights_copied = net->copy.data != NULL,
        .steps = net->steps,
        .last_step_ns = net->last_step_ns,
    };
}

int dvx_call_count(const dvx *net) { return (int)net->plan.calls; }

int dvx_call(const dvx *net, int index, dvx_call_info *info) {
    if (index < 0 || (uint32_t)index >= net->plan.calls || !net->steps) return -1;
    const call *c = &net->plan.call[index];
    const call_state *state = &net->calls[index];
    *info = (dvx_call_info){
        .label = c->label,
        .gate = c->gate,
        .kernel = state->chosen ? state->chosen->kernel->name : NULL,
        .threads = state->threads,
        .counts = {state->count[0], state->count[1], state->count[2]},
        .ns = state->ns,
    };
    return 0;
}
