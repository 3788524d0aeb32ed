/* Several networks at once in several threads, each with a pool of its own: for the thread sanitizer.
 *
 *     race_threads PLAN WEIGHTS STEPS */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "dvx.h"

#define STREAMS 3

static char **arguments;

static void *stream(void *unused) {
    (void)unused;
    char error[DVX_ERROR_SIZE];
    dvx_options options = {.threads = 3};
    dvx *net;
    if (dvx_open((dvx_blob){.path = arguments[1]}, (dvx_blob){.path = arguments[2]}, &options, &net, error)) {
        fprintf(stderr, "%s\n", error);
        exit(2);
    }
    const dvx_port *port = dvx_input(net, 0);
    dvx_blob input = {.data = calloc(port->bytes, 1), .size = port->bytes};
    dvx_reset(net);
    for (int i = 0; i < atoi(arguments[3]); i++) {
        if (dvx_step(net, &input, 1)) exit(3);
        if (i % 100 == 0) usleep(500); /* let the pool fall asleep */
    }
    dvx_close(net);
    free((void *)(uintptr_t)input.data);
    return NULL;
}

int main(int count, char **values) {
    pthread_t threads[STREAMS];
    arguments = values;
    if (count != 4) return 2;
    for (int i = 0; i < STREAMS; i++) pthread_create(&threads[i], NULL, stream, NULL);
    for (int i = 0; i < STREAMS; i++) pthread_join(threads[i], NULL);
    return 0;
}
