// The parameters of every kernel, and the numbers that kernels share with the host. Tensors are contiguous, and rows are the leading axes
// together. crates/kernel-build parses this file, one field on a line, and generates the same structs and numbers in Rust.
#pragma once

#include <cstdint>

namespace fused_ops {

constexpr int kWarpSize = 32;

constexpr int kNormThreads = 256;       // of a block with kNormElements
constexpr int kNormElements = 32;       // of a row, in the registers of a thread
constexpr int kNormMoreThreads = 384;   // of a block with kNormLessElements, in a backward
constexpr int kNormLessElements = 24;
constexpr int kNormMostThreads = 512;   // of a block with kNormLeastElements, in a backward of 16-bit types
constexpr int kNormLeastElements = 16;
constexpr int kNormStages = 2;          // rows of a thread on their way to shared memory, in a backward of 16-bit types with vectors
constexpr int kFinishColumns = 32;      // of a block of norm_finish: one for each lane
constexpr int kFinishParts = 32;        // warps of a block of norm_finish; each adds an equal share of the partial sums

constexpr int kLossThreads = 512;   // of a block of cross_entropy, which has one row
constexpr int kMeanThreads = 1024;  // of the only block of the mean
constexpr int kScaleThreads = 256;  // of a block of `scale`

constexpr int kActivationThreads = 256;
constexpr int kUnaryVectors = 2;  // of a thread of the forward without `up`
constexpr int kGatedVectors = 1;  // of a thread of the forward with `up`, from each tensor

constexpr int kRotaryThreads = 256;
constexpr int kHalvesItems = 1;       // of a thread, in the order of halves: 32 bytes of x
constexpr int kInterleavedItems = 2;  // of a thread, in the interleaved order: 32 bytes of x

constexpr int kEmbeddingThreads = 256;
constexpr int kEmbeddingWords = 4;  // of a thread of the forward
constexpr int kDigitBits = 9;       // of a key, for one pass of the sort
constexpr int kSortThreads = 512;   // of a block: one for each digit where a kernel adds counts
constexpr int kSegment = 64;        // sorted positions that one thread sums; not tuned yet

constexpr int kColumnsThreads = 256;
constexpr int kColumnsRows = 4;  // of a thread; not tuned yet

constexpr int kSumThreads = 256;
constexpr int kSumVectors = 2;  // of a thread, from each tensor

constexpr int kAdamWThreads = 256;
constexpr int kAdamWChunk = 16384;        // elements of a block, 64 of a thread; not tuned yet
constexpr int kGlobalNormThreads = 1024;  // of the only block

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
    const void* other;         // (rows, width): another gradient of x, which dx includes; or null
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
    void* dlogits;           // as logits, and as far from a multiple of 16 bytes; may be the same
    const float* dloss;      // (): the gradient of the mean loss; null for that of each loss, 1
    const float* counted;    // (): the divisor of the mean
    int64_t rows;
    int64_t stride;
    int64_t ignore_index;  // a value that no target has if nothing is ignored
    int32_t vocab;
    int32_t kept_bytes;  // of a row, in shared memory; a multiple of 16
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
    const float* from;     // (len)
    void* to;              // (len)
    const float* dloss;    // ()
    const float* counted;  // ()
    int64_t len;
};

// y = activation(x), or activation(x) * up.
struct ActivationForwardParams {
    const void* x;   // (len)
    const void* up;  // (len), or null
    void* y;         // (len)
    int64_t len;
};

struct ActivationBackwardParams {
    const void* x;   // (len)
    const void* up;  // (len), or null
    const void* dy;  // (len)
    void* dx;        // (len)
    void* dup;       // (len), or null
    int64_t len;
};

