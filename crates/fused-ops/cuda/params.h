// What the host passes to each kernel. Tensors are contiguous, rows are the leading axes together, and strides need no fields.
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
    float2* statistics;    // (rows): mean and rstd; null if there will be no backward
    int64_t rows;
    int32_t width;   // a multiple of 16 bytes
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
    const float* partial;  // (blocks, width)
    void* sum;             // (width)
    int32_t blocks;
    int32_t width;
};

// Cross-entropy of each row of logits.
struct CrossEntropyParams {
    const void* logits;      // (rows, vocab)
    const int64_t* targets;  // (rows)
    float* losses;           // (rows): 0 for an ignored row
    float* lse;              // (rows)
    void* dlogits;           // (rows, vocab); may be `logits`
    const float* factor;     // (): the gradient of each loss; null for 1
    int64_t rows;
    int32_t vocab;
    int64_t ignore_index;  // a value that no target has if nothing is ignored
    float label_smoothing;
    float z_loss;
    float softcap;  // 0 for none
};

}  // namespace fused_ops
