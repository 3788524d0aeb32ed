/* A program that measures a network on a device and prints one JSON object. Linked statically: it needs nothing. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

static const char USAGE[] =
    "runner PLAN WEIGHTS [options]\n"
    "  --frames FILE   inputs of all steps, one after another: for each step the bytes of every input, in order\n"
    "                  (without it: pseudo-random floats in -1 ... 1)\n"
    "  --steps N       steps to measure; the frames are repeated as needed (default: one a frame)\n"
    "  --warmup N      steps before those, forgotten by a reset (default: 0)\n"
    "  --threads N     threads that share a step, as many as the plan is laid out for at most (default: 1)\n"
    "  --cores A,B,..  cores to run on, one a thread, the first for this one\n"
    "  --profile       time every kernel call\n"
    "  --dump FILE     write the outputs of all measured steps, laid out as the frames are\n"
    "Prints one JSON object. Exit code 2: wrong use, or input that can't be used.\n";

#define MOST_VALUES 10000 /* the most values of an output that are printed */
#define MOST_STEPS 100000000

typedef struct {
    const char *plan, *weights, *frames, *dump;
    int steps, warmup, threads, profile;
    int cores[MOST_CORES], core_count;
} arguments;

typedef struct {
    uint64_t ns;
    int runs;
    int *kernels; /* how often each of the library's was chosen */
} call_sum;

typedef struct {
    dvx *net;
    const char *path; /* the file of frames */
    int file;         /* -1: none, every frame is `made` */
    const uint8_t *made;
    size_t frame_bytes;
    int frame_count;
    dvx_blob *inputs;
    uint64_t *step_ns;
    call_sum *calls;
    uint64_t (*values)[3]; /* by output: how many 0, 1 and 2 */
    FILE *dump;
} session;

/* --- use ----------------------------------------------------------------------------------------------------- */

static void stop(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void stop(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "runner: ");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(2);
}

static void *take(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) stop("%s", "out of memory");
    return memory;
}

/* The number that a text begins with, digits and nothing else, so much of it that it is at most `most`; *end is what
 * follows: the rest of a larger number too, and `text` itself if it begins with no digit. */
static int digits(const char *text, int most, const char **end) {
    int value = 0;
    for (; *text >= '0' && *text <= '9' && value <= (most - (*text - '0')) / 10; text++)
        value = 10 * value + (*text - '0');
    *end = text;
    return value;
}

static int number(const char *text, int least, int most, const char *option) {
    const char *end;
    int value = digits(text, most, &end);
    if (end == text || *end || value < least)
        stop("%s needs a whole number from %d to %d, not %.40s", option, least, most, text);
    return value;
}

static void read_cores(arguments *a, const char *text) {
    const char *at = text, *end;
    for (;; at = end + 1) {
        int core = digits(at, MOST_CORES - 1, &end);
        if (end == at || (*end && *end != ',') || a->core_count == MOST_CORES)
            stop("--cores needs numbers from 0 to %d, such as 0,1, not %.40s", MOST_CORES - 1, text);
        a->cores[a->core_count++] = core;
        if (!*end) return;
    }
}

static void read_option(arguments *a, const char *option, const char *value) {
    if (!strcmp(option, "--frames"))
        a->frames = value;
    else if (!strcmp(option, "--dump"))
        a->dump = value;
    else if (!strcmp(option, "--steps"))
        a->steps = number(value, 1, MOST_STEPS, option);
    else if (!strcmp(option, "--warmup"))
        a->warmup = number(value, 0, MOST_STEPS, option);
    else if (!strcmp(option, "--threads"))
        a->threads = number(value, 1, INT_MAX, option); /* the plan says how many it takes */
    else if (!strcmp(option, "--cores"))
        read_cores(a, value);
    else
        stop("unknown option %s (--help lists them)", option);
}

static arguments read_arguments(int count, char **values) {
    arguments a = {.threads = 1};
    for (int i = 1; i < count; i++) {
        const char *text = values[i];
        if (!strcmp(text, "--help")) {
            fputs(USAGE, stdout);
            exit(0);
        } else if (!strcmp(text, "--profile")) {
            a.profile = 1;
        } else if (!strncmp(text, "--", 2)) {
            if (i + 1 == count) stop("%s needs a value (--help)", text);
            read_option(&a, text, values[++i]);
        } else if (!a.plan) {
            a.plan = text;
        } else if (!a.weights) {
            a.weights = text;
        } else {
            stop("what is %s? (--help)", text);
        }
    }
    if (!a.weights) {
        fputs(USAGE, stderr);
        exit(2);
    }
    return a;
}