// Rotary position embedding. `rows` are the heads of all tokens, fewer than 2^32 pairs together.
struct RotaryParams {
    const void* x;     // (rows, head_dim), with rows = batch * seqlen * num_heads
    void* y;           // (rows, head_dim); may be `x`
    const float* cos;  // (seqlen, pairs)
    const float* sin;  // (seqlen, pairs)
    uint32_t rows;
    uint32_t num_heads;
    uint32_t seqlen;
    uint32_t head_dim;
    uint32_t pairs;
    float sign;  // of the angles: 1 in the forward, -1 in the backward
};

// y[i] = weight[ids[i]] in words of 16, 4 or 2 bytes, fewer than 2^32 together.
struct EmbeddingForwardParams {
    const void* ids;     // (tokens): u32 or i64
    const void* weight;  // (rows, words)
    void* y;             // (tokens, words)
    uint32_t tokens;
    uint32_t rows;
    uint32_t words;     // of a row
    int32_t wide_ids;  // 1: i64; 0: u32
};

// One pass of the sort of the positions by their id. The first pass reads `ids`, the next ones read what the last one has sorted.
struct EmbeddingSortParams {
    const void* ids;            // (tokens): u32 or i64; null after the first pass
    const uint32_t* keys;       // (tokens): the ids in the order of the last pass; null in the first pass
    const uint32_t* positions;  // (tokens): where these ids were; null in the first pass
    uint32_t* counts;           // (blocks, 2^kDigitBits): the ids of each block with each digit
    uint32_t* sorted_keys;      // (tokens)
    uint32_t* sorted_positions;  // (tokens)
    uint32_t tokens;
    uint32_t rows;   // an id that is no row has the key `rows`
    uint32_t share;  // tokens of a block, a multiple of kSortThreads
    int32_t shift;       // of the digit in the key
    int32_t wide_ids;
};

// The sums of rows of dy, after the sort.
struct EmbeddingSumParams {
    const void* dy;             // (tokens, width)
    const uint32_t* keys;       // (tokens), sorted
    const uint32_t* positions;  // (tokens), ascending for one key
    uint2* runs;                // (rows): where the run of each row begins and ends in `keys`; zeros before `embedding_runs`
    float* partial;             // (tokens / kSegment, width): the sums of segments with one key
    void* dweight;              // (rows, width)
    uint32_t tokens;
    uint32_t rows;
    uint32_t width;
};

// Rows with more or fewer columns, in words.
struct ColumnsParams {
    const void* x;    // (rows, x_words)
    void* y;          // (rows, y_words): words of x, then zeros
    int64_t rows;
    int32_t x_words;
    int32_t y_words;
};

// y = a + b.
struct SumParams {
    const void* a;  // (len)
    const void* b;  // (len)
    void* y;        // (len)
    int64_t len;
};

// A parameter, its gradient and its state.
struct AdamWTensor {
    const void* gradient;  // (len)
    float* w;              // (len): the parameter in f32, or the master weights
    float* m;              // (len)
    float* v;              // (len)
    void* rounded;         // (len): the parameter in f16 or bf16; null in f32
    int64_t len;
    float keep;  // 1 - lr * weight_decay
};

// The chunk that a block updates: chunk `chunk` of tensor `tensor`.
struct AdamWBlock {
    uint32_t tensor;
    uint32_t chunk;
};

// One step for all parameters of one type.
struct AdamWParams {
    const AdamWTensor* tensors;
    const AdamWBlock* blocks;  // (blocks)
    float* partial;       // (blocks): sums of squares
    const float* factor;  // (): scale of the gradients
    float beta1;
    float beta2;
    float of_gradient;  // 1 - beta1
    float of_square;    // 1 - beta2
    float rate;         // lr / c1 * sqrt(c2)
    float epsilon;      // epsilon * sqrt(c2)
};

struct GlobalNormParams {
    const float* partial;  // (blocks)
    float* norm;           // ()
    float* factor;         // (): min(1, max_norm / norm)
    uint32_t blocks;
    float max_norm;  // infinity for no clipping
};

}  // namespace fused_ops
