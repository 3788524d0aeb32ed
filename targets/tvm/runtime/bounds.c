/* Do the calls of a plan stay inside what they are given? Kernels state what they touch (bounds.py), in terms of their
 * constants, which lie in the weights, and of the lists that they read. Calls are gone through in their order: a list is
 * known from the call that writes it until something is written over it; a constant one by what it holds. Whatever else
 * a buffer holds decides no address. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

typedef struct {
    place at;
    uint32_t kind;
    uint64_t count, limit, inputs, pieces;
} list;

struct bounds {
    const plan *plan;
    const uint8_t *weights;
    const kernel_entry *kernel;
    const place *argument; /* those of the variant */
    list *argument_list;   /* by argument, if it is read as a list */
    const char *refused;   /* why; NULL: nothing is wrong so far */
    uint32_t buffer;       /* that it is about */
    list *known, *made;    /* lists now; those that the variant makes */
    uint32_t known_count, made_count, known_room, made_room;
};

static void refuse(bounds *b, uint32_t buffer, const char *why) {
    if (b->refused) return;
    b->refused = why;
    b->buffer = buffer;
}

/* --- what the kernel table is written in ----------------------------------------------------------------------- */

uint64_t dvx_parts(const bounds *b) { return b->plan->threads; }

uint64_t dvx_list_count(const bounds *b, uint32_t buffer) { return b->argument_list[buffer].count; }

uint64_t dvx_list_limit(const bounds *b, uint32_t buffer) { return b->argument_list[buffer].limit; }

uint64_t dvx_list_inputs(const bounds *b, uint32_t buffer) { return b->argument_list[buffer].inputs; }

static int32_t int_at(const bounds *b, const place *at, uint64_t index) {
    int32_t value;
    memcpy(&value, b->weights + at->offset + index * sizeof value, sizeof value);
    return value;
}

/* Whether a constant has so many int32 from `first` on. */
static int has_entries(bounds *b, uint32_t buffer, uint64_t first, uint64_t count, uint64_t step) {
    const place *at = &b->argument[buffer];
    uint64_t size = at->size / sizeof(int32_t);
    if (at->space != SPACE_WEIGHTS)
        refuse(b, buffer, "is no constant");
    else if (count && (first >= size || (size - 1 - first) / step < count - 1))
        refuse(b, buffer, "is too short");
    else
        return 1;
    return 0;
}

uint64_t dvx_largest(bounds *b, uint32_t buffer, uint64_t first, uint64_t count, uint64_t step) {
    int32_t largest = 0;
    if (!has_entries(b, buffer, first, count, step)) return 0;
    for (uint64_t i = 0; i < count; i++) {
        int32_t value = int_at(b, &b->argument[buffer], first + i * step);
        if (value < 0) refuse(b, buffer, "has a negative entry");
        if (value > largest) largest = value;
    }
    return (uint64_t)largest;
}

uint64_t dvx_entry(bounds *b, uint32_t buffer, uint64_t index) { return dvx_largest(b, buffer, index, 1, 1); }

uint64_t dvx_rising(bounds *b, uint32_t buffer, uint64_t first, uint64_t count) {
    int32_t before = 0;
    if (!has_entries(b, buffer, first, count, 1)) return 0;
    for (uint64_t i = 0; i < count; i++) {
        int32_t value = int_at(b, &b->argument[buffer], first + i);
        if (value < before) refuse(b, buffer, "has entries that fall");
        before = value;
    }
    return (uint64_t)before;
}

uint64_t dvx_add(bounds *b, uint64_t x, uint64_t y) {
    if (x > UINT64_MAX - y) refuse(b, UINT32_MAX, "needs more than there can be");
    return x + y;
}

uint64_t dvx_sub(const bounds *b, uint64_t x, uint64_t y) {
    (void)b;
    return x > y ? x - y : 0;
}

uint64_t dvx_mul(bounds *b, uint64_t x, uint64_t y) {
    if (y && x > UINT64_MAX / y) refuse(b, UINT32_MAX, "needs more than there can be");
    return x * y;
}

uint64_t dvx_div(bounds *b, uint64_t x, uint64_t y) {
    if (y) return x / y;
    refuse(b, UINT32_MAX, "would divide by zero");
    return 0;
}

uint64_t dvx_max(const bounds *b, uint64_t x, uint64_t y) {
    (void)b;
    return x > y ? x : y;
}

uint64_t dvx_min(const bounds *b, uint64_t x, uint64_t y) {
    (void)b;
    return x < y ? x : y;
}

void dvx_touches(bounds *b, uint32_t buffer, uint64_t elements) {
    if (elements > b->argument[buffer].size / b->kernel->buffer[buffer].bytes) refuse(b, buffer, "is too small");
}

void dvx_needs(bounds *b, uint64_t less, uint64_t more) {
    if (less > more) refuse(b, UINT32_MAX, "is given a number out of range");
}

/* --- lists ------------------------------------------------------------------------------------------------------ */

static int overlap(const place *a, const place *b) {
    return a->space == b->space && a->offset < b->offset + b->size && b->offset < a->offset + a->size;
}

static int equal(const place *a, const place *b) {
    return a->space == b->space && a->offset == b->offset && a->size == b->size;
}

static int add_list(list **lists, uint32_t *count, uint32_t *room, const list *added) {
    if (*count == *room) {
        uint32_t more = *room ? 2 * *room : 64;
        list *larger = realloc(*lists, more * sizeof *larger);
        if (!larger) return -1;
        *lists = larger;
        *room = more;
    }
    (*lists)[(*count)++] = *added;
    return 0;
}

