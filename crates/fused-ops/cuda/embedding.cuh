// The lookup of rows by id, and its backward: a sort of the positions by id, then the sum of each run of one id.
//
// Forward    copies rows in words of 16, 4 or 2 bytes, and knows no types. An id that is no row gives a row of NaN.
// Sort       a stable radix sort with kDigitBits per pass: two passes for up to 2^18 rows. `count_digits` counts the digits of each
//            block's share of the keys. `scatter_keys` adds the counts of all blocks and moves the keys. Warps take their part of a
//            share in order, and `match_any` ranks equal digits of a warp, so the result does not depend on timing.
// Sums       The sorted list has segments of kSegment. `embedding_segments` sums each segment that has one id only, so a frequent id does
//            not keep one thread busy. `embedding_rows` writes every row of dweight: the positions before the first whole segment of its
//            run, the sums of whole segments, the positions after them; 0 without a position.
// Memory     dy is read once. dweight is written once.
// Numerics   f32. The order of additions depends on the ids alone.
// Expects    for vectors: width a multiple of kVector<T>, dy and dweight aligned to 16 bytes. Fewer than 2^32 vectors in dweight.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

// The row of a position, or `rows` if its id is no row.
__device__ __forceinline__ uint32_t row_of(const void* ids, int wide_ids, uint32_t position, uint32_t rows) {
    if (!wide_ids) return min(static_cast<const uint32_t*>(ids)[position], rows);
    const int64_t id = static_cast<const int64_t*>(ids)[position];
    return id >= 0 && id < rows ? uint32_t(id) : rows;
}

template <typename Word>
__device__ __forceinline__ void embedding_forward(const EmbeddingForwardParams& params) {
    const Word* weight = static_cast<const Word*>(params.weight);
    Word* y = static_cast<Word*>(params.y);
    const uint32_t total = params.tokens * params.words;
    const uint32_t start = blockIdx.x * kEmbeddingWords * kEmbeddingThreads + threadIdx.x;
    Word words[kEmbeddingWords];
    bool found[kEmbeddingWords];
#pragma unroll
    for (int i = 0; i < kEmbeddingWords; ++i) {
        // Past the end, the last word again: a load without a branch can be queued with the others.
        const uint32_t at = min(start + i * kEmbeddingThreads, total - 1);
        const uint32_t row = row_of(params.ids, params.wide_ids, at / params.words, params.rows);
        found[i] = row < params.rows;
        words[i] = weight[int64_t(found[i] ? row : 0) * params.words + at % params.words];
    }
#pragma unroll
    for (int i = 0; i < kEmbeddingWords; ++i) {
        const uint32_t at = start + i * kEmbeddingThreads;
        if (at >= total) break;
        if (!found[i]) memset(&words[i], 0xff, sizeof(Word));  // NaN in every type
        y[at] = words[i];
    }
}

constexpr int kDigits = 1 << kDigitBits;
static_assert(kSortThreads == kDigits);
constexpr int kSortWarps = kSortThreads / kWarpSize;

struct SortedKey {
    uint32_t key, position;
};

__device__ __forceinline__ SortedKey read_key(const EmbeddingSortParams& params, uint32_t at) {
    if (params.ids != nullptr) return {row_of(params.ids, params.wide_ids, at, params.rows), at};
    return {params.keys[at], params.positions[at]};
}

__device__ __forceinline__ uint32_t digit_of(const EmbeddingSortParams& params, uint32_t key) {
    return key >> params.shift & (kDigits - 1);
}

__device__ __forceinline__ void count_digits(const EmbeddingSortParams& params) {
    __shared__ uint32_t counts[kDigits];
    counts[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t first = blockIdx.x * params.share, end = min(first + params.share, params.tokens);
    for (uint32_t at = first + threadIdx.x; at < end; at += kSortThreads) {
        atomicAdd(&counts[digit_of(params, read_key(params, at).key)], 1);
    }
    __syncthreads();
    params.counts[blockIdx.x * kDigits + threadIdx.x] = counts[threadIdx.x];
}

// The sum of `count` over the threads before this one.
__device__ __forceinline__ uint32_t sum_before(uint32_t count) {
    __shared__ uint32_t of_warps[kSortWarps];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    uint32_t sum = count;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == kWarpSize - 1) of_warps[warp] = sum;
    __syncthreads();
    for (int other = 0; other < warp; ++other) sum += of_warps[other];
    return sum - count;
}

