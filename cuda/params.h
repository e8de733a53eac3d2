// The parameters of every kernel, and the numbers that kernels share with the host. Strides are in elements. crates/kernel-build parses
// this file, one field on a line. It generates the same structs and numbers in Rust, with these comments, and assertions on the layout for
// both compilers.
#pragma once

#include <cstdint>

namespace fa2 {

constexpr int kWarpSize = 32;      // threads of a warp
constexpr int kDqGroupRows = 8;    // queries of a row group of dq_accum (core/dq_accum.cuh)
constexpr int kConvertCols = 32;   // columns of a row group that a warp of the conversion takes
constexpr int kDeltaChunk = 8;     // elements of one access of a thread of delta: 16 bytes, or 32 of f32
constexpr int kDeltaMinLanes = 4;  // fewest threads of a row of delta: as many as read a row of head_dim 32
constexpr int kMaxWidth = 256;     // columns of o, dq, dk or dv of a thread block; more do not fit the registers of its warps

// Distances from one sequence, token or head to the next. The last axis has stride 1. Rows begin at multiples of 16 bytes.
struct Strides {
    int64_t batch;  // 0 for packed tensors
    int64_t row;
    int64_t head;
};

// The sequences of one call, their mask and the options of the scores. Every kernel gets it.
struct Shape {
    const uint32_t* cu_seqlens_q;  // (batch + 1), or null: padded
    const uint32_t* cu_seqlens_k;  // (batch + 1), or null: padded
    const uint32_t* key_lengths;   // (batch): number of valid keys of each padded sequence; or null: all are valid
    const float* alibi_slopes;     // (num_heads) or (batch, num_heads), or null
    int64_t lse_batch;             // stride of lse and delta, 0 for packed
    int64_t lse_head;              // stride of lse and delta
    int32_t alibi_batch;           // stride of the slopes, 0 for one per head
    int32_t batch;
    int32_t first_batch;  // the sequence of blockIdx.z 0; a grid holds at most 65,535 sequences
    int32_t keys_at_end;  // 1: the valid keys are the last ones; 0: the first
    int32_t seqlen_q;  // the longest, if packed
    int32_t seqlen_k;  // the longest, if packed
    int32_t num_heads;
    int32_t num_heads_k;
    int32_t head_dim;       // of q and k: rows of whole 16 bytes, at most the kernel's kHeadDim
    int32_t head_dim_v;     // of v and o, by the same rules
    int32_t window_left;    // keys before the aligned one that are visible
    int32_t window_right;   // keys after the aligned one that are visible
    float softmax_scale_log2;          // softmax_scale * log2 e
    float softcap_log2;                // softcap * log2 e, or 0: no softcap
    float softmax_scale_over_softcap;  // softmax_scale / softcap; not read without a softcap
};

struct FwdParams {
    const void* q;  // (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
    const void* k;  // (batch, seqlen_k, num_heads_k, head_dim) or (total_k, num_heads_k, head_dim)
    const void* v;  // as k, with head_dim_v
    void* o;        // as q, with head_dim_v; f32 if `o_is_f32`
    float* lse;     // (batch, num_heads, seqlen_q) or (num_heads, total_q)
    Strides q_strides;
    Strides k_strides;
    Strides v_strides;
    Strides o_strides;
    Shape shape;
    int32_t o_is_f32;  // 1: o is f32; 0: o has the type of q
};

// A CUtensorMap: 128 bytes that the driver encodes and TMA reads.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// The order in which the blocks of a persistent kernel take work tiles. A work tile is a block of queries (forward) or of keys (backward)
// of one head of one sequence. Tiles are numbered by section, then by block along the sequence, then by head.
struct Schedule {
    uint32_t* counters;     // the next tile, and finished blocks; both 0 between launches. null (forward only): block i takes tile i
    int32_t tiles;          // head_tiles * heads; a padded call counts the heads of all sequences, a packed call those of one
    // Tiles of one head. Padded: of one sequence. Packed: of all sequences, total / block + batch; some of these are empty.
    int32_t head_tiles;
    int32_t section_heads;  // heads whose tiles are taken together, so that what they read and write stays in L2
};

// The host chooses section_heads by the next three numbers. No kernel reads them.

// Tiles of a section for each thread block of a forward with a mask, where tiles differ in cost: many heads together balance the load. On
// an H200 with 2 to 32 heads and 512 to 16k keys, four were fastest. The causal cases of the bench's part `grid` show whether a change is
// faster.
constexpr int kForwardSection = 4;

// The same for each block, or cluster, of a backward, with any mask. There, each head more also adds its dq_accum to what should stay in
// L2: with four, head_dim 128 and 256 lost 2 to 3% on an H200.
constexpr int kBackwardSection = 1;

// Heads of a section at most, because of L2: on an H200, sections of 132 heads with 512 tokens took 20% longer. Numbers between them were
// not measured.
constexpr int kMaxSectionHeads = 32;

// The forward of sm90. The tensor maps are (head_dim, rows, heads, batch). A box has 64 columns, or 32 if kHeadDim is not a multiple of 64.
struct Sm90FwdParams {
    TensorMap q;  // boxes of block_m rows
    TensorMap k;  // boxes of block_n rows
    TensorMap v;  // as k
    FwdParams fwd;
    Schedule schedule;
};

// delta = rowsum(do * o) - dlse; runs before the main kernel.
struct DeltaParams {
    const void* o;      // contiguous, as q with head_dim_v
    const void* do_;    // as o, with any strides
    const float* dlse;  // as lse, or null
    float* delta;       // as lse
    Strides o_strides;
    Strides do_strides;
    Shape shape;
};

// How blocks of a fixed number of queries are numbered, over all heads and sequences. Each head of each sequence has blocks of its own.
// Strides are in blocks.
struct RowBlocks {
    int64_t batch;  // 0 for packed tensors
    int64_t head;
    int64_t count;  // number of blocks
};

struct BwdParams {
    const void* q;       // (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
    const void* k;       // (batch, seqlen_k, num_heads_k, head_dim) or (total_k, num_heads_k, head_dim)
    const void* v;       // as k, with head_dim_v
    const void* do_;     // as q, with head_dim_v
    const float* lse;    // (batch, num_heads, seqlen_q) or (num_heads, total_q)
    const float* delta;  // as lse
    float* dq_accum;     // (dq_groups.count, 8, kHeadDim), zeros at the start; core/dq_accum.cuh has the layout
    uint32_t* semaphores;  // (dq_tiles.count * kParts + 1) zeros: blocks add to a tile in one order; the last counts blocks. null: no order
    void* dk;            // as k
    void* dv;            // as v
    Strides q_strides;
    Strides k_strides;
    Strides v_strides;
    Strides do_strides;
    Strides dk_strides;
    Strides dv_strides;
    RowBlocks dq_groups;  // of dq_accum: 8 rows each
    RowBlocks dq_tiles;   // of the semaphores: block_m rows each
    Shape shape;
    float softmax_scale;  // of dk; the conversion applies it to dq
};

// The backward of sm90. The tensor maps are as in the forward, but a box has 64 columns only if kHeadDim / cluster is a multiple of 64,
// otherwise 32.
struct Sm90BwdParams {
    TensorMap q;    // boxes of block_m rows
    TensorMap k;    // boxes of block_n rows
    TensorMap v;    // as k
    TensorMap do_;  // as q
    BwdParams bwd;  // the kernel does not read its q, k, v and do_, nor their strides
    Schedule schedule;  // of blocks of keys; a cluster takes a tile together
};

// dq = softmax_scale * dq_accum, rounded; runs after the main kernel.
struct ConvertParams {
    const float* dq_accum;  // as in BwdParams
    void* dq;  // as q
    Strides dq_strides;
    RowBlocks dq_groups;  // as in BwdParams
    Shape shape;
    int32_t dq_accum_head_dim;  // kHeadDim of the backward
    float softmax_scale;
};

}  // namespace fa2
