/* Reading a plan (the format is in plan_file.py). Nothing in the file is trusted: every count, index and offset is
 * checked here, once, so that a step needs no checks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define HEADER_BYTES 136
#define PORT_BYTES 80
#define CALL_BYTES 64
#define VARIANT_BYTES 56
#define PLACE_BYTES 16
#define DERIVATION_BYTES 80
#define VERSION 4

static const uint8_t MAGIC[8] = {'D', 'V', 'X', 'P', 'L', 'A', 'N', 0};
static const uint32_t TYPE_BYTES[] = {4, 8, 4, 1};

/* --- a cursor over the file ---------------------------------------------------------------------------- */

static uint32_t read_u32(const uint8_t **at) {
    uint32_t value;
    memcpy(&value, *at, sizeof value);
    *at += sizeof value;
    return value;
}

static uint64_t read_u64(const uint8_t **at) {
    uint64_t value;
    memcpy(&value, *at, sizeof value);
    *at += sizeof value;
    return value;
}

static place read_place(const uint8_t **at) {
    uint64_t where = read_u64(at), size = read_u64(at);
    if (where == UINT64_MAX && size == UINT64_MAX) return (place){SPACES, 0, 0};
    return (place){(uint32_t)(where >> 56), where & (UINT64_MAX >> 8), size};
}

/* --- checks ----------------------------------------------------------------------------------------------- */

static int check_place(const plan *p, const place *at, const char *what, uint32_t index, char *error) {
    const uint64_t limits[SPACES] = {p->weights, p->arena, p->state, p->flip, p->flip, p->derived};
    if (at->space >= SPACES) return dvx_fail(error, "damaged plan: %s %u is in no memory space", what, index);
    uint64_t limit = limits[at->space];
    if (at->size > limit || at->offset > limit - at->size)
        return dvx_fail(error, "damaged plan: %s %u lies outside its memory space", what, index);
    return 0;
}

static const char *string_at(const plan *p, uint32_t offset) {
    return offset < p->string_bytes ? p->strings + offset : NULL; /* the table ends in a NUL */
}

static int check_port(const plan *p, plan_port *port, uint32_t index, char *error) {
    dvx_port *out = &port->port;
    uint64_t size = TYPE_BYTES[out->type];
    for (int i = 0; i < DVX_MAX_RANK; i++) {
        uint64_t extent = (uint64_t)out->sizes[i];
        if (i >= out->rank) {
            if (extent) return dvx_fail(error, "damaged plan: port %u has more sizes than dimensions", index);
        } else if (extent == 0 || extent > port->place.size / size) { /* also: no overflow */
            return dvx_fail(error, "damaged plan: the sizes of port %u do not fit its bytes", index);
        } else {
            size *= extent;
        }
    }
    if (size != port->place.size) return dvx_fail(error, "damaged plan: the sizes of port %u do not fit its bytes", index);
    if (port->place.offset % TYPE_BYTES[out->type]) return dvx_fail(error, "damaged plan: port %u is not aligned", index);
    if (index < p->inputs && (port->place.space == SPACE_WEIGHTS || port->place.space == SPACE_DERIVED))
        return dvx_fail(error, "damaged plan: input %u lies in the weights", index);
    out->bytes = (size_t)size;
    return check_place(p, &port->place, "port", index, error);
}

static int read_port(plan *p, uint32_t index, const uint8_t **at, char *error) {
    plan_port *port = &p->ports[index];
    uint32_t name = read_u32(at), type = read_u32(at), rank = read_u32(at), reserved = read_u32(at);
    port->place = read_place(at);
    for (int i = 0; i < DVX_MAX_RANK; i++) port->port.sizes[i] = (int64_t)read_u64(at);
    port->port.name = string_at(p, name);
    if (!port->port.name || type > DVX_BOOL || rank > DVX_MAX_RANK || reserved)
        return dvx_fail(error, "damaged plan: port %u has a bad name, type or rank", index);
    port->port.type = (dvx_type)type;
    port->port.rank = (int)rank;
    return check_port(p, port, index, error);
}

