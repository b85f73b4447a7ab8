/* The C interface of the native CPU engine: plain structs and functions, called from Python through ctypes.
 *
 * A model holds packed weights and is shared by engines; an engine holds predictors, scratch memory and a thread pool. The
 * key/value cache belongs to the caller: pools [layers, pages, groups, page_size, head_stride] of fp32, fp16, or int8 with fp32
 * scales [layers, pages, groups, page_size]. Every function that can fail returns a status; dejavu_error() then says why, for the
 * calling thread. Sizes are counts, offsets are 64 bit.
 */
#ifndef DEJAVU_NATIVE_H
#define DEJAVU_NATIVE_H

#include <stdint.h>

/* Raised by hand where a caller of the last version would be misunderstood though no layout differs: another meaning of a field or code,
 * other arguments of a function. The layouts of structs tell themselves: dejavu_layouts. */
#define DEJAVU_ABI_VERSION 9

#if defined(__GNUC__)
#define DEJAVU_API __attribute__((visibility("default")))
#else
#define DEJAVU_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum dejavu_status { DEJAVU_OK = 0, DEJAVU_BAD_VALUE = 1, DEJAVU_NO_MEMORY = 2, DEJAVU_NOT_FINITE = 3, DEJAVU_INTERNAL = 4 };
enum dejavu_dtype {
  DEJAVU_FP32 = 0, DEJAVU_INT8, DEJAVU_BF16, DEJAVU_INT4, DEJAVU_FP16,
  DEJAVU_Q8_0, DEJAVU_Q4_0, DEJAVU_Q4_1, DEJAVU_Q5_0, DEJAVU_Q5_1, DEJAVU_Q4_K, DEJAVU_Q5_K, DEJAVU_Q6_K, /* types of GGUF */
  DEJAVU_W4_FP16, DEJAVU_W4_BF16, DEJAVU_W8_FP16, DEJAVU_W8_BF16 /* of 4 and 8 bits with zero points, by the type of their scales */
};
enum dejavu_activation { DEJAVU_RELU = 0, DEJAVU_RELU2 = 1, DEJAVU_FATRELU = 2, DEJAVU_SILU = 3, DEJAVU_GELU = 4, DEJAVU_GELU_TANH = 5 };
enum dejavu_part { /* of a model; layer is -1 for those without one */
  DEJAVU_EMBED = 0, DEJAVU_POSITION, DEJAVU_PROJECT_IN, DEJAVU_PROJECT_OUT, DEJAVU_HEAD, DEJAVU_FINAL_NORM, DEJAVU_INV_FREQ,
  DEJAVU_NORM1, DEJAVU_NORM2, DEJAVU_Q, DEJAVU_K, DEJAVU_V, DEJAVU_O,
  DEJAVU_Q_NORM, DEJAVU_K_NORM, /* of every head, before it is rotated; both or neither */
  DEJAVU_NORM1_OUT, DEJAVU_NORM2_OUT, /* of what attention and the MLP add, before it is added */
  DEJAVU_LOCAL_INV_FREQ /* of layers with a window, where they have others */
};
enum dejavu_layout { /* of weights in memory, by how decoding selects */
  DEJAVU_BY_NEURON = 0, /* rows of a neuron side by side: for predictors */
  DEJAVU_GATE_APART,    /* rows of the gate (not gated: of up) in order, then those of a neuron: for dejavu_engine_gate */
  DEJAVU_INPUT_MAJOR    /* q, k, v, gate and up hold a row for each input, as o and down do: for dejavu_engine_inputs */
};
enum dejavu_predicted { DEJAVU_MLP = 0, DEJAVU_HEADS = 1 };
enum dejavu_point { /* what linear maps read: q, k and v; o; gate and up; down */
  DEJAVU_AT_ATTENTION = 0, DEJAVU_AT_OUTPUT, DEJAVU_AT_MLP, DEJAVU_AT_DOWN, DEJAVU_POINTS
};
enum dejavu_op { /* parts of a block, for its profile */
  DEJAVU_OP_PREDICTOR = 0, DEJAVU_OP_ATTENTION, DEJAVU_OP_MLP, DEJAVU_OP_HEAD, DEJAVU_OP_OTHER, DEJAVU_OPS
};

