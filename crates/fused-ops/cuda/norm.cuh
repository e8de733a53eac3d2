// Layer norm and RMS norm, forward and backward.
//
// Work       kWarps warps have one row, which stays in registers. A thread has kPerThread elements of it: every kWarps-th vector of a
//            warp. The forward has a row per group of warps. In the backward, one block per multiprocessor loops over the rows.
// Memory     Each tensor is read or written once: 2 row tensors in the forward, 4 with a residual; 3 in the backward, 4 with another
//            gradient. Accesses have 16 bytes; for rows that are not aligned to 16 bytes they have one element, with the same code.
// Latency    The forward has some 40 KB of loads in flight per multiprocessor. In the backward of 16-bit types, the next kNormStages rows
//            of a thread are on their way to shared memory, 64 to 72 KB. Each thread copies what it will read itself, so no barrier is
//            needed. f32 and rows that are not aligned have no such stages; f32 has twice the bytes for each row.
// Numerics   f32 throughout. The variance is the mean of (x - mean)^2, from registers. As src/norm.rs.
// Backward   A thread keeps its sums of dweight and dbias in registers. At the end the block adds the sums of its groups in order, and
//            writes one partial sum. `norm_finish` adds the blocks in order. So the bits depend on the shape and the grid alone.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

// How the threads of a block share rows. kElements: elements of an access to memory.
template <typename T_, int kWarps_, int kElements_, int kPerThread_>
struct Rows {
    using T = T_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kElements = kElements_;
    static constexpr int kVectors = kPerThread_ / kElements;
    // The backward needs about 5 registers per element and 35 more. 16 warps with 16 elements, 12 with 24, or 8 with 32 fill the registers.
    static constexpr int kThreads = kPerThread_ == kNormLeastElements  ? kNormMostThreads
                                    : kPerThread_ == kNormLessElements ? kNormMoreThreads
                                                                       : kNormThreads;
    // In the backward: whether rows come through shared memory, and params.other is added. As Sharing::staged in src/cuda/norm.rs.
    static constexpr bool kStaged = sizeof(T) == 2 && kElements == kVector<T>;
    static constexpr int kGroups = kThreads / (kWarps * kWarpSize);  // rows that a block has at once
    static_assert(kThreads % (kWarps * kWarpSize) == 0 && kPerThread_ % kElements == 0);

    // The vectors of a row that a thread has. They are packed, and widened at each use: registers decide how many rows a multiprocessor
    // loads at once.
    using Part = Vector<T, kElements>[kVectors];

    int group = threadIdx.x / (kWarps * kWarpSize);
    int thread = threadIdx.x % (kWarps * kWarpSize);

    // where vector i of this thread begins
    __device__ int column(int i) const { return (i * kWarps * kWarpSize + thread) * kElements; }
};

// Loads this thread's part of the row that begins at `start`. Vectors past the row are 0.
template <typename Rows>
__device__ __forceinline__ void load_part(
    const Rows& rows, typename Rows::Part& to, const void* from, int64_t start, int width) {
    using T = typename Rows::T;
#pragma unroll
    for (int i = 0; i < Rows::kVectors; ++i) {
        const int column = rows.column(i);
        to[i] = {};
        if (column < width) to[i] = load_vector<T, Rows::kElements>(static_cast<const T*>(from) + start + column);
    }
}

// Replaces x by x + residual, and writes the sum.
template <typename Rows>
__device__ __forceinline__ void add_residual(
    const Rows& rows, const NormForwardParams& params, typename Rows::Part& x, const typename Rows::Part& residual, int64_t start,
    int width) {
    using T = typename Rows::T;
#pragma unroll
    for (int i = 0; i < Rows::kVectors; ++i) {
        float wide[Rows::kElements];
        widen(wide, x[i]);
        add_to(wide, residual[i]);
        x[i] = narrow<T>(wide);  // the norm is that of the rounded sum
        if (rows.column(i) < width) store_vector(static_cast<T*>(params.sum) + start + rows.column(i), x[i]);
    }
}

// The mean of a row, in all of its threads. `scratch`: (kWarps).
template <typename Rows>
__device__ __forceinline__ float row_mean(const Rows& rows, const typename Rows::Part& x, int width, float* scratch) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Rows::kVectors; ++i) {
        float numbers[Rows::kElements];
        widen(numbers, x[i]);
#pragma unroll
        for (int j = 0; j < Rows::kElements; ++j) sum += numbers[j];
    }
    return combined<Rows::kWarps>(sum, scratch, rows.group, Add()) / width;
}

// The mean of (x - mean)^2, likewise.
template <typename Rows>
__device__ __forceinline__ float row_variance(
    const Rows& rows, const typename Rows::Part& x, float mean, int width, float* scratch) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < Rows::kVectors; ++i) {
        if (rows.column(i) >= width) continue;
        float numbers[Rows::kElements];
        widen(numbers, x[i]);
#pragma unroll
        for (int j = 0; j < Rows::kElements; ++j) squares += (numbers[j] - mean) * (numbers[j] - mean);
    }
    return combined<Rows::kWarps>(squares, scratch, rows.group, Add()) / width;
}

