/* dvx: run a gated video network that dvexport compiled, one frame a step.
 *
 *     dvx *net;
 *     char error[DVX_ERROR_SIZE];
 *     if (dvx_open((dvx_blob){.path = "model.plan"}, (dvx_blob){.path = "model.weights"}, NULL, &net, error)) {
 *         fprintf(stderr, "%s\n", error);
 *         return 1;
 *     }
 *     dvx_reset(net);
 *     while (read_frame(frame)) {
 *         dvx_blob input = {.data = frame, .size = sizeof frame};
 *         if (dvx_step(net, &input, 1)) { fprintf(stderr, "%s\n", dvx_error(net)); break; }
 *         const float *logits = dvx_output_data(net, 0);
 *     }
 *     dvx_close(net);
 *
 * Functions that can fail return 0, or -1 and a text. There are no globals: any number of networks may be open,
 * and stepped at the same time in different threads. One network belongs to one thread at a time. All memory
 * is taken by dvx_open; a step allocates nothing. The library changes no signal handler, prints nothing and
 * never exits. Numbers are little-endian, as are all processors it is built for.
 */
#ifndef DVX_H
#define DVX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DVX_API __attribute__((visibility("default")))
#define DVX_ERROR_SIZE 256
#define DVX_MAX_RANK 6
#define DVX_MAX_THREADS 32 /* the most of any plan; each plan has a limit of its own up to this */

/* An open network. */
typedef struct dvx dvx;

/* Bytes: those of a file if `path` is set, else `size` bytes at `data`. */
typedef struct {
    const char *path;
    const void *data;
    size_t size;
} dvx_blob;

/* Zeros are the defaults. */
typedef struct {
    int threads;      /* that share a step, the calling one included; 0: 1. At most as many as the plan's memory is laid
                         out for (dvx_info.max_threads), which need not be as many as there are cores */
    const int *cores; /* thread i of the pool runs on cores[i], where the system lets it; the calling thread (0)
                         is never moved: pin it to cores[0] yourself. NULL: anywhere */
    int core_count;   /* entries of `cores`: at least `threads`, at most 1024 */
    int profile;      /* not 0: time every call, for dvx_call; about 50 ns a call */
} dvx_options;

typedef enum { DVX_FLOAT32, DVX_INT64, DVX_INT32, DVX_BOOL } dvx_type; /* a bool is a byte of 0 or 1 */

/* An input or output; `bytes` contiguous bytes, last size fastest, as in ONNX. */
typedef struct {
    const char *name;
    dvx_type type;
    int rank;
    int64_t sizes[DVX_MAX_RANK];
    size_t bytes;
} dvx_port;

typedef struct {
    int threads;           /* that share a step */
    int pinned;            /* threads of the pool that run on the core asked for, the calling one left out */
    uint64_t memory;       /* bytes of working memory and states */
    uint64_t weights;      /* bytes of weights */
    int weights_copied;    /* 1: the weights given did not start on 64 bytes, and were copied */
    uint64_t steps;        /* since the last reset */
    uint64_t last_step_ns; /* duration of the last step */
    int max_threads;       /* that dvx_open takes for this plan; told whatever `threads` is */
    uint64_t derived;      /* bytes of weights that dvx_open made of those */
} dvx_info;

/* One kernel call of the last step. */
typedef struct {
    const char *label;  /* the layer it is from */
    const char *gate;   /* the gate it belongs to, or "" */
    const char *kernel; /* the one chosen; NULL: skipped, since there was nothing to compute */
    int threads;        /* that it was shared by */
    int32_t counts[3];  /* output channels, input channels, pixel vectors that it computed; -1: not gated */
    uint64_t ns;        /* duration; 0 unless opened with `profile` */
} dvx_call_info;

/* Open a network: check the plan and the weights, take the memory, start the threads.
 *
 * Files are read, not mapped, and checked as they were read: whatever happens to them afterwards changes nothing.
 * `plan` in memory may be freed afterwards. `weights` in memory must stay as they are until dvx_close. Weights that
 * start on 64 bytes are used in place, so several networks can share them. Processes that map one file can share them
 * too, if nobody truncates or writes the file meanwhile. On failure *net is NULL and `error` (DVX_ERROR_SIZE bytes)
 * says why: a file that can't be read, is truncated, damaged or made for another build of this library;
 * more threads than the plan is laid out for; a processor that lacks an instruction set; no memory. */
DVX_API int dvx_open(dvx_blob plan, dvx_blob weights, const dvx_options *options, dvx **net, char *error);

/* Stop the threads and free everything; NULL is allowed. */
DVX_API void dvx_close(dvx *net);

/* Forget all frames before: the next step is the first of a stream. Needed before the first step. */
DVX_API int dvx_reset(dvx *net);

/* Run one frame. inputs[i] holds the data of input i, exactly its bytes.
 * Fails, and leaves the states as they were: before dvx_reset; on a wrong number of inputs or bytes; on NaN or
 * infinite floats and on a bool that is neither 0 nor 1. */
DVX_API int dvx_step(dvx *net, const dvx_blob *inputs, int count);

/* Data of an output, valid until the next step or reset; NULL before the first step or for an unknown index. */
DVX_API const void *dvx_output_data(const dvx *net, int index);

/* Inputs and outputs in order; NULL for an unknown index. */
DVX_API int dvx_input_count(const dvx *net);
DVX_API int dvx_output_count(const dvx *net);
DVX_API const dvx_port *dvx_input(const dvx *net, int index);
DVX_API const dvx_port *dvx_output(const dvx *net, int index);

/* The index of the input or output of this name; -1 where there is none. The video is input 0; outputs of the model
 * come before those that show decisions. */
DVX_API int dvx_input_index(const dvx *net, const char *name);
DVX_API int dvx_output_index(const dvx *net, const char *name);

/* Why the last failing function failed. */
DVX_API const char *dvx_error(const dvx *net);

DVX_API void dvx_get_info(const dvx *net, dvx_info *info);

/* The calls of a step, in order; dvx_call fails for an unknown index and before the first step. */
DVX_API int dvx_call_count(const dvx *net);
DVX_API int dvx_call(const dvx *net, int index, dvx_call_info *call);

#ifdef __cplusplus
}
#endif

#endif
