// Embedding: embedding_forward_bN copies words of N bytes; the sort has no types; the sums are embedding_NAME_TYPE for widths that
// allow vectors, and embedding_NAME_TYPE_any for all others.
#include "embedding.cuh"

using namespace fused_ops;

#define FORWARD(bytes, type) \
    KERNEL((kEmbeddingThreads), embedding_forward_b##bytes, EmbeddingForwardParams, embedding_forward<type>(params))

FORWARD(16, uint4)
FORWARD(4, uint32_t)
FORWARD(2, uint16_t)

KERNEL((kSortThreads), embedding_count, EmbeddingSortParams, count_digits(params))
KERNEL((kSortThreads), embedding_scatter, EmbeddingSortParams, scatter_keys(params))
KERNEL((kEmbeddingThreads), embedding_runs, EmbeddingSumParams, find_runs(params))

#define SUMS(type, suffix, columns)                                              \
    KERNEL((kEmbeddingThreads), embedding_segments_##suffix, EmbeddingSumParams, \
           embedding_segments<type, columns>(params))                            \
    KERNEL((kEmbeddingThreads), embedding_rows_##suffix, EmbeddingSumParams, embedding_rows<type, columns>(params))

#define KERNELS(type) SUMS(type, type, kVector<type>) SUMS(type, type##_any, 1)

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