// y = (x - mean) rstd weight + bias
template <typename Rows>
__device__ __forceinline__ void write_row(
    const Rows& rows, const NormForwardParams& params, const typename Rows::Part& x, const typename Rows::Part& weight,
    float2 statistics, int64_t start, int width) {
    using T = typename Rows::T;
    const float mean = statistics.x, rstd = statistics.y;
#pragma unroll
    for (int i = 0; i < Rows::kVectors; ++i) {
        const int column = rows.column(i);
        if (column >= width) continue;
        float y[Rows::kElements], factor[Rows::kElements], bias[Rows::kElements] = {};
        widen(y, x[i]);
        widen(factor, weight[i]);
        if (params.bias != nullptr) load(bias, static_cast<const T*>(params.bias) + column);
#pragma unroll
        for (int j = 0; j < Rows::kElements; ++j) y[j] = (y[j] - mean) * rstd * factor[j] + bias[j];
        store(static_cast<T*>(params.y) + start + column, y);
    }
}

template <typename Rows>
__device__ __forceinline__ void norm_forward(const NormForwardParams& params) {
    __shared__ float scratch[2][Rows::kGroups][Rows::kWarps];
    const Rows rows;
    const int width = params.width;
    const int64_t row = int64_t(blockIdx.x) * Rows::kGroups + rows.group;
    if (row >= params.rows) return;
    const int64_t start = row * width;

    typename Rows::Part x, weight;
    load_part(rows, x, params.x, start, width);
    load_part(rows, weight, params.weight, 0, width);
    if (params.residual != nullptr) {
        typename Rows::Part residual;
        load_part(rows, residual, params.residual, start, width);
        add_residual(rows, params, x, residual, start, width);
    }
    const float mean = params.centre ? row_mean(rows, x, width, scratch[0][rows.group]) : 0.f;
    const float variance = row_variance(rows, x, mean, width, scratch[1][rows.group]);
    const float2 statistics = make_float2(mean, rsqrtf(variance + params.eps));
    write_row(rows, params, x, weight, statistics, start, width);
    if (rows.thread == 0) params.statistics[row] = statistics;
}

// Puts the sums of a thread into shared memory. `groups`: (kGroups, width).
template <typename Rows>
__device__ __forceinline__ void put_sums(
    const Rows& rows, const float (&sums)[Rows::kVectors][Rows::kElements], float* groups, int width) {
#pragma unroll
    for (int i = 0; i < Rows::kVectors; ++i) {
        const int column = rows.column(i);
        if (column >= width) continue;
#pragma unroll
        for (int j = 0; j < Rows::kElements; ++j) groups[rows.group * width + column + j] = sums[i][j];
    }
}

// Adds the sums of the groups of a block in order, and writes the result.
template <typename Rows>
__device__ __forceinline__ void write_block_sum(const float* groups, float* to, int width) {
    for (int column = threadIdx.x; column < width; column += Rows::kThreads) {
        float sum = groups[column];
#pragma unroll
        for (int group = 1; group < Rows::kGroups; ++group) sum += groups[group * width + column];
        to[column] = sum;
    }
}

// The rows of x and dy on their way to a thread, through shared memory: (kNormStages, 2, kVectors, kThreads) vectors.
template <typename Rows>
struct Stages {
    using T = typename Rows::T;

    const Rows& rows;
    const NormBackwardParams& params;
    const uint8_t* shared;
    int stage = 0;

    __device__ const uint8_t* slot(int tensor, int i) const {
        return shared + (((stage * 2 + tensor) * Rows::kVectors + i) * Rows::kThreads + threadIdx.x) * 16;
    }

    // Starts the copies of `row` to the current stage, and goes to the next one.
    __device__ __forceinline__ void start(int64_t row) {
        const bool exists = row < params.rows;
#pragma unroll
        for (int i = 0; i < Rows::kVectors; ++i) {
            const int column = rows.column(i);
            const bool copied = exists && column < params.width;
            const int64_t at = copied ? row * params.width + column : 0;
            copy_async(shared_address(slot(0, i)), static_cast<const T*>(params.x) + at, copied);
            copy_async(shared_address(slot(1, i)), static_cast<const T*>(params.dy) + at, copied);
        }
        copy_commit();
        stage = (stage + 1) % kNormStages;
    }

    // Waits for the oldest row, which is in the current stage.
    __device__ __forceinline__ void take(typename Rows::Part& x, typename Rows::Part& dy) {
        copy_wait<kNormStages - 1>();
#pragma unroll
        for (int i = 0; i < Rows::kVectors; ++i) {
            x[i] = *reinterpret_cast<const Vector<T>*>(slot(0, i));
            dy[i] = *reinterpret_cast<const Vector<T>*>(slot(1, i));
        }
    }
};

