// Rotary position embedding, out of place or in place. The backward is the forward with the opposite angles.
//
// Work       An item is kPairs pairs of one head: two 16-byte vectors in the order of halves, one in the interleaved order. A thread has
//            a few items. Shapes that do not allow vectors have items of one pair.
// Memory     x is read once and y is written once. The heads of a token share their rows of the tables in the first-level cache.
// Numerics   f32; the tables are f32.
// Expects    for vectors: a head and each of its parts is a multiple of 16 bytes, and x, y and the tables are aligned to 16 bytes.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

template <typename T, bool kInterleaved>
constexpr int kRotaryPairs = kInterleaved ? kVector<T> / 2 : kVector<T>;

// kPairs pairs of a head: a and b of each.
template <typename T, bool kInterleaved, int kPairs>
struct Pairs {
    float a[kPairs], b[kPairs];

    __device__ __forceinline__ void load_from(const T* head, uint32_t first, uint32_t pairs) {
        if constexpr (!kInterleaved) {
            load<T>(a, head + first);
            load<T>(b, head + pairs + first);
        } else if constexpr (kPairs > 1) {
            float both[2 * kPairs];
            load<T>(both, head + 2 * first);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) a[i] = both[2 * i], b[i] = both[2 * i + 1];
        } else {
            a[0] = to_float(head[2 * first]), b[0] = to_float(head[2 * first + 1]);
        }
    }

    __device__ __forceinline__ void rotate(const float (&cos)[kPairs], const float (&sin)[kPairs], float sign) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const float a_before = a[i], s = sign * sin[i];
            a[i] = a_before * cos[i] - b[i] * s;
            b[i] = a_before * s + b[i] * cos[i];
        }
    }

    __device__ __forceinline__ void store_to(T* head, uint32_t first, uint32_t pairs) const {
        if constexpr (!kInterleaved) {
            store<T>(head + first, a);
            store<T>(head + pairs + first, b);
        } else if constexpr (kPairs > 1) {
            float both[2 * kPairs];
#pragma unroll
            for (int i = 0; i < kPairs; ++i) both[2 * i] = a[i], both[2 * i + 1] = b[i];
            store<T>(head + 2 * first, both);
        } else {
            head[2 * first] = from_float<T>(a[0]), head[2 * first + 1] = from_float<T>(b[0]);
        }
    }
};

template <typename T, bool kInterleaved, int kPairs>
__device__ __forceinline__ void rotary(const RotaryParams& params) {
    constexpr int kItems = kInterleaved ? kInterleavedItems : kHalvesItems;
    const T* x = static_cast<const T*>(params.x);
    T* y = static_cast<T*>(params.y);
    const uint32_t items_of_row = params.pairs / kPairs, items = params.rows * items_of_row;
    const uint32_t start = blockIdx.x * kItems * kRotaryThreads + threadIdx.x;

    if (items > 0) {
        Pairs<T, kInterleaved, kPairs> pairs[kItems];
        float cos[kItems][kPairs], sin[kItems][kPairs];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            // Past the end, the last item again: a load without a branch can be queued with the others.
            const uint32_t item = min(start + i * kRotaryThreads, items - 1);
            const uint32_t row = item / items_of_row, first = item % items_of_row * kPairs;
            pairs[i].load_from(x + int64_t(row) * params.head_dim, first, params.pairs);
            const int64_t angle = int64_t(row / params.num_heads % params.seqlen) * params.pairs + first;
            load<float>(cos[i], params.cos + angle);
            load<float>(sin[i], params.sin + angle);
        }
        // In place: a block reads only what its own threads write, and each thread has loaded its items. The items past the end are
        // loaded twice, but not used.
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const uint32_t item = start + i * kRotaryThreads;
            if (item >= items) break;
            const uint32_t row = item / items_of_row, first = item % items_of_row * kPairs;
            pairs[i].rotate(cos[i], sin[i], params.sign);
            pairs[i].store_to(y + int64_t(row) * params.head_dim, first, params.pairs);
        }
    }

    // The values of a head that do not rotate.
    constexpr int kCount = kPairs > 1 ? kVector<T> : 1;
    const uint32_t rest_of_row = (params.head_dim - 2 * params.pairs) / kCount;
    if (rest_of_row == 0 || x == y) return;
    for (uint32_t item = blockIdx.x * kRotaryThreads + threadIdx.x; item < params.rows * rest_of_row; item += gridDim.x * kRotaryThreads) {
        const int64_t at = int64_t(item / rest_of_row) * params.head_dim + 2 * params.pairs + item % rest_of_row * kCount;
        float values[kCount];
        load<T>(values, x + at);
        store<T>(y + at, values);
    }
}

}  // namespace fused_ops
