// C interface of the group-quantized product.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct RoundexportWeight RoundexportWeight;

// Runs task(data, 0) .. task(data, count - 1), on whatever threads, and returns when all are done.
typedef void (*RoundexportParallel)(void* context, void (*task)(void* data, size_t index), size_t count, void* data);

// Packs a weight [rows, columns] as the graph holds it: codes [rows, groups, group*bits/8], low bits first; scales [rows,
// groups], float16 if `half`, else float32; zero points [rows, ceil(groups*bits/8)] or NULL for 2**(bits-1).  bits is
// 2, 3, 4 or 8, group a multiple of 32.  NULL: these cannot be packed, or memory is short.
RoundexportWeight* roundexport_weight(const uint8_t* codes, const void* scales, int half, const uint8_t* zero_points,
                                      int columns, int rows, int bits, int group);
void roundexport_free_weight(RoundexportWeight*);
size_t roundexport_weight_bytes(const RoundexportWeight*);

// y[m, n] = bias[n] + sum over columns of weight[n, k] * x[m, k], x rounded to eight bits per group.  `parallel` may be
// NULL: all on this thread.
void roundexport_product(const RoundexportWeight*, const float* x, int rows, const float* bias, float* y,
                         RoundexportParallel parallel, void* context);

// The same with x as it is: slow.
void roundexport_exact_product(const RoundexportWeight*, const float* x, int rows, const float* bias, float* y,
                               RoundexportParallel parallel, void* context);

// The instruction set in use: avx512vnni, avx2 or generic; chosen by the processor, or by ROUNDEXPORT_ISA.
const char* roundexport_isa(void);
// 0: done; -1: this processor or build lacks it.  Not while a product runs.
int roundexport_set_isa(const char* name);

#ifdef __cplusplus
}
#endif