static int read_call(plan *p, uint32_t index, const uint8_t **at, char *error) {
    call *c = &p->call[index];
    c->first_variant = read_u32(at);
    c->variants = read_u32(at);
    c->label = string_at(p, read_u32(at));
    c->gate = string_at(p, read_u32(at));
    for (int i = 0; i < COUNTS; i++) c->counts[i] = read_place(at);
    if (!c->label || !c->gate) return dvx_fail(error, "damaged plan: call %u has a bad label or gate", index);
    if (c->variants == 0 || c->variants > p->variants || c->first_variant > p->variants - c->variants)
        return dvx_fail(error, "damaged plan: call %u names variants that do not exist", index);
    for (int i = 0; i < COUNTS; i++) {
        const place *count = &c->counts[i];
        if (count->space == SPACES) continue;
        if (count->size < sizeof(int32_t) || count->offset % sizeof(int32_t))
            return dvx_fail(error, "damaged plan: a count of call %u is no int32 list", index);
        if (check_place(p, count, "a count of call", index, error)) return -1;
    }
    return 0;
}

static int read_variant(plan *p, uint32_t index, const uint8_t **at, char *error) {
    variant *v = &p->variant[index];
    uint32_t kernel = read_u32(at);
    v->first_argument = read_u32(at);
    uint32_t arguments = read_u32(at);
    v->only = read_u32(at);
    memcpy(v->cost, *at, sizeof v->cost);
    *at += sizeof v->cost;
    if (kernel >= dvx_kernel_count)
        return dvx_fail(error, "damaged plan: variant %u names kernel %u of %u", index, kernel, dvx_kernel_count);
    v->kernel = &dvx_kernels[kernel];
    if (arguments != v->kernel->buffers)
        return dvx_fail(error, "damaged plan: variant %u gives %u buffers to %s, which takes %u", index, arguments,
                        v->kernel->name, v->kernel->buffers);
    if (arguments > p->arguments || v->first_argument > p->arguments - arguments)
        return dvx_fail(error, "damaged plan: variant %u names arguments that do not exist", index);
    v->costed = 0;
    for (int i = 0; i < COST_TERMS; i++) {
        if (!isfinite(v->cost[i])) return dvx_fail(error, "damaged plan: variant %u has no finite cost", index);
        v->costed |= v->cost[i] != 0;
    }
    return 0;
}

static int read_argument(plan *p, uint32_t index, const uint8_t **at, char *error) {
    p->argument[index] = read_place(at);
    return check_place(p, &p->argument[index], "argument", index, error);
}

static int read_derivation(plan *p, uint32_t index, const uint8_t **at, char *error) {
    derivation *d = &p->derivation[index];
    d->source = read_place(at);
    d->matrix = read_place(at);
    d->target = read_place(at);
    d->points = read_u32(at);
    d->edge = read_u32(at);
    d->outputs = read_u32(at);
    d->inputs = read_u32(at);
    d->source_row = read_u64(at);
    d->target_row = read_u64(at);
    const place *places[] = {&d->source, &d->matrix, &d->target};
    for (int i = 0; i < 3; i++)
        if (check_place(p, places[i], "a place of derivation", index, error)) return -1;
    return dvx_derivation_check(d, index, error);
}

/* --- the file ----------------------------------------------------------------------------------------------- */

static uint64_t tables_bytes(const plan *p) { /* counts are 32 bits: no overflow */
    return ((uint64_t)p->inputs + p->outputs) * PORT_BYTES + (uint64_t)p->calls * CALL_BYTES +
           (uint64_t)p->variants * VARIANT_BYTES + (uint64_t)p->arguments * PLACE_BYTES +
           (uint64_t)p->derivations * DERIVATION_BYTES;
}