// dx of each row, and this block's partial sums of dweight and dbias. Dynamic shared memory: first Stages, then in the same place
// (2, kGroups, width) floats.
template <typename Rows>
__device__ __forceinline__ void norm_backward(const NormBackwardParams& params) {
    using T = typename Rows::T;
    constexpr int kVectors = Rows::kVectors, kElements = Rows::kElements, kWarps = Rows::kWarps;
    __shared__ float2 scratch[2][Rows::kGroups][kWarps];
    extern __shared__ float4 shared[];
    float* groups = reinterpret_cast<float*>(shared);
    const Rows rows;
    const int width = params.width;

    float dweight[kVectors][kElements] = {}, dbias[kVectors][kElements] = {};
    typename Rows::Part x, dy, other;
    float2 statistics;
    auto fetch = [&](int64_t row) {
        if (row >= params.rows) return;
        if constexpr (!Rows::kStaged) {
            load_part(rows, x, params.x, row * width, width);
            load_part(rows, dy, params.dy, row * width, width);
        }
        statistics = params.statistics[row];
    };
    const int64_t stride = int64_t(gridDim.x) * Rows::kGroups;
    int64_t row = int64_t(blockIdx.x) * Rows::kGroups + rows.group;
    Stages<Rows> stages{rows, params, reinterpret_cast<const uint8_t*>(shared)};
    if constexpr (Rows::kStaged) {
        for (int i = 0; i < kNormStages; ++i) stages.start(row + i * stride);
    }
    fetch(row);
    for (int parity = 0; row < params.rows; row += stride, parity ^= 1) {
        if constexpr (Rows::kStaged) {
            stages.take(x, dy);
            stages.start(row + kNormStages * stride);
            if (params.other != nullptr) load_part(rows, other, params.other, row * width, width);
        }
        float xhat[kVectors][kElements], g[kVectors][kElements];
        float2 sums = make_float2(0.f, 0.f);  // of g, and of g xhat
        const float mean = statistics.x, rstd = statistics.y;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int column = rows.column(i);
            widen(xhat[i], x[i]);
            widen(g[i], dy[i]);  // 0 past the row, where it makes all terms 0
            float weight[kElements] = {};
            if (column < width) load(weight, static_cast<const T*>(params.weight) + column);
#pragma unroll
            for (int j = 0; j < kElements; ++j) {
                xhat[i][j] = (xhat[i][j] - mean) * rstd;
                dbias[i][j] += g[i][j];
                dweight[i][j] += g[i][j] * xhat[i][j];
                g[i][j] *= weight[j];
                sums.x += g[i][j];
                sums.y += g[i][j] * xhat[i][j];
            }
        }
        if constexpr (sizeof(T) == 2) fetch(row + stride);
        sums = combined<kWarps>(sums, scratch[parity][rows.group], rows.group, Add());
        const float g_mean = params.centre ? sums.x / width : 0.f, g_xhat_mean = sums.y / width;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int column = rows.column(i);
            if (column >= width) continue;
#pragma unroll
            for (int j = 0; j < kElements; ++j) g[i][j] = rstd * (g[i][j] - g_mean - xhat[i][j] * g_xhat_mean);
            if (Rows::kStaged && params.other != nullptr) add_to(g[i], other[i]);
            store(static_cast<T*>(params.dx) + row * width + column, g[i]);
        }
        if constexpr (sizeof(T) == 4) fetch(row + stride);  // no registers are left for it before
    }

    if constexpr (Rows::kStaged) {
        copy_wait<0>();
        __syncthreads();  // the sums take the place of the stages
    }
    const int64_t partial = int64_t(blockIdx.x) * width;
    const bool has_bias = params.partial_dbias != nullptr;
    float* groups_of_bias = groups + Rows::kGroups * width;
    put_sums(rows, dweight, groups, width);
    if (has_bias) put_sums(rows, dbias, groups_of_bias, width);
    __syncthreads();
    write_block_sum<Rows>(groups, params.partial_dweight + partial, width);
    if (has_bias) write_block_sum<Rows>(groups_of_bias, params.partial_dbias + partial, width);
}

// dweight and dbias from their partial sums. Grid: (width / kFinishColumns, rounded up; 1, or 2 if there is a bias).
template <typename T>
__device__ __forceinline__ void norm_finish(const NormFinishParams& params) {
    static_assert(kFinishColumns == kWarpSize);
    __shared__ float parts[kFinishParts][kFinishColumns];
    const float* partial = blockIdx.y == 0 ? params.partial_dweight : params.partial_dbias;
    void* to = blockIdx.y == 0 ? params.dweight : params.dbias;
    const int lane = threadIdx.x % kFinishColumns, part = threadIdx.x / kFinishColumns;
    const int column = blockIdx.x * kFinishColumns + lane;
    const int share = (params.blocks + kFinishParts - 1) / kFinishParts;
    const int end = min((part + 1) * share, params.blocks);
    float sum = 0.f;
    if (column < params.width) {
#pragma unroll 8
        for (int block = part * share; block < end; ++block) sum += partial[int64_t(block) * params.width + column];
    }
    parts[part][lane] = sum;
    __syncthreads();
    if (part != 0 || column >= params.width) return;
#pragma unroll
    for (int other = 1; other < kFinishParts; ++other) sum += parts[other][lane];
    static_cast<T*>(to)[column] = from_float<T>(sum);
}

}  // namespace fused_ops
