/* What the runtime asks the system for: files, memory, the time. And error texts. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define LINE 64

int dvx_fail(char *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, DVX_ERROR_SIZE, format, arguments);
    va_end(arguments);
    return -1;
}

uint64_t dvx_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int fail_system(char *error, const char *what, const char *path) {
    return dvx_fail(error, "can't read the %s %.150s: %.60s", what, path, strerror(errno));
}

/* Private and writable: a kernel that a wrong plan lets write there neither faults nor changes the file. */
static int map_file(bytes *b, int file, const char *path, const char *what, char *error) {
    off_t size = lseek(file, 0, SEEK_END);
    if (size < 0) return fail_system(error, what, path);
    if ((uint64_t)size > SIZE_MAX / 2) return dvx_fail(error, "the %s %.150s is too large", what, path);
    b->size = (size_t)size;
    if (b->size == 0) return 0; /* an empty mapping does not exist */
    void *map = mmap(NULL, b->size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) return fail_system(error, what, path);
    b->data = map;
    b->mapped = 1;
    return 0;
}

int dvx_bytes_open(bytes *b, dvx_blob blob, const char *what, char *error) {
    memset(b, 0, sizeof *b);
    if (!blob.path) {
        if (!blob.data && blob.size) return dvx_fail(error, "no %s was given", what);
        b->data = blob.data;
        b->size = blob.size;
        return 0;
    }
    int file = open(blob.path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return fail_system(error, what, blob.path);
    int result = map_file(b, file, blob.path, what, error);
    close(file);
    return result;
}

void dvx_bytes_close(bytes *b) {
    if (b->mapped) munmap((void *)(uintptr_t)b->data, b->size);
    memset(b, 0, sizeof *b);
}

/* The system grants more than it has and kills later: ask what there is. */
static uint64_t physical_memory(void) {
    struct sysinfo info;
    if (sysinfo(&info)) return UINT64_MAX;
    return (uint64_t)info.totalram * info.mem_unit;
}

int dvx_memory_take(memory *m, uint64_t size, char *error) {
    memset(m, 0, sizeof *m);
    unsigned long long mib = (unsigned long long)(size >> 20) + 1, has = physical_memory() >> 20;
    if (size >= SIZE_MAX / 2 || mib > has)
        return dvx_fail(error, "the plan needs %llu MiB of memory, this device has %llu", mib, has);
    m->size = (size_t)size;
    int is_large = m->size >= HUGE_PAGE;
    m->map_size = m->size + (is_large ? HUGE_PAGE : 0) + LINE;
    void *map = mmap(NULL, m->map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        memset(m, 0, sizeof *m);
        return dvx_fail(error, "%llu MiB of memory are not to be had: %.60s", mib, strerror(errno));
    }
    m->map = map;
    m->data = map;
    if (is_large) { /* huge pages spare the TLB, which large planes would exhaust; the part skipped is never touched */
        m->data += -(uintptr_t)map & (HUGE_PAGE - 1);
        madvise(m->data, m->size, MADV_HUGEPAGE);
    }
    return 0;
}

void dvx_memory_free(memory *m) {
    if (m->map) munmap(m->map, m->map_size);
    memset(m, 0, sizeof *m);
}