static int read_header(plan *p, const uint8_t *data, size_t size, char *error) {
    if (size < sizeof MAGIC || memcmp(data, MAGIC, sizeof MAGIC)) return dvx_fail(error, "this is no plan");
    if (size < HEADER_BYTES) return dvx_fail(error, "the plan is truncated: not even its header is whole");
    const uint8_t *at = data + sizeof MAGIC;
    uint32_t version = read_u32(&at), header = read_u32(&at);
    if (version != VERSION)
        return dvx_fail(error, "the plan has format version %u, this library reads version %d", version, VERSION);
    uint64_t total = read_u64(&at);
    if (header != HEADER_BYTES) return dvx_fail(error, "damaged plan: its header has a wrong size");
    if (total > size)
        return dvx_fail(error, "the plan is truncated: %llu of %llu bytes", (unsigned long long)size,
                        (unsigned long long)total);
    if (total != size) return dvx_fail(error, "damaged plan: the file is longer than the plan");
    uint32_t crc = read_u32(&at);
    p->weights_crc = read_u32(&at);
    p->weights = read_u64(&at);
    p->derived = read_u64(&at);
    p->arena = read_u64(&at);
    p->state = read_u64(&at);
    p->flip = read_u64(&at);
    const uint8_t *library = at;
    at += sizeof dvx_library_sha256;
    p->inputs = read_u32(&at);
    p->outputs = read_u32(&at);
    p->calls = read_u32(&at);
    p->variants = read_u32(&at);
    p->arguments = read_u32(&at);
    p->derivations = read_u32(&at);
    p->string_bytes = read_u32(&at);
    p->threads = read_u32(&at);
    if (dvx_crc32(data + HEADER_BYTES, size - HEADER_BYTES) != crc)
        return dvx_fail(error, "damaged plan: its checksum is wrong");
    if (memcmp(library, dvx_library_sha256, sizeof dvx_library_sha256))
        return dvx_fail(error, "the plan is for another library (%02x%02x%02x%02x..., this is %02x%02x%02x%02x...)",
                        library[0], library[1], library[2], library[3], dvx_library_sha256[0], dvx_library_sha256[1],
                        dvx_library_sha256[2], dvx_library_sha256[3]);
    if (p->threads == 0 || p->threads > DVX_MAX_THREADS)
        return dvx_fail(error, "damaged plan: it is laid out for %u threads, which are 1 to %d", p->threads,
                        DVX_MAX_THREADS);
    if (tables_bytes(p) + p->string_bytes != size - HEADER_BYTES)
        return dvx_fail(error, "damaged plan: its tables do not fill the file");
    if (p->string_bytes == 0 || data[size - 1] != 0) return dvx_fail(error, "damaged plan: its strings do not end");
    return 0;
}

/* The tables are no larger than a few times the file, which is in memory already. */
static int take_tables(plan *p, const uint8_t *strings, char *error) {
    p->ports = calloc((size_t)p->inputs + p->outputs + 1, sizeof *p->ports);
    p->call = calloc((size_t)p->calls + 1, sizeof *p->call);
    p->variant = calloc((size_t)p->variants + 1, sizeof *p->variant);
    p->argument = calloc((size_t)p->arguments + 1, sizeof *p->argument);
    p->derivation = calloc((size_t)p->derivations + 1, sizeof *p->derivation);
    p->strings = malloc(p->string_bytes);
    if (!p->ports || !p->call || !p->variant || !p->argument || !p->derivation || !p->strings)
        return dvx_fail(error, "out of memory for the plan's tables");
    memcpy(p->strings, strings, p->string_bytes);
    return 0;
}

static int read_tables(plan *p, const uint8_t *at, char *error) {
    if (take_tables(p, at + tables_bytes(p), error)) return -1;
    for (uint32_t i = 0; i < p->inputs + p->outputs; i++)
        if (read_port(p, i, &at, error)) return -1;
    for (uint32_t i = 0; i < p->calls; i++)
        if (read_call(p, i, &at, error)) return -1;
    for (uint32_t i = 0; i < p->variants; i++)
        if (read_variant(p, i, &at, error)) return -1;
    for (uint32_t i = 0; i < p->calls; i++)
        if (p->variant[p->call[i].first_variant].only)
            return dvx_fail(error, "damaged plan: call %u has no variant for any number of vectors", i);
    for (uint32_t i = 0; i < p->arguments; i++)
        if (read_argument(p, i, &at, error)) return -1;
    for (uint32_t i = 0; i < p->derivations; i++)
        if (read_derivation(p, i, &at, error)) return -1;
    return 0;
}

int dvx_plan_read(plan *p, const uint8_t *data, size_t size, char *error) {
    memset(p, 0, sizeof *p);
    if (read_header(p, data, size, error)) return -1;
    if (read_tables(p, data + HEADER_BYTES, error)) {
        dvx_plan_free(p);
        return -1;
    }
    return 0;
}

void dvx_plan_free(plan *p) {
    free(p->ports);
    free(p->call);
    free(p->variant);
    free(p->argument);
    free(p->derivation);
    free(p->strings);
    memset(p, 0, sizeof *p);
}

/* --- CRC-32, as zlib's ---------------------------------------------------------------------------------------- */

/* Eight bytes a round: weights are tens of megabytes, and a byte a round would take longer than to read them. */
uint32_t dvx_crc32(const uint8_t *data, size_t size) {
    uint32_t table[8][256];
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        table[0][i] = value;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++) table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    uint32_t crc = ~0u;
    for (; size >= 8; size -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= crc;
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    for (; size; size--, data++) crc = crc >> 8 ^ table[0][(crc ^ *data) & 255];
    return ~crc;
}