/* parallel: the MLP reads the residual stream that attention reads, by norm2. rotary_factor: of what is rotated, local_rotary_factor: by local inverse frequencies; attention_scale: of scores; embed_scale, residual_scale and logit_scale: of the embedding, of what a
 * block adds, and of the head's input. A cap c turns a score or logit x into c tanh(x / c), 0 is none. threads: that pack matrices. */
typedef struct {
  int64_t vocab_size, hidden_size, embed_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, max_positions;
  int64_t position_offset;
  int32_t activation, gated, rms, pre_norm, parallel, final_norm, rope, tied_head, layout, threads;
  float norm_eps, activation_threshold, rotary_factor, local_rotary_factor, attention_scale, embed_scale, residual_scale, logit_scale, attention_cap, logit_cap;
} dejavu_config;

typedef struct dejavu_model dejavu_model;
typedef struct dejavu_engine dejavu_engine;

/* One matrix of a model or predictor, row-major: fp32, fp16, bf16, int8 with an fp32 scale for each row, int4 as nibbles (value + 8, the
 * first of two in the low half of a byte; a row is (columns + 1) / 2 bytes) with an fp16 scale for each 32 values of a row (the last ones
 * fewer), the blocks of a type of GGUF as a file has them, or blocks with zero points: for 32 values scale * (q - zero) the scale (fp16 or
 * bf16), the zero as a signed byte, and q as 16 bytes of nibbles (low halves are the first 16 values) or as 32 signed bytes. scale is NULL
 * where there is none; bias may be NULL. Row r is stored as row order[r]; NULL: r. `transposed` o and down are given as rows of outputs,
 * [hidden, inputs], in place of rows of inputs (fp32, fp16, bf16 and blocks, whose scales then belong to groups of inputs). Nothing is kept
 * of the memory that is given. */
typedef struct {
  const void *data, *scale;
  const float *bias;
  const int64_t *order;
  int64_t rows, columns;
  int32_t dtype, transposed;
} dejavu_matrix;

/* One block of tokens: rows of a decode step (each of its own slot) or consecutive tokens of one slot. table[r] lists the
 * pages of row r's sequence. k_scale and v_scale belong to an int8 cache and are NULL otherwise. Outputs: logits fp32
 * [rows - first_logits, vocab], counts [rows, layers], masks or NULL. inputs: kept at each point, [rows, layers, points] or NULL, with
 * masks side by side in the order of the points, [rows, layers, hidden + query heads x head_dim + hidden + neurons] or NULL.
 * unions, in_order [layers]: neurons that some row selected (all where a layer selects none), and of rows x neurons how many were computed
 * without need: all neurons of a row were read in order, as so many were selected (none where a layer selects none). */
typedef struct {
  int64_t rows, first_logits, num_pages, page_size, head_stride;
  const int64_t *token, *position;
  const int64_t *const *table;
  void *k_pool, *v_pool;
  float *k_scale, *v_scale;
  int32_t cache_dtype, sparse, prompt, full_head; /* prompt: products with rows of few bits are summed in another order than those of steps; full_head: without the screen */
  float *logits;
  int64_t *neurons, *heads;
  uint8_t *neuron_mask, *group_mask; /* [rows, layers, neurons], [rows, layers, groups] */
  int64_t *inputs;
  uint8_t *input_mask;
  int64_t *unions, *in_order;
} dejavu_block;

/* What a block took and what it read. seconds: of the calling thread, by op, the wait at a barrier with the op before it. By
 * layer, over all rows together: neurons whose row of down some row needed (an activation of exactly zero does not), and head
 * groups that some row selected; by layer and point the inputs that some row kept, or NULL. */
typedef struct {
  double seconds[DEJAVU_OPS];
  int64_t *fired, *groups, *inputs;
} dejavu_profile;