/* --- frames ---------------------------------------------------------------------------------------------------- */

static void check_floats_only(dvx *net) {
    for (int i = 0; i < dvx_input_count(net); i++)
        if (dvx_input(net, i)->type != DVX_FLOAT32) stop("input %s is not float32: give --frames", dvx_input(net, i)->name);
}

static const uint8_t *random_frame(size_t size) {
    float *values = take(size / sizeof(float), sizeof(float));
    uint32_t seed = 1;
    for (size_t i = 0; i < size / sizeof(float); i++) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = (float)(int32_t)seed / 2147483648.0f;
    }
    return (const uint8_t *)values;
}

static void open_frames(session *s, const arguments *a) {
    for (int i = 0; i < dvx_input_count(s->net); i++) s->frame_bytes += dvx_input(s->net, i)->bytes;
    s->inputs = take((size_t)dvx_input_count(s->net), sizeof *s->inputs);
    if (!a->frames) {
        check_floats_only(s->net);
        s->made = random_frame(s->frame_bytes);
        s->frame_count = 1;
        return;
    }
    s->path = a->frames;
    s->file = open(a->frames, O_RDONLY | O_CLOEXEC);
    off_t size = s->file < 0 ? -1 : lseek(s->file, 0, SEEK_END);
    if (size < 0) stop("can't read the frames %s: %s", a->frames, strerror(errno));
    uint64_t count = s->frame_bytes ? (uint64_t)size / s->frame_bytes : 0;
    if (!count || (uint64_t)size % s->frame_bytes) stop("%s is not a whole number of frames", a->frames);
    if (count > MOST_STEPS) stop("%s has more than %d frames", a->frames, MOST_STEPS);
    s->frame_count = (int)count;
}

/* Frames are read one by one: there may be more of them than memory, and a file that is cut short meanwhile is an error
 * where one that is mapped would be a SIGBUS. */
static void read_frame(const session *s, off_t at, uint8_t *to, size_t size) {
    while (size) {
        ssize_t count = pread(s->file, to, size, at);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) stop("can't read the frames %s: %s", s->path, strerror(errno));
        if (count == 0) stop("the frames %s were cut short while they were read", s->path);
        at += count;
        to += count;
        size -= (size_t)count;
    }
}

/* Inputs of odd sizes leave the next one unaligned: every input of a frame goes to where it may start. */
static void set_inputs(session *s, int step) {
    size_t at = 0;
    off_t frame = (off_t)(step % s->frame_count) * (off_t)s->frame_bytes;
    for (int i = 0; i < dvx_input_count(s->net); i++) {
        size_t size = dvx_input(s->net, i)->bytes;
        if (!s->inputs[i].data) s->inputs[i] = (dvx_blob){.data = take(size, 1), .size = size};
        uint8_t *to = (uint8_t *)(uintptr_t)s->inputs[i].data;
        if (s->made)
            memcpy(to, s->made + at, size);
        else
            read_frame(s, frame + (off_t)at, to, size);
        at += size;
    }
}

static void step(session *s, int index) {
    set_inputs(s, index);
    if (dvx_step(s->net, s->inputs, dvx_input_count(s->net))) stop("%s", dvx_error(s->net));
}

/* --- statistics -------------------------------------------------------------------------------------------------- */

static int ends_with(const char *text, const char *end) {
    size_t length = strlen(text), tail = strlen(end);
    return length >= tail && !strcmp(text + length - tail, end);
}

static int is_probe(const dvx_port *port) {
    if (strncmp(port->name, "probe.", 6)) return 0;
    return (ends_with(port->name, ".action") && port->type == DVX_INT64) ||
           (ends_with(port->name, ".tiles") && port->type == DVX_BOOL);
}

