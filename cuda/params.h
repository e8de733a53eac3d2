// What the host hands to a kernel. Strides are in elements. crates/kernel-build parses this file, one field on a line, and generates
// the same structs in Rust with these comments, and assertions on their layout for both compilers.
#pragma once

#include <cstdint>

namespace fa2 {

// From one sequence, token or head to the next. The last axis has stride 1; rows begin at multiples of 16 bytes.
struct Strides {
    int64_t batch;  // 0 for packed tensors
    int64_t row;
    int64_t head;
};

// The sequences of one call and what is visible in them: the same for every kernel.
struct Shape {
    const uint32_t* cu_seqlens_q;  // (batch + 1), or null: padded
    const uint32_t* cu_seqlens_k;  // (batch + 1), or null: padded
    const uint32_t* key_lengths;   // (batch): the keys that count of each padded sequence; or null: all
    const float* alibi_slopes;     // (num_heads) or (batch, num_heads), or null
    int64_t lse_batch;             // stride of lse and delta, 0 for packed
    int64_t lse_head;              // stride of lse and delta
    int32_t alibi_batch;           // stride of the slopes, 0 for one per head
    int32_t batch;
    int32_t first_batch;  // the sequence of blockIdx.z 0; a grid holds at most 65,535 sequences
    int32_t keys_at_end;  // 1: the keys that count are the last ones; 0: the first
    int32_t seqlen_q;  // the longest, if packed
    int32_t seqlen_k;  // the longest, if packed
    int32_t num_heads;
    int32_t num_heads_k;
    int32_t head_dim;       // a multiple of 8, at most the kernel's kHeadDim
    int32_t window_left;    // keys before the aligned one that are visible
    int32_t window_right;   // keys after the aligned one that are visible
    float product_factor;   // softmax_scale * log2 e; under a softcap softmax_scale / softcap
    float softcap_log2;     // softcap * log2 e, or 0: none
};

struct FwdParams {
    const void* q;  // (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
    const void* k;  // (batch, seqlen_k, num_heads_k, head_dim) or (total_k, num_heads_k, head_dim)
    const void* v;  // as k
    void* o;        // as q, in f32 if `unrounded`
    float* lse;     // (batch, num_heads, seqlen_q) or (num_heads, total_q)
    Strides q_strides;
    Strides k_strides;
    Strides v_strides;
    Strides o_strides;
    Shape shape;
    int32_t unrounded;  // 1: o is f32; 0: o has the type of q
};

// What the driver encodes for TMA: CUtensorMap, 128 bytes that only it reads.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// How the blocks of a persistent kernel come by their tiles: block_m queries of one head of one sequence each. Tiles are numbered by
// section, in a section by m_block, the last first, and there by head.
struct Schedule {
    uint32_t* counters;     // the next tile, and the blocks that are done; both 0 between launches. null: block i has tile i
    int32_t tiles;          // m_blocks * heads; heads of all sequences if padded, of one if packed
    int32_t m_blocks;       // of a sequence if padded; if packed of all of them at the most: total_q / block_m + batch
    int32_t section_heads;  // heads whose tiles are taken together, so that their keys and values stay in L2
};

// The forward on Hopper's units.
struct HopperFwdParams {
    TensorMap q;  // (head_dim, rows, heads, batch), boxes of 64 columns (32 if kHeadDim is not a multiple of 64) ..
    TensorMap k;  // .. and block_m rows of q, block_n rows of k and v
    TensorMap v;
    FwdParams fwd;
    Schedule schedule;
};

// delta = rowsum(do * o) - dlse; runs before the main kernel.
struct DeltaParams {
    const void* o;      // contiguous, as q
    const void* do_;    // as q
    const float* dlse;  // as lse, or null
    float* delta;       // as lse
    Strides o_strides;
    Strides do_strides;
    Shape shape;
};

// The f32 sums of dq: tiles of block_m x kHeadDim of the backward's kernel. Strides are in tiles.
struct DqTiles {
    int64_t batch;  // 0 for packed tensors
    int64_t head;
    int64_t count;  // of all of them
};

struct BwdParams {
    const void* q;       // (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
    const void* k;       // (batch, seqlen_k, num_heads_k, head_dim) or (total_k, num_heads_k, head_dim)
    const void* v;       // as k
    const void* do_;     // as q
    const float* lse;    // (batch, num_heads, seqlen_q) or (num_heads, total_q)
    const float* delta;  // as lse
    float* dq_sums;      // tiles of f32, zeros at the start
    uint32_t* turns;     // (tiles + 1), zeros at the start: blocks add to dq_sums in one order; or null: in any
    void* dk;            // as k, contiguous
    void* dv;            // as k, contiguous
    Strides q_strides;
    Strides k_strides;
    Strides v_strides;
    Strides do_strides;
    Strides dk_strides;  // of dk and dv
    DqTiles dq_tiles;
    Shape shape;
    float softmax_scale;  // of dk; dq receives it with its conversion
};

// dq = softmax_scale * its sums, rounded; runs after the main kernel.
struct ConvertParams {
    const float* dq_sums;
    void* dq;  // as q, contiguous
    Strides dq_strides;
    DqTiles dq_tiles;
    Shape shape;
    float softmax_scale;
};

}  // namespace fa2