DEJAVU_API int dejavu_abi_version(void);
/* The layout of every struct above, a line each: "dejavu_matrix data:p8@0 ... dtype:i4@48 transposed:i4@52 size:56\n". A field is its name, kind (p: pointer,
 * i: integer, f: float), bytes and offset. Whoever mirrors the structs by hand compares. */
DEJAVU_API const char *dejavu_layouts(void);
DEJAVU_API const char *dejavu_error(void);
/* Names of the instruction sets that this machine can run, best first, separated by spaces. */
DEJAVU_API const char *dejavu_instruction_sets(void);

DEJAVU_API int dejavu_model_new(const dejavu_config *config, dejavu_model **out);
/* Copies (and packs) one part. Norms are a matrix [1, D] with an optional bias, those of heads [1, head_dim] without; position and
 * inverse frequencies are fp32. There are as many inverse frequencies as pairs of a head are rotated, at most head_dim / 2. */
DEJAVU_API int dejavu_model_set(dejavu_model *model, int part, int64_t layer, const dejavu_matrix *matrix);
/* The MLP of a layer, whose rows are packed together: rows of gate (NULL where the model has none) and up, [neurons, hidden], and down. */
DEJAVU_API int dejavu_model_set_mlp(dejavu_model *model, int64_t layer, const dejavu_matrix *gate, const dejavu_matrix *up, const dejavu_matrix *down);
/* Tokens of a layer see the last `window` tokens alone, themselves included; without this call all of them. */
DEJAVU_API int dejavu_model_window(dejavu_model *model, int64_t layer, int64_t window);
DEJAVU_API void dejavu_model_free(dejavu_model *model);

/* instruction_set: a name of dejavu_instruction_sets, or NULL for the best. The model must outlive the engine. */
DEJAVU_API int dejavu_engine_new(const dejavu_model *model, int threads, int64_t max_rows, const char *instruction_set, dejavu_engine **out);
/* scores = B (A x) + B's bias; selected where score > threshold. */
DEJAVU_API int dejavu_engine_predictor(dejavu_engine *engine, int64_t layer, int predicted, const dejavu_matrix *A, const dejavu_matrix *B,
                                       float threshold, int lookahead);
/* In place of a predictor of the MLP: every gate is computed, and neurons with |activation(gate x)| > threshold are selected (not gated:
 * |activation(up x)|). The threshold is 0 or more; 0 leaves out what is exactly zero. */
DEJAVU_API int dejavu_engine_gate(dejavu_engine *engine, int64_t layer, float threshold);
/* Of the inputs x of the maps at one point those with |x_i| norms_i > threshold are kept, and only weights of these are read. `count` norms,
 * 0 or more, as many as inputs; the threshold is 0 or more. A layer's other points, and layers that are not told so, keep all. */
DEJAVU_API int dejavu_engine_inputs(dejavu_engine *engine, int64_t layer, int point, const float *norms, int64_t count, float threshold);
/* mass = softmax(centroids x + bias) of the head's input estimates the probability of clusters of tokens: those with mass >= threshold * size,
 * and the one with the largest mass / size, get exact logits, all other tokens -inf, in sparse blocks. centroids: fp32 or int8, a row for each cluster. sizes: of
 * each, 1 or more. members: every token once, one cluster after the other. 0 < threshold < 1. */
DEJAVU_API int dejavu_engine_screen(dejavu_engine *engine, const dejavu_matrix *centroids, const int32_t *members, const int32_t *sizes, float threshold);
DEJAVU_API int dejavu_engine_run(dejavu_engine *engine, const dejavu_block *block);
/* As dejavu_engine_run, and fills the profile. A run without one costs nothing for it. */
DEJAVU_API int dejavu_engine_profile(dejavu_engine *engine, const dejavu_block *block, dejavu_profile *profile);
/* Reads count floats in order, each thread its share of them, and adds them up: what reading memory costs this engine. */
DEJAVU_API int dejavu_engine_read(dejavu_engine *engine, const float *data, int64_t count, double *sum);
DEJAVU_API void dejavu_engine_free(dejavu_engine *engine);

#ifdef __cplusplus
}
#endif
#endif
