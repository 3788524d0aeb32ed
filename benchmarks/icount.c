/* A QEMU plugin that counts the instructions a program executes:
 *
 *     qemu-aarch64 -plugin libicount.so,out=FILE PROGRAM
 *
 * writes the number to FILE at the end. Debian ships no header of the interface; what is used of it (version 1,
 * QEMU 4.2 to 8) is declared here. The count is added to once a block of code, so it is one number for all threads
 * and only exact for programs of one.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define VISIBLE __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
enum operation { ADD_U64 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*translated)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, enum operation what, void *to, uint64_t by);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*finished)(plugin_id, void *), void *data);

VISIBLE int qemu_plugin_version = 1;

static uint64_t executed;
static char file[4096];

static void translated(plugin_id id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void finished(plugin_id id, void *data) {
    (void)id, (void)data;
    FILE *out = fopen(file, "w");
    if (!out) return;
    fprintf(out, "%" PRIu64 "\n", executed);
    fclose(out);
}

VISIBLE int qemu_plugin_install(plugin_id id, const void *info, int count, char **values) {
    (void)info;
    if (count != 1 || strncmp(values[0], "out=", 4) || strlen(values[0] + 4) >= sizeof file) return 1;
    strcpy(file, values[0] + 4);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
