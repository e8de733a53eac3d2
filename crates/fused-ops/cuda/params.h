// What the host passes to each kernel. Tensors are contiguous, and rows are the leading axes together.
#pragma once

#include <cstdint>

namespace fused_ops {

// Forward of layer norm and RMS norm, with or without a residual add before it.
struct NormForwardParams {
    const void* x;         // (rows, width)
    const void* residual;  // (rows, width), or null
    const void* weight;    // (width)
    const void* bias;      // (width), or null
    void* sum;             // (rows, width): x + residual; null without a residual
    void* y;               // (rows, width)
    float2* statistics;    // (rows): mean and rstd
    int64_t rows;
    int32_t width;
    int32_t centre;  // 1: layer norm; 0: RMS norm, whose mean is 0
    float eps;
};

// Backward of both norms. A second kernel adds the partial sums.
struct NormBackwardParams {
    const void* x;             // (rows, width); x + residual if there was a residual
    const void* dy;            // (rows, width)
    const void* weight;        // (width)
    const float2* statistics;  // (rows)
    void* dx;                  // (rows, width)
    float* partial_dweight;    // (blocks, width)
    float* partial_dbias;      // (blocks, width), or null
    int64_t rows;
    int32_t width;
    int32_t centre;
};

// Adds partial sums of dweight and dbias in the order of the blocks.
struct NormFinishParams {
    const float* partial_dweight;  // (blocks, width)
    const float* partial_dbias;    // (blocks, width), or null
    void* dweight;                 // (width)
    void* dbias;                   // (width), or null
    int32_t blocks;
    int32_t width;
};

// Cross-entropy of each row of logits.
struct CrossEntropyParams {
    const void* logits;      // (rows, vocab), a row every `stride` elements
    const int64_t* targets;  // (rows)
    float* losses;           // (rows): 0 for an ignored row
    float* lse;              // (rows), in base 2; null if nobody needs it
    void* dlogits;           // as logits, and may be the same
    const float* dloss;      // (): the gradient of the mean loss; null for that of each loss, 1
    const float* counted;    // (): the divisor of the mean
    int64_t rows;
    int64_t stride;
    int64_t ignore_index;  // a value that no target has if nothing is ignored
    int32_t vocab;
    int32_t kept;  // bytes of a row that stay in shared memory, a multiple of 16
    float label_smoothing;
    float z_loss;
    float softcap;  // 0 for none
};

// The mean of the losses of all rows.
struct CrossEntropyMeanParams {
    const float* losses;     // (rows)
    const int64_t* targets;  // (rows)
    float* mean;             // ()
    float* counted;          // (): the number of rows that are not ignored, at least 1
    int64_t rows;
    int64_t ignore_index;
};

// from * dloss / counted, rounded to a type.
struct ScaleParams {
    const float* from;     // (size)
    void* to;              // (size)
    const float* dloss;    // ()
    const float* counted;  // ()
    int64_t size;
};

}  // namespace fused_ops
