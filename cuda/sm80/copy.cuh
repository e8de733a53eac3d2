// cp.async (PTX ISA, "Data movement and conversion instructions"): 16 bytes from global to shared memory past L1, or 4 through
// it; the copies of a tile made of them, in and out.
#pragma once

#include "../core/mask.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"

namespace fa2 {

// Copies `bytes` (16, or 0) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Copies 4 bytes, or fills them with zeros.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Puts 0 in the place of every number that is infinite or NaN.
template <typename T>
__device__ __forceinline__ void clear_special(uint4& x) {
    for (uint32_t* pair : {&x.x, &x.y, &x.z, &x.w}) {
        const uint32_t carry = carry_of_special<T>(*pair);
        if (carry & 0x8000u) *pair &= 0xffff0000u;
        if (carry & 0x80000000u) *pair &= 0x0000ffffu;
    }
}

// Copies tiles of one tensor into one buffer, all threads together. What a thread needs to know is worked out once: it
// always copies the same columns, and its rows lie a fixed number apart, so that a step costs one add and one compare.
template <typename Tile, int kThreads, typename T>
struct TileCopy {
    static constexpr int kRowsPerStep = kThreads / Tile::kChunksPerRow;
    static constexpr int kActive = kRowsPerStep * Tile::kChunksPerRow;
    static constexpr int kSteps = ceil_div(Tile::kRows, kRowsPerStep);

    const T* first;       // this thread's chunk of row 0 of the sequence
    int row_stride;       // elements
    int row;              // this thread's first row in a tile
    int chunk;
    bool active;          // false: columns past head_dim become zeros
    bool idle;            // no chunk at all

    __device__ __forceinline__ TileCopy(const T* rows, int64_t row_stride, int head_dim, int thread)
        : row_stride(int(row_stride)), row(thread / Tile::kChunksPerRow), chunk(thread % Tile::kChunksPerRow),
          active(chunk * Tile::kChunk < head_dim), idle(thread >= kActive) {
        // An address that is not read must still be one of the tensor's.
        first = rows + (active ? chunk * Tile::kChunk : 0);
    }

    // Starts the copy of rows first_row .. first_row + kRows. Rows from `seqlen` on become zeros: hidden values then
    // multiply to 0, never to NaN.
    __device__ __forceinline__ void start(uint32_t shared, int first_row, int seqlen) const {
        if (kActive < kThreads && idle) return;
        const T* from = first + int64_t(first_row + row) * row_stride;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int tile_row = row + step * kRowsPerStep;
            if (Tile::kRows % kRowsPerStep == 0 || tile_row < Tile::kRows) {
                const bool valid = active && first_row + tile_row < seqlen;
                cp_async_16(shared + Tile::offset(tile_row, chunk), valid ? from : first, valid ? 16 : 0);
            }
            from += kRowsPerStep * row_stride;
        }
    }

    // The same at once, without what is infinite or NaN.
    __device__ __forceinline__ void copy_finite(uint8_t* tile, int first_row, int seqlen) const {
        if (kActive < kThreads && idle) return;
#pragma unroll 1
        for (int tile_row = row; tile_row < Tile::kRows; tile_row += kRowsPerStep) {
            const bool valid = active && first_row + tile_row < seqlen;
            const T* from = first + int64_t(first_row + tile_row) * row_stride;
            uint4 x = valid ? *reinterpret_cast<const uint4*>(from) : uint4{};
            fa2::clear_special<T>(x);
            *reinterpret_cast<uint4*>(tile + Tile::offset(tile_row, chunk)) = x;
        }
    }

    // Calls `visit` with each 16 bytes that this thread has copied. The copies must have arrived.
    template <typename Visit>
    __device__ __forceinline__ static void visit(uint8_t* tile, int thread, const Visit& visit) {
        if (kActive < kThreads && thread >= kActive) return;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int tile_row = thread / Tile::kChunksPerRow + step * kRowsPerStep;
            if (Tile::kRows % kRowsPerStep == 0 || tile_row < Tile::kRows)
                visit(*reinterpret_cast<uint4*>(tile + Tile::offset(tile_row, thread % Tile::kChunksPerRow)));
        }
    }

    // Whether any number that this thread has copied is infinite or NaN.
    __device__ __forceinline__ static bool special(uint8_t* tile, int thread) {
        uint32_t carry = 0;
        visit(tile, thread, [&](const uint4& x) {
            carry |= carry_of_special<T>(x.x) | carry_of_special<T>(x.y) | carry_of_special<T>(x.z) | carry_of_special<T>(x.w);
        });
        return (carry & 0x80008000u) != 0;
    }

    // Puts 0 in the place of every such number.
    __device__ __forceinline__ static void clear_special(uint8_t* tile, int thread) {
        visit(tile, thread, [](uint4& x) { fa2::clear_special<T>(x); });
    }
};

// Calls `visit` with row and chunk of each of this thread's 16 bytes of a tile, within `rows` rows and head_dim columns.
template <typename Tile, int kThreads, typename Visit>
__device__ __forceinline__ void visit_tile(int rows, int head_dim, int thread, const Visit& visit) {
    for (int index = thread; index < Tile::kRows * Tile::kChunksPerRow; index += kThreads) {
        const int row = index / Tile::kChunksPerRow, chunk = index % Tile::kChunksPerRow;
        if (row < rows && chunk * Tile::kChunk < head_dim) visit(row, chunk);
    }
}

// Adds to the rows of a tile what is infinite or NaN in the rows `ks` of a tensor, where they see them: what
// clear_special() or copy_finite() left out of a product; kSpoil: NaN in its place. Run once, at the end, where no
// accumulators are alive; each thread has the pieces that store_tile() gives it.
template <typename Tile, int kThreads, bool kSpoil, typename T, typename Sees>
__device__ __forceinline__ void add_special(uint8_t* tile, int rows, const T* from, int64_t row_stride, Range ks, int head_dim,
                                            int thread, const Sees& sees) {
    visit_tile<Tile, kThreads>(rows, head_dim, thread, [&](int row, int chunk) {
        uint32_t* to = reinterpret_cast<uint32_t*>(tile + Tile::offset(row, chunk));
        for (int k = ks.begin; k < ks.end; ++k) {
            if (!sees(row, k)) continue;
            const uint32_t* pairs = reinterpret_cast<const uint32_t*>(from + k * row_stride + chunk * Tile::kChunk);
            for (int i = 0; i < Tile::kChunk / 2; ++i) {
                const uint32_t carry = carry_of_special<T>(pairs[i]);
                const float2 x = unpack2<T>(to[i]), y = kSpoil ? float2{NAN, NAN} : unpack2<T>(pairs[i]);
                to[i] = pack2<T>(carry & 0x8000u ? x.x + y.x : x.x, carry & 0x80000000u ? x.y + y.y : x.y);
            }
        }
    });
}

// Writes the first `rows` rows and head_dim columns of a tile to global memory, 16 bytes at a time, all threads together.
template <typename Tile, int kThreads, typename T>
__device__ __forceinline__ void store_tile(T* to, int64_t row_stride, const uint8_t* tile, int rows, int head_dim,
                                           int thread) {
    visit_tile<Tile, kThreads>(rows, head_dim, thread, [&](int row, int chunk) {
        *reinterpret_cast<uint4*>(to + row * row_stride + chunk * Tile::kChunk) =
            *reinterpret_cast<const uint4*>(tile + Tile::offset(row, chunk));
    });
}

}  // namespace fa2
