/* Whether this processor has the instructions that the kernels were compiled to. Only features that change the
 * code of number kernels are known here; link.py asks for no others. */
#include <string.h>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>

enum { LEAF_1_C, LEAF_7_B, LEAF_7_C, LEAF_7_D, LEAF_7_1_A, LEAF_EXTENDED_C, WORDS };
enum { XMM = 0, YMM = 0x6, ZMM = 0xE6 }; /* registers that the system must save: bits of XCR0 */

static const struct {
    const char *name;
    uint8_t word, bit, registers;
} KNOWN[] = {
    {"sse3", LEAF_1_C, 0, XMM},          {"ssse3", LEAF_1_C, 9, XMM},
    {"fma", LEAF_1_C, 12, YMM},          {"cx16", LEAF_1_C, 13, XMM},
    {"sse4.1", LEAF_1_C, 19, XMM},       {"sse4.2", LEAF_1_C, 20, XMM},
    {"movbe", LEAF_1_C, 22, XMM},        {"popcnt", LEAF_1_C, 23, XMM},
    {"avx", LEAF_1_C, 28, YMM},          {"f16c", LEAF_1_C, 29, YMM},
    {"bmi", LEAF_7_B, 3, XMM},           {"avx2", LEAF_7_B, 5, YMM},
    {"bmi2", LEAF_7_B, 8, XMM},          {"avx512f", LEAF_7_B, 16, ZMM},
    {"avx512dq", LEAF_7_B, 17, ZMM},     {"avx512ifma", LEAF_7_B, 21, ZMM},
    {"avx512cd", LEAF_7_B, 28, ZMM},     {"avx512bw", LEAF_7_B, 30, ZMM},
    {"avx512vl", LEAF_7_B, 31, ZMM},     {"avx512vbmi", LEAF_7_C, 1, ZMM},
    {"avx512vbmi2", LEAF_7_C, 6, ZMM},   {"gfni", LEAF_7_C, 8, XMM},
    {"avx512vnni", LEAF_7_C, 11, ZMM},   {"avx512bitalg", LEAF_7_C, 12, ZMM},
    {"avx512vpopcntdq", LEAF_7_C, 14, ZMM}, {"avx512fp16", LEAF_7_D, 23, ZMM},
    {"avxvnni", LEAF_7_1_A, 4, YMM},     {"avx512bf16", LEAF_7_1_A, 5, ZMM},
    {"lzcnt", LEAF_EXTENDED_C, 5, XMM},
};

typedef struct {
    uint32_t words[WORDS];
    uint32_t registers;
} abilities;

static void look(abilities *has) {
    uint32_t a, b, c, d;
    memset(has, 0, sizeof *has);
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        has->words[LEAF_1_C] = c;
        if (c >> 27 & 1) { /* OSXSAVE: XCR0 may be read */
            uint32_t low, high;
            __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            has->registers = low;
        }
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        uint32_t subleaves = a;
        has->words[LEAF_7_B] = b;
        has->words[LEAF_7_C] = c;
        has->words[LEAF_7_D] = d;
        if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has->words[LEAF_7_1_A] = a;
    }
    if (__get_cpuid(0x80000001u, &a, &b, &c, &d)) has->words[LEAF_EXTENDED_C] = c;
}

static int has_feature(const abilities *has, const char *name) {
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (!strcmp(KNOWN[i].name, name))
            return (has->words[KNOWN[i].word] >> KNOWN[i].bit & 1) &&
                   (has->registers & KNOWN[i].registers) == KNOWN[i].registers;
    return 0;
}

#elif defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>

#define FIRST 16  /* AT_HWCAP */
#define SECOND 26 /* AT_HWCAP2 */

static const struct {
    const char *name;
    uint8_t word, bit;
} KNOWN[] = {
#if defined(__aarch64__)
    {"neon", FIRST, 1},     {"lse", FIRST, 8},      {"fullfp16", FIRST, 10}, {"rdm", FIRST, 12},
    {"complxnum", FIRST, 14}, {"dotprod", FIRST, 20}, {"sve", FIRST, 22},      {"fp16fml", FIRST, 23},
    {"sve2", SECOND, 1},    {"i8mm", SECOND, 13},   {"bf16", SECOND, 14},
#else
    {"neon", FIRST, 12},      {"vfp3", FIRST, 13},  {"vfp4", FIRST, 16},
    {"hwdiv-arm", FIRST, 17}, {"hwdiv", FIRST, 18}, {"d32", FIRST, 19},
#endif
};

typedef struct {
    unsigned long first, second;
} abilities;

static void look(abilities *has) {
    has->first = getauxval(FIRST);
    has->second = getauxval(SECOND);
}

static int has_feature(const abilities *has, const char *name) {
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (!strcmp(KNOWN[i].name, name))
            return (KNOWN[i].word == FIRST ? has->first : has->second) >> KNOWN[i].bit & 1;
    return 0;
}

#else
#error "dvx runs on x86-64, AArch64 and ARMv7"
#endif

const char *dvx_cpu_lacks(const char *const *features) {
    abilities has;
    look(&has);
    for (; *features; features++)
        if (!has_feature(&has, *features)) return *features;
    return NULL;
}