static void count_values(session *s, int output) {
    const dvx_port *port = dvx_output(s->net, output);
    const void *data = dvx_output_data(s->net, output);
    size_t count = port->type == DVX_INT64 ? port->bytes / sizeof(int64_t) : port->bytes;
    for (size_t i = 0; i < count; i++) {
        int64_t value = port->type == DVX_INT64 ? ((const int64_t *)data)[i] : ((const uint8_t *)data)[i];
        if (value >= 0 && value <= 2) s->values[output][value]++;
    }
}

static void sum_call(session *s, int index) {
    dvx_call_info call;
    dvx_call(s->net, index, &call);
    s->calls[index].ns += call.ns;
    if (!call.kernel) return;
    s->calls[index].runs++;
    for (uint32_t k = 0; k < dvx_kernel_count; k++)
        if (dvx_kernels[k].name == call.kernel) s->calls[index].kernels[k]++;
}

static void note_step(session *s, const arguments *a, int index) {
    dvx_info info;
    dvx_get_info(s->net, &info);
    s->step_ns[index] = info.last_step_ns;
    for (int i = 0; i < dvx_output_count(s->net); i++) {
        const dvx_port *port = dvx_output(s->net, i);
        if (is_probe(port)) count_values(s, i);
        if (s->dump && fwrite(dvx_output_data(s->net, i), 1, port->bytes, s->dump) != port->bytes)
            stop("can't write %s", a->dump);
    }
    for (int i = 0; a->profile && i < dvx_call_count(s->net); i++) sum_call(s, i);
}

/* --- JSON ---------------------------------------------------------------------------------------------------------- */

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < ' ')
            printf("\\u%04x", c);
        else if (c == '"' || c == '\\')
            printf("\\%c", c);
        else
            putchar(c);
    }
    putchar('"');
}

static int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const session *s, int steps) {
    uint64_t *sorted = take((size_t)steps, sizeof *sorted), sum = 0;
    memcpy(sorted, s->step_ns, (size_t)steps * sizeof *sorted);
    qsort(sorted, (size_t)steps, sizeof *sorted, ascending);
    for (int i = 0; i < steps; i++) sum += sorted[i];
    printf("\"step_ns\": {\"mean\": %llu, \"min\": %llu, \"median\": %llu, \"p90\": %llu, \"p99\": %llu, \"max\": %llu},\n",
           (unsigned long long)(sum / (uint64_t)steps), (unsigned long long)sorted[0],
           (unsigned long long)sorted[steps / 2], (unsigned long long)sorted[(int)(steps * 0.9)],
           (unsigned long long)sorted[(int)(steps * 0.99)], (unsigned long long)sorted[steps - 1]);
    printf("\"steps_ns\": [");
    for (int i = 0; i < steps; i++) printf("%s%llu", i ? ", " : "", (unsigned long long)s->step_ns[i]);
    printf("],\n");
    free(sorted);
}

static void print_call(const session *s, int index, int steps) {
    const call_sum *sum = &s->calls[index];
    dvx_call_info call;
    dvx_call(s->net, index, &call);
    printf("%s\n  {\"label\": ", index ? "," : "");
    print_text(call.label);
    printf(", \"gate\": ");
    print_text(call.gate);
    printf(", \"mean_ns\": %.1f, \"runs\": %d, \"kernels\": {", (double)sum->ns / steps, sum->runs);
    const char *comma = "";
    for (uint32_t k = 0; k < dvx_kernel_count; k++) {
        if (!sum->kernels[k]) continue;
        printf("%s", comma);
        print_text(dvx_kernels[k].name);
        printf(": %d", sum->kernels[k]);
        comma = ", ";
    }
    printf("}}");
}

static void print_gates(const session *s) {
    const char *comma = "";
    printf("\"gates\": {");
    for (int i = 0; i < dvx_output_count(s->net); i++) {
        const dvx_port *port = dvx_output(s->net, i);
        const uint64_t *n = s->values[i];
        double all = (double)(n[0] + n[1] + n[2]);
        if (!is_probe(port) || all == 0) continue;
        printf("%s", comma);
        print_text(port->name);
        if (port->type == DVX_INT64)
            printf(": {\"skip\": %.6f, \"reuse\": %.6f, \"compute\": %.6f}", (double)n[0] / all, (double)n[1] / all,
                   (double)n[2] / all);
        else
            printf(": {\"active\": %.6f}", (double)n[1] / all);
        comma = ", ";
    }
    printf("},\n");
}

