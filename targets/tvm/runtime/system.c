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

/* Read and not mapped, whatever the size: a mapping of a file that somebody cuts short is a SIGBUS in the middle of a
 * step, and one of a file that somebody overwrites gives other numbers, a private mapping too. What is read here is
 * ours, and what is checked of it stays so. */
static int read_file(bytes *b, int file, const char *path, const char *what, char *error) {
    uint8_t first;
    if (read(file, &first, sizeof first) < 0) return fail_system(error, what, path); /* a folder has a size, too */
    off_t size = lseek(file, 0, SEEK_END);
    if (size < 0 || lseek(file, 0, SEEK_SET) < 0) return fail_system(error, what, path);
    if (dvx_memory_take(&b->own, (uint64_t)size, what, error)) return -1;
    for (size_t done = 0; done < b->own.size;) {
        ssize_t count = read(file, b->own.data + done, b->own.size - done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return fail_system(error, what, path);
        if (count == 0) return dvx_fail(error, "the %s %.150s was cut short while it was read", what, path);
        done += (size_t)count;
    }
    b->data = b->own.data;
    b->size = b->own.size;
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
    int result = read_file(b, file, blob.path, what, error);
    close(file);
    if (result) dvx_bytes_close(b);
    return result;
}

void dvx_bytes_close(bytes *b) {
    dvx_memory_free(&b->own);
    memset(b, 0, sizeof *b);
}

/* The system grants more than it has and kills later: ask what there is. */
static uint64_t physical_memory(void) {
    struct sysinfo info;
    if (sysinfo(&info)) return UINT64_MAX;
    return (uint64_t)info.totalram * info.mem_unit;
}

int dvx_memory_take(memory *m, uint64_t size, const char *what, char *error) {
    memset(m, 0, sizeof *m);
    unsigned long long mib = (unsigned long long)(size >> 20) + 1, has = physical_memory() >> 20;
    if (size >= SIZE_MAX / 2 || mib > has)
        return dvx_fail(error, "%llu MiB of memory for the %s are more than this device has (%llu)", mib, what, has);
    m->size = (size_t)size;
    int is_large = m->size >= HUGE_PAGE;
    m->map_size = m->size + (is_large ? HUGE_PAGE : 0) + LINE;
    void *map = mmap(NULL, m->map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        memset(m, 0, sizeof *m);
        return dvx_fail(error, "%llu MiB of memory for the %s are not to be had: %.60s", mib, what, strerror(errno));
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