void dvx_makes(bounds *b, uint32_t buffer, uint32_t kind, uint64_t count, uint64_t limit, uint64_t inputs,
               uint64_t pieces) {
    list made = {b->argument[buffer], kind, count, limit, inputs, pieces};
    if (add_list(&b->made, &b->made_count, &b->made_room, &made)) refuse(b, buffer, "is a list there is no memory for");
}

/* The largest item of a constant list, and 1; 0: it has none. */
static uint64_t limit_of(bounds *b, uint32_t buffer, uint64_t first, uint64_t count) {
    return count ? dvx_largest(b, buffer, first, count, 1) + 1 : 0;
}

/* What is known of a list in the weights: what it holds. */
static void constant_list(bounds *b, uint32_t buffer, list *found) {
    const buffer_entry *is = &b->kernel->buffer[buffer];
    uint64_t header = is->list == LIST_CHANNELS ? 1 : 16, count = dvx_entry(b, buffer, 0), items = count, apart = 0;
    if (is->list == LIST_RUNS) {
        items = count * is->pieces; /* each has 31 bits: no overflow */
        apart = dvx_entry(b, buffer, 1);
        if (items > apart) refuse(b, buffer, "is a list of more items than it has room for");
    }
    *found = (list){.at = b->argument[buffer], .kind = is->list, .count = count, .pieces = is->pieces};
    has_entries(b, buffer, 0, header, 1);
    found->limit = limit_of(b, buffer, header, items);
    if (is->list == LIST_RUNS) found->inputs = limit_of(b, buffer, header + apart, items);
}

static void find_list(bounds *b, uint32_t buffer, list *found) {
    const buffer_entry *is = &b->kernel->buffer[buffer];
    if (b->argument[buffer].space == SPACE_WEIGHTS) {
        constant_list(b, buffer, found);
        return;
    }
    for (uint32_t i = 0; i < b->known_count; i++) {
        *found = b->known[i];
        if (equal(&found->at, &b->argument[buffer]) && found->kind == is->list && found->pieces >= is->pieces) return;
    }
    refuse(b, buffer, "is a list that nothing has written");
}

/* Forget every list that a variant may write over. */
static void forget(bounds *b, const variant *v) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < b->known_count; i++) {
        int written = 0;
        for (uint32_t k = 0; k < v->kernel->buffers; k++)
            written |= v->kernel->buffer[k].written &&
                       overlap(&b->known[i].at, &b->plan->argument[v->first_argument + k]);
        if (!written) b->known[kept++] = b->known[i];
    }
    b->known_count = kept;
}

/* --- calls ------------------------------------------------------------------------------------------------------ */

static void check_argument(bounds *b, uint32_t i) {
    const buffer_entry *is = &b->kernel->buffer[i];
    const place *at = &b->argument[i];
    if (at->offset % is->align) refuse(b, i, "is not aligned");
    if (is->list) find_list(b, i, &b->argument_list[i]);
    if (!is->written) return;
    if (at->space == SPACE_WEIGHTS || at->space == SPACE_DERIVED) refuse(b, i, "is written and lies in the weights");
    for (uint32_t k = 0; k < b->kernel->buffers; k++) {
        if (k == i || !overlap(at, &b->argument[k])) continue;
        if (k >= 32 || !(is->over >> k & 1) || at->offset != b->argument[k].offset)
            refuse(b, i, "is written and overlaps another");
    }
}

static int check_variant(bounds *b, const variant *v, uint32_t index, char *error) {
    b->kernel = v->kernel;
    b->argument = b->plan->argument + v->first_argument;
    b->refused = NULL;
    b->made_count = 0;
    for (uint32_t i = 0; i < v->kernel->buffers; i++) check_argument(b, i);
    if (!b->refused) v->kernel->touches(b);
    if (!b->refused) return 0;
    if (b->buffer == UINT32_MAX)
        return dvx_fail(error, "damaged plan: variant %u: %.100s %s", index, v->kernel->name, b->refused);
    return dvx_fail(error, "damaged plan: variant %u: buffer %u of %.100s %s", index, b->buffer, v->kernel->name,
                    b->refused);
}

/* A call makes its list known if it always runs. */
static int keep_made(bounds *b, const call *c, char *error) {
    for (int k = 0; k < COUNTS; k++)
        if (c->counts[k].space != SPACES) return 0;
    for (uint32_t i = 0; c->variants == 1 && i < b->made_count; i++)
        if (add_list(&b->known, &b->known_count, &b->known_room, &b->made[i]))
            return dvx_fail(error, "out of memory for the plan's lists");
    return 0;
}

static int check_calls(bounds *b, char *error) {
    const plan *p = b->plan;
    for (uint32_t i = 0; i < p->calls; i++) {
        const call *c = &p->call[i];
        for (uint32_t k = c->first_variant; k < c->first_variant + c->variants; k++)
            if (check_variant(b, &p->variant[k], k, error)) return -1;
        for (uint32_t k = c->first_variant; k < c->first_variant + c->variants; k++) forget(b, &p->variant[k]);
        if (keep_made(b, c, error)) return -1;
    }
    return 0;
}

int dvx_bounds_check(const plan *p, const uint8_t *weights, char *error) {
    uint32_t most = 1;
    for (uint32_t i = 0; i < dvx_kernel_count; i++)
        if (dvx_kernels[i].buffers > most) most = dvx_kernels[i].buffers;
    bounds b = {.plan = p, .weights = weights, .argument_list = calloc(most, sizeof *b.argument_list)};
    int result = b.argument_list ? check_calls(&b, error) : dvx_fail(error, "out of memory for the plan's lists");
    free(b.argument_list);
    free(b.known);
    free(b.made);
    return result;
}