static void print_value(const dvx_port *port, const void *data, size_t i) {
    if (port->type == DVX_INT64)
        printf("%lld", (long long)((const int64_t *)data)[i]);
    else if (port->type == DVX_INT32)
        printf("%d", (int)((const int32_t *)data)[i]);
    else if (port->type == DVX_BOOL)
        printf("%d", ((const uint8_t *)data)[i]);
    else if (isfinite(((const float *)data)[i]))
        printf("%.9g", (double)((const float *)data)[i]);
    else
        printf("null"); /* JSON has no such numbers */
}

static void print_outputs(const session *s) {
    static const size_t sizes[] = {4, 8, 4, 1};
    const char *comma = "";
    printf("\"outputs\": {");
    for (int i = 0; i < dvx_output_count(s->net); i++) {
        const dvx_port *port = dvx_output(s->net, i);
        size_t count = port->bytes / sizes[port->type];
        if (is_probe(port) || count > MOST_VALUES) continue;
        printf("%s", comma);
        print_text(port->name);
        printf(": [");
        for (size_t k = 0; k < count; k++) {
            printf("%s", k ? ", " : "");
            print_value(port, dvx_output_data(s->net, i), k);
        }
        printf("]");
        comma = ", ";
    }
    printf("}");
}

static void print_all(const session *s, const arguments *a, int steps) {
    dvx_info info;
    dvx_get_info(s->net, &info);
    printf("{\"steps\": %d, \"threads\": %d, \"max_threads\": %d, \"pinned\": %d, \"memory\": %llu, \"weights\": %llu, \"derived\": %llu,\n",
           steps, info.threads, info.max_threads, info.pinned, (unsigned long long)info.memory,
           (unsigned long long)info.weights, (unsigned long long)info.derived);
    print_times(s, steps);
    print_gates(s);
    if (a->profile) {
        printf("\"calls\": [");
        for (int i = 0; i < dvx_call_count(s->net); i++) print_call(s, i, steps);
        printf("],\n");
    }
    print_outputs(s);
    printf("}\n");
}

/* --- the whole ----------------------------------------------------------------------------------------------------- */

static void pin_this_thread(int core) {
    unsigned long set[MOST_CORES / (8 * sizeof(unsigned long))] = {0};
    size_t bits = 8 * sizeof *set;
    set[(size_t)core / bits] = 1ul << ((size_t)core % bits);
    if (syscall(SYS_sched_setaffinity, 0, sizeof set, set)) fprintf(stderr, "runner: core %d is not to be had\n", core);
}

static void open_session(session *s, const arguments *a) {
    char error[DVX_ERROR_SIZE];
    dvx_options options = {
        .threads = a->threads,
        .cores = a->core_count ? a->cores : NULL,
        .core_count = a->core_count,
        .profile = a->profile,
    };
    if (dvx_open((dvx_blob){.path = a->plan}, (dvx_blob){.path = a->weights}, &options, &s->net, error)) stop("%s", error);
    if (a->core_count) pin_this_thread(a->cores[0]); /* after the workers started, which would inherit it */
    open_frames(s, a);
    s->values = take((size_t)dvx_output_count(s->net), sizeof *s->values);
    s->calls = take((size_t)dvx_call_count(s->net), sizeof *s->calls);
    for (int i = 0; i < dvx_call_count(s->net); i++) s->calls[i].kernels = take(dvx_kernel_count, sizeof(int));
    if (a->dump && !(s->dump = fopen(a->dump, "wb"))) stop("can't write %s", a->dump);
}

int main(int count, char **values) {
    arguments a = read_arguments(count, values);
    session s = {.file = -1};
    open_session(&s, &a);
    int steps = a.steps ? a.steps : s.frame_count;
    s.step_ns = take((size_t)steps, sizeof *s.step_ns);
    dvx_reset(s.net);
    for (int i = 0; i < a.warmup; i++) step(&s, i);
    dvx_reset(s.net);
    for (int i = 0; i < steps; i++) {
        step(&s, i);
        note_step(&s, &a, i);
    }
    print_all(&s, &a, steps);
    if (s.dump && fclose(s.dump)) stop("can't write %s", a.dump);
    dvx_close(s.net);
    return 0;
}