__device__ __forceinline__ void scatter_keys(const EmbeddingSortParams& params) {
    __shared__ uint32_t next[kSortWarps][kDigits];  // where a warp puts its next key with a digit
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const uint32_t lanes_before = (1u << lane) - 1;
    const uint32_t part = params.share / kSortWarps, first = blockIdx.x * params.share + warp * part;

    // Calls `take` for each key of the warp in order, with its index among those that `next` has counted, and counts it.
    auto for_each = [&](auto take) {
        for (uint32_t round = 0; round < part; round += kWarpSize) {
            const uint32_t at = first + round + lane;
            const bool valid = at < params.tokens;
            const SortedKey key = valid ? read_key(params, at) : SortedKey{};
            const uint32_t digit = digit_of(params, key.key);
            const uint32_t same = __match_any_sync(kAllLanes, valid ? digit : kDigits);  // the lanes with this digit
            const uint32_t index = next[warp][digit];
            __syncwarp();  // all lanes have read `index`
            if (valid && (same & lanes_before) == 0) next[warp][digit] = index + __popc(same);
            if (valid) take(key, index + __popc(same & lanes_before));
            __syncwarp();
        }
    };

    for (int other = 0; other < kSortWarps; ++other) next[other][threadIdx.x] = 0;
    __syncthreads();
    for_each([](SortedKey, uint32_t) {});
    uint32_t total = 0, before = 0;  // keys with the digit of this thread, and those in earlier blocks
    for (uint32_t block = 0; block < gridDim.x; ++block) {
        const uint32_t count = params.counts[block * kDigits + threadIdx.x];
        total += count;
        if (block < blockIdx.x) before += count;
    }
    uint32_t start = sum_before(total) + before;  // its barrier also ends the counting above
    for (int other = 0; other < kSortWarps; ++other) {
        const uint32_t count = next[other][threadIdx.x];
        next[other][threadIdx.x] = start;
        start += count;
    }
    __syncthreads();
    for_each([&](SortedKey key, uint32_t to) {
        params.sorted_keys[to] = key.key;
        params.sorted_positions[to] = key.position;
    });
}

__device__ __forceinline__ void find_runs(const EmbeddingSumParams& params) {
    const uint32_t at = blockIdx.x * kEmbeddingThreads + threadIdx.x;
    if (at >= params.tokens) return;
    const uint32_t key = params.keys[at];
    if (key == params.rows) return;  // no row
    if (at == 0 || params.keys[at - 1] != key) params.runs[key].x = at;
    if (at + 1 == params.tokens || params.keys[at + 1] != key) params.runs[key].y = at + 1;
}

constexpr int kBatch = 4;  // loads of a thread in flight

// Adds kCount columns of the rows of dy at sorted positions begin..end, in order.
template <typename T, int kCount>
__device__ __forceinline__ void add_positions(
    const EmbeddingSumParams& params, uint32_t begin, uint32_t end, uint32_t column, float (&sum)[kCount]) {
    for (uint32_t first = begin; first < end; first += kBatch) {
        int64_t positions[kBatch];
        float rows[kBatch][kCount];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) positions[i] = params.positions[min(first + i, end - 1)];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            load<T>(rows[i], static_cast<const T*>(params.dy) + positions[i] * params.width + column);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            // Past the end, the last row again, which is not added. A branch would keep the loads from being queued together.
            const bool valid = first + i < end;
#pragma unroll
            for (int j = 0; j < kCount; ++j) sum[j] += valid ? rows[i][j] : 0.f;
        }
    }
}

// One thread for kCount columns of a segment.
template <typename T, int kCount>
__device__ __forceinline__ void embedding_segments(const EmbeddingSumParams& params) {
    const uint32_t columns = params.width / kCount, item = blockIdx.x * kEmbeddingThreads + threadIdx.x;
    const uint32_t segment = item / columns, column = item % columns * kCount;
    if (segment >= params.tokens / kSegment) return;
    const uint32_t begin = segment * kSegment, end = begin + kSegment;
    if (params.keys[begin] != params.keys[end - 1]) return;
    float sum[kCount] = {};
    add_positions<T>(params, begin, end, column, sum);
    store<float>(params.partial + int64_t(segment) * params.width + column, sum);
}

// One thread for kCount columns of a row of dweight.
template <typename T, int kCount>
__device__ __forceinline__ void embedding_rows(const EmbeddingSumParams& params) {
    const uint32_t columns = params.width / kCount, item = blockIdx.x * kEmbeddingThreads + threadIdx.x;
    const uint32_t row = item / columns, column = item % columns * kCount;
    if (row >= params.rows) return;
    const uint2 run = params.runs[row];
    const uint32_t first_segment = (run.x + kSegment - 1) / kSegment, end_segment = run.y / kSegment;
    const bool whole = first_segment < end_segment;
    float sum[kCount] = {};
    add_positions<T>(params, run.x, whole ? first_segment * kSegment : run.y, column, sum);
    if (whole) {
        for (uint32_t segment = first_segment; segment < end_segment; ++segment) {
            float partial[kCount];
            load<float>(partial, params.partial + int64_t(segment) * params.width + column);
#pragma unroll
            for (int j = 0; j < kCount; ++j) sum[j] += partial[j];
        }
        add_positions<T>(params, end_segment * kSegment, run.y, column, sum);
    }
    store<T>(static_cast<T*>(params.dweight) + int64_t(row) * params.width + column, sum);
}

}  // namespace fused_ops
