// Layer norm and RMS norm, forward and backward.
//
// Work       kWarps warps have one row, which stays in registers: 32 elements per thread, so width <= 1024 kWarps. A block has 8
//            warps, and so one row or several. 16 warps per row would leave a thread 128 registers, and the backward spills there.
// Memory     Each tensor is read or written once, in 16-byte accesses: 2 row tensors in the forward, 3 in the backward.
// Numerics   f32 throughout. The variance is the mean of (x - mean)^2, from registers. As src/norm.rs.
// Registers  The backward needs about 163: xhat, g and both sums have 32 each. So an SM has one block, with 32 KB of loads in flight.
// Backward   A block loops over rows and keeps its sums of dweight and dbias in registers. It adds its row groups in order through
//            shared memory, and writes one partial sum. `norm_finish` adds the blocks in order. So the bits depend on the grid only.
// Expects    width a multiple of kVector<T>, rows aligned to 16 bytes.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

constexpr int kNormThreads = 256;
constexpr int kPerThread = 32;  // elements of a row in the registers of a thread

// The part of a row that a thread has: vector i begins at column `column(i)`.
template <typename T, int kWarps>
struct RowPart {
    static constexpr int kVectors = kPerThread / kVector<T>;
    int thread = threadIdx.x % (kWarps * kWarpSize);

    __device__ int column(int i) const { return (i * kWarps * kWarpSize + thread) * kVector<T>; }
};

template <typename T, int kWarps>
__device__ __forceinline__ void norm_forward(const NormForwardParams& params) {
    constexpr int kRows = kNormThreads / (kWarps * kWarpSize);  // of a block
    __shared__ float scratch[kRows][kWarps];
    const RowPart<T, kWarps> part;
    constexpr int kVectors = RowPart<T, kWarps>::kVectors;
    const int group = threadIdx.x / (kWarps * kWarpSize);
    const int64_t row = int64_t(blockIdx.x) * kRows + group;
    const bool valid = row < params.rows;  // all threads must reach the barriers
    const int width = params.width;
    const int64_t start = row * width;

    float x[kVectors][kVector<T>];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = part.column(i);
        if (!valid || column >= width) continue;
        load<T>(x[i], static_cast<const T*>(params.x) + start + column);
        if (params.residual != nullptr) {
            float residual[kVector<T>];
            load<T>(residual, static_cast<const T*>(params.residual) + start + column);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) x[i][j] = to_float(from_float<T>(x[i][j] + residual[j]));
            store<T>(static_cast<T*>(params.sum) + start + column, x[i]);
        }
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) sum += x[i][j];
    }
    // The same for all threads, so the barriers inside `combined` are reached together.
    const float mean = params.centre ? combined<kWarps>(sum, scratch[group], Add()) / width : 0.f;

    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (!valid || part.column(i) >= width) continue;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) squares += (x[i][j] - mean) * (x[i][j] - mean);
    }
    const float rstd = rsqrtf(combined<kWarps>(squares, scratch[group], Add()) / width + params.eps);

#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = part.column(i);
        if (!valid || column >= width) continue;
        float weight[kVector<T>], bias[kVector<T>] = {};
        load<T>(weight, static_cast<const T*>(params.weight) + column);
        if (params.bias != nullptr) load<T>(bias, static_cast<const T*>(params.bias) + column);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) x[i][j] = (x[i][j] - mean) * rstd * weight[j] + bias[j];
        store<T>(static_cast<T*>(params.y) + start + column, x[i]);
    }
    if (valid && part.thread == 0 && params.statistics != nullptr) params.statistics[row] = make_float2(mean, rstd);
}

