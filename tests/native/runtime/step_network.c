/* A program as a user writes one against dvx.h, with the library that a bundle ships: steps through a file of frames.
 *
 *     step_network LIBRARY PLAN WEIGHTS FRAMES THREADS [cut|overwrite]
 *
 * Writes the logits of every frame to its output, float32, and the limit on threads to its errors. The last argument is
 * what happens to the files once the network is open. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dvx.h"

#define LOAD(name) __typeof__(&name) p_##name = (__typeof__(&name))(uintptr_t)dlsym(library, #name)

static void damage(const char *path, const char *how) {
    if (!strcmp(how, "cut")) {
        if (truncate(path, 0)) exit(4);
        return;
    }
    int file = open(path, O_WRONLY);
    off_t size = lseek(file, 0, SEEK_END);
    for (off_t at = 0; at < size; at++)
        if (pwrite(file, "\x3f", 1, at) != 1) exit(4);
    close(file);
}

int main(int count, char **values) {
    if (count < 6) return 2;
    void *library = dlopen(values[1], RTLD_NOW);
    if (!library) return 2;
    LOAD(dvx_open);
    LOAD(dvx_close);
    LOAD(dvx_reset);
    LOAD(dvx_step);
    LOAD(dvx_error);
    LOAD(dvx_input);
    LOAD(dvx_output);
    LOAD(dvx_output_count);
    LOAD(dvx_output_data);
    LOAD(dvx_get_info);
    char error[DVX_ERROR_SIZE];
    dvx_options options = {.threads = atoi(values[5])};
    dvx *net;
    if (p_dvx_open((dvx_blob){.path = values[2]}, (dvx_blob){.path = values[3]}, &options, &net, error)) {
        fprintf(stderr, "%s\n", error);
        return 1;
    }
    dvx_info info;
    p_dvx_get_info(net, &info);
    fprintf(stderr, "%d\n", info.max_threads);
    for (int i = 2; count > 6 && i <= 3; i++) damage(values[i], values[6]);
    int logits = 0;
    while (logits < p_dvx_output_count(net) && strcmp(p_dvx_output(net, logits)->name, "logits")) logits++;
    FILE *frames = fopen(values[4], "rb");
    dvx_blob input = {.size = p_dvx_input(net, 0)->bytes};
    void *frame = malloc(input.size);
    input.data = frame;
    p_dvx_reset(net);
    while (fread(frame, input.size, 1, frames) == 1) {
        if (p_dvx_step(net, &input, 1)) {
            fprintf(stderr, "%s\n", p_dvx_error(net));
            return 3;
        }
        fwrite(p_dvx_output_data(net, logits), p_dvx_output(net, logits)->bytes, 1, stdout);
    }
    p_dvx_close(net);
    free(frame);
    fclose(frames);
    return dlclose(library);
}
