/* The runtime for other languages: a C interface over model.h. Options and reports are JSON texts.
 *
 * Functions that return a pointer return NULL, and those that return an int a negative number, when something went
 * wrong; loop_singular_bit_error() then describes it. Texts that are returned are freed with loop_singular_bit_free().
 * A model is used by one thread at a time. */
#pragma once

#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

typedef struct loop_singular_bit_model loop_singular_bit_model;

/* Of the last failure in this thread: {"kind": "usage" | "checkpoint" | "unsupported" | "disk" | "memory_budget" |
 * "interrupted", "message": "...", "needed_bytes": n}. Valid until the next call in this thread; not to be freed. */
const char* loop_singular_bit_error(void);
void loop_singular_bit_free(char* text);

/* {"directory": "...", "budget_bytes": 0, "context": 0, "back_end": "auto", "activation_precision": "int8",
 *  "cache_type": "float16", "threads": 0, "prefetch": true, "max_layers": 0, "prefill_tokens": 0,
 *  "interrupt_descriptor": -1}; all but the directory may be left out. See ModelOptions in memory_plan.h. */
loop_singular_bit_model* loop_singular_bit_open(const char* options);
void loop_singular_bit_close(loop_singular_bit_model* model);

/* What open() with the same options would do, without the large allocations. */
char* loop_singular_bit_plan(const char* options);
/* {"plan": {...}, "vocabulary": n, "end_tokens": [...], ...} */
char* loop_singular_bit_describe(loop_singular_bit_model* model);
/* {"bytes_read": n, "seconds_waited": s, "direct": b, "peak_resident_bytes": n, "length": n} */
char* loop_singular_bit_statistics(loop_singular_bit_model* model);

/* sampling: {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "seed": 0, "reuse_cache": false} */
int loop_singular_bit_start(loop_singular_bit_model* model, const int32_t* tokens, int64_t count, const char* sampling);
/* The next token. */
int32_t loop_singular_bit_next(loop_singular_bit_model* model);
/* output: float [count, vocabulary] */
int loop_singular_bit_logits(loop_singular_bit_model* model, const int32_t* tokens, int64_t count, float* output);

/* {"isa": "...", "supported_isas": [...], "threads": n, "available_bytes": n} */
char* loop_singular_bit_system(void);
/* Bytes per second; negative on failure. */
double loop_singular_bit_read_rate(const char* path, int64_t bytes, int64_t buffer_bytes, int32_t looks);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