// dx of each row, and this block's partial sums of dweight and dbias. Dynamic shared memory: `width` floats.
template <typename T, int kWarps>
__device__ __forceinline__ void norm_backward(const NormBackwardParams& params) {
    constexpr int kRows = kNormThreads / (kWarps * kWarpSize);
    __shared__ float scratch[kRows][kWarps];
    extern __shared__ float block_sum[];  // (width)
    const RowPart<T, kWarps> part;
    constexpr int kVectors = RowPart<T, kWarps>::kVectors;
    const int group = threadIdx.x / (kWarps * kWarpSize);
    const int width = params.width;

    float dweight[kVectors][kVector<T>] = {}, dbias[kVectors][kVector<T>] = {};
    for (int64_t first = int64_t(blockIdx.x) * kRows; first < params.rows; first += int64_t(gridDim.x) * kRows) {
        const int64_t row = first + group, start = row * width;
        const bool valid = row < params.rows;
        const float2 statistics = valid ? params.statistics[row] : make_float2(0.f, 0.f);
        float xhat[kVectors][kVector<T>], g[kVectors][kVector<T>];
        float g_sum = 0.f, g_xhat_sum = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int column = part.column(i);
            if (!valid || column >= width) continue;
            float weight[kVector<T>];
            load<T>(xhat[i], static_cast<const T*>(params.x) + start + column);
            load<T>(g[i], static_cast<const T*>(params.dy) + start + column);
            load<T>(weight, static_cast<const T*>(params.weight) + column);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) {
                xhat[i][j] = (xhat[i][j] - statistics.x) * statistics.y;
                dbias[i][j] += g[i][j];
                dweight[i][j] += g[i][j] * xhat[i][j];
                g[i][j] *= weight[j];
                g_sum += g[i][j];
                g_xhat_sum += g[i][j] * xhat[i][j];
            }
        }
        const float g_mean = params.centre ? combined<kWarps>(g_sum, scratch[group], Add()) / width : 0.f;
        const float g_xhat_mean = combined<kWarps>(g_xhat_sum, scratch[group], Add()) / width;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int column = part.column(i);
            if (!valid || column >= width) continue;
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) {
                g[i][j] = statistics.y * (g[i][j] - g_mean - xhat[i][j] * g_xhat_mean);
            }
            store<T>(static_cast<T*>(params.dx) + start + column, g[i]);
        }
    }

    // Adds the row groups of the block in order, and writes the sum.
    auto write = [&](const float (&sums)[kVectors][kVector<T>], float* partial) {
        for (int next = 0; next < kRows; ++next) {
            __syncthreads();
            if (group != next) continue;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int column = part.column(i);
                if (column >= width) continue;
#pragma unroll
                for (int j = 0; j < kVector<T>; ++j) {
                    const float before = next == 0 ? 0.f : block_sum[column + j];
                    block_sum[column + j] = before + sums[i][j];
                }
            }
        }
        __syncthreads();
        float* to = partial + int64_t(blockIdx.x) * width;
        for (int column = threadIdx.x; column < width; column += blockDim.x) to[column] = block_sum[column];
    };
    write(dweight, params.partial_dweight);
    if (params.partial_dbias != nullptr) write(dbias, params.partial_dbias);
}

constexpr int kFinishColumns = 32;  // of a block: one per lane
constexpr int kFinishParts = 8;     // warps of a block; each adds an equal share of the partial sums

// Grid: (width / kFinishColumns), rounded up.
template <typename T>
__device__ __forceinline__ void norm_finish(const NormFinishParams& params) {
    __shared__ float parts[kFinishParts][kFinishColumns];
    const int lane = threadIdx.x % kFinishColumns, part = threadIdx.x / kFinishColumns;
    const int column = blockIdx.x * kFinishColumns + lane;
    const int share = (params.blocks + kFinishParts - 1) / kFinishParts;
    const int end = min((part + 1) * share, params.blocks);
    float sum = 0.f;
    if (column < params.width) {
        for (int block = part * share; block < end; ++block) sum += params.partial[int64_t(block) * params.width + column];
    }
    parts[part][lane] = sum;
    __syncthreads();
    if (part != 0 || column >= params.width) return;
#pragma unroll
    for (int other = 1; other < kFinishParts; ++other) sum += parts[other][lane];
    static_cast<T*>(params.sum)[column] = from_float<T>(sum);
}

}  // namespace fused_ops
