// Rows with more or fewer columns. The kernel moves words, so it needs no element type. The host chooses the largest word that divides
// the rows.
//
// A thread has one column of words in kColumnsRows rows, or more columns if a row has more words than the block has threads.
#pragma once

#include "core.cuh"

namespace fused_ops {

template <typename Word>
__device__ void resize_columns(const ColumnsParams& params) {
    const Word* __restrict__ x = static_cast<const Word*>(params.x);
    Word* __restrict__ y = static_cast<Word*>(params.y);
    const int threads_of_row = min(params.y_words, kColumnsThreads);
    const int rows_at_once = kColumnsThreads / threads_of_row;
    const int row_of_thread = int(threadIdx.x) / threads_of_row;
    if (row_of_thread >= rows_at_once) return;  // the threads of an incomplete row
    const int64_t first_row = int64_t(blockIdx.x) * rows_at_once * kColumnsRows + row_of_thread;
    for (int col = int(threadIdx.x) % threads_of_row; col < params.y_words; col += threads_of_row) {
        Word words[kColumnsRows] = {};  // zeros
        // All loads first: a store between them would have to wait.
#pragma unroll
        for (int i = 0; i < kColumnsRows; ++i) {
            const int64_t row = first_row + i * rows_at_once;
            if (row < params.rows && col < params.x_words) words[i] = x[row * params.x_words + col];
        }
#pragma unroll
        for (int i = 0; i < kColumnsRows; ++i) {
            const int64_t row = first_row + i * rows_at_once;
            if (row < params.rows) y[row * params.y_words + col] = words[i];
        }
    }
}

}  // namespace fused_ops
