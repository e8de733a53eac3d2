// Embedding: embedding_forward_bN copies words of N bytes; the sort has no types; the sums are embedding_NAME_TYPE for widths that
// allow vectors, and embedding_NAME_TYPE_any for all others.
#include "embedding.cuh"

using namespace fused_ops;

#define FORWARD(bytes, type)                                                                       \
    extern "C" __global__ void __launch_bounds__(kEmbeddingThreads) embedding_forward_b##bytes(    \
        const __grid_constant__ EmbeddingForwardParams params) {                                   \
        embedding_forward<type>(params);                                                           \
    }

FORWARD(16, uint4)
FORWARD(4, uint32_t)
FORWARD(2, uint16_t)

extern "C" __global__ void __launch_bounds__(kSortThreads) embedding_count(const __grid_constant__ EmbeddingSortParams params) {
    count_digits(params);
}
extern "C" __global__ void __launch_bounds__(kSortThreads) embedding_scatter(const __grid_constant__ EmbeddingSortParams params) {
    scatter_keys(params);
}
extern "C" __global__ void __launch_bounds__(kEmbeddingThreads) embedding_runs(const __grid_constant__ EmbeddingSumParams params) {
    find_runs(params);
}

#define SUMS(type, suffix, columns)                                                                \
    extern "C" __global__ void __launch_bounds__(kEmbeddingThreads) embedding_segments_##suffix(   \
        const __grid_constant__ EmbeddingSumParams params) {                                       \
        embedding_segments<type, columns>(params);                                                 \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(kEmbeddingThreads) embedding_rows_##suffix(       \
        const __grid_constant__ EmbeddingSumParams params) {                                       \
        embedding_rows<type, columns>(params);                                                     \
    }

#define KERNELS(type) SUMS(type, type, kVector<type>) SUMS(type, type##_any, 1)

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
