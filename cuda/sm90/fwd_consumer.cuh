// A consumer warpgroup of the forward: S = q k^T, softmax, o += P v, and the epilogue.
#pragma once

#include "../core/epilogue.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/softmax.cuh"
#include "barrier.cuh"
#include "fwd_block.cuh"
#include "wgmma.cuh"

namespace fa2::sm90 {

template <typename Traits>
struct FwdConsumer : ConsumerThread {
    using T = typename Traits::T;
    using ScoreMod = typename Traits::ScoreMod;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;

    const Sm90FwdParams& params;
    FwdControl<Traits>& control;
    const uint32_t shared;
    Ring<Traits::kKeyStages> k_ring, v_ring;
    Accumulator<1, Traits::kNTiles> s;
    Accumulator<1, Traits::kDTiles> o;
    uint32_t p[Traits::kBlockN / 16][4];
    OnlineSoftmax<1> softmax;
    float rescale[2];  // factors that o still needs after the last softmax
    int current = 0;   // the number of the current work tile, among those of this block

    __device__ __forceinline__ const FwdTile& tile_of(int number) const { return control.tiles[number % Traits::kTileStages]; }
    __device__ __forceinline__ KeySteps& key_steps_of(int number) const {
        return control.key_steps[kWarpgroupWarps * consumer + warp][number % Traits::kKeyStepsStages];
    }
    __device__ __forceinline__ Ring<Traits::kQStages> q_ring_of(int number) const { return {uint32_t(number)}; }
    // The first row of this consumer.
    __device__ __forceinline__ int first_row(const WorkTile& tile) const {
        return tile.block * Traits::kBlockM + kWarpgroupRows * consumer;
    }
    __device__ __forceinline__ float scale_log2() const { return ScoreMod::scale_log2(params.fwd.shape); }

    // Waits for work tile `number`. Returns whether it exists.
    __device__ __forceinline__ bool take(int number) {
        const Ring<Traits::kQStages> q_ring = q_ring_of(number);
        wait_full(control.q_full, q_ring);
        const WorkTile& tile = tile_of(number);
        if (!tile.exists()) return false;
        const Visibility sees(params.fwd.shape, tile.sequence);
        const Range tiles = key_tiles<Traits>(sees, rows_of<Traits>(tile));
        const Range rows = tile_range(first_row(tile), kWarpgroupRows, tile.sequence.seqlen_q);
        KeySteps key_steps;
        key_steps.own = rows.empty() ? Range{tiles.begin, tiles.begin} : key_tiles<Traits>(sees, rows);
        // Rows that see nothing still need row statistics, so they take one fully hidden tile.
        if (!rows.empty() && key_steps.own.empty() && !tiles.empty()) key_steps.own = {tiles.end - 1, tiles.end};
        const Range common = sees.common_keys(rows);
        key_steps.unmasked = {max(ceil_div(common.begin, Traits::kBlockN), key_steps.own.begin), common.end / Traits::kBlockN};
        key_steps.first_unmasked = key_steps.unmasked.contains({key_steps.own.end - 1, key_steps.own.end});
        key_steps.tiles_before = tiles.end - key_steps.own.end;
        key_steps.tiles_after = key_steps.own.begin - tiles.begin;
        __syncwarp();
        if (lane == 0) key_steps_of(number) = key_steps;
        __syncwarp();
        return true;
    }

    // This warp arrives at a barrier: it has read a stage. Its lanes come from a wait for wgmmas or a __syncwarp(), so they are together.
    __device__ __forceinline__ void arrive_together(uint64_t& barrier) const {
        if (lane == 0) mbarrier_arrive(shared_address(&barrier));
    }

    // Starts S = q k^T of work tile `number` with the next k.
    __device__ __forceinline__ void start_scores(int number) {
        wait_full(control.k_full, k_ring);
        const uint32_t tile_q = shared + Traits::sQ + q_ring_of(number).stage() * TileQ::kBytes;
        const Operand<TileQ, Order::kContiguousK> q(tile_q, consumer * kWarpgroupRows);
        const Operand<TileK, Order::kContiguousK> k(shared + Traits::sK + k_ring.stage() * TileK::kBytes);
        start_multiply<T, Traits::kHeadDim / 16>(s, q, k);
    }

    // Starts o += P v with the next v; `fresh`: o = P v.
    __device__ __forceinline__ void start_output(bool fresh) {
        wait_full(control.v_full, v_ring);
        const Operand<TileK, Order::kTransposed> v(shared + Traits::sV + v_ring.stage() * TileK::kBytes);
        start_multiply_add<T>(o, p, v, fresh);
    }

    template <int kPending>
    __device__ __forceinline__ void scores_arrived() {
        wgmma_wait<kPending>();
        wgmma_arrived(s);
        arrive_together(control.k_empty[k_ring.stage()]);
        k_ring.advance();
    }

    template <int kPending = 0>
    __device__ __forceinline__ void output_arrived() {
        wgmma_wait<kPending>();
        wgmma_arrived(o);
        arrive_together(control.v_empty[v_ring.stage()]);
        v_ring.advance();
    }

    // Applies the score_mod to S of key tile n_block, and hides what a row does not see.
    template <bool kMasked>
    __device__ __forceinline__ void score_and_mask(int number, int n_block) {
        if (!kMasked && ScoreMod::kIdentity) return;
        const WorkTile& tile = tile_of(opaque(number));
        const Visibility sees(params.fwd.shape, tile.sequence);
        const ScoreMod score_mod(params.fwd.shape, tile.sequence, tile.head);
        const int lane = opaque(this->lane);
        const int row = first_row(tile) + kWarpRows * warp + fragment_row(lane, 0);
        const int col = n_block * Traits::kBlockN + fragment_col(lane, 0);
        apply_and_hide<kMasked>(score_mod, s, sees, row, col);
    }

    __device__ __forceinline__ void round_p() {
#pragma unroll
        for (int step = 0; step < Traits::kBlockN / 16; ++step) to_a_operand<T>(p[step], s.x[0], step);
    }

    // Rescales the rows of o whose maximum has grown.
    __device__ __forceinline__ void rescale_output() {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (__any_sync(~0u, rescale[half] != 1.f)) softmax.rescale(o, 0, half, rescale[half]);
    }

    // One step of the main loop: S of key tile n_block becomes P, while o += P v of the previous step runs. `fresh`: o starts with this
    // product.
    template <bool kMasked>
    __device__ __forceinline__ void step(int n_block, bool fresh) {
        start_scores(current);
        if (Traits::kLateRescale) rescale_output();
        start_output(fresh);
        scores_arrived<1>();
        score_and_mask<kMasked>(current, n_block);
        float new_max[2];
        if (softmax.all_nonnegative(0)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) new_max[half] = softmax.max_of_nonnegative(s, 0, half);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) new_max[half] = softmax.max_of(s, 0, half);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) rescale[half] = softmax.raise_max(0, half, quad_max(new_max[half]), scale_log2());
        softmax.exponentiate(s, 0, 0, scale_log2(), rescale[0]);
        if (Traits::kMidWait) {
            hold();
            output_arrived();
        }
        softmax.exponentiate(s, 0, 1, scale_log2(), rescale[1]);
        if (!Traits::kMidWait) output_arrived();
        round_p();
        if (!Traits::kLateRescale) rescale_output();
    }

    // This branch is never taken, but ptxas cannot prove it. Without it, ptxas moves the wait for o ahead of the softmax and the overlap is
    // lost (1 to 5% from head_dim 96 on, H200, docs/log/hopper.md). No wgmma and no wait for one may stand in such a branch: all four
    // warps of a warpgroup must reach them.
    __device__ __forceinline__ void hold() {
        float& sum = softmax.row_sum[0][0];
        if (__any_sync(~0u, sum < 0.f)) {
            __syncwarp();
            sum = __shfl_sync(~0u, sum, 0);
        }
    }

    // All steps of a work tile after the first. Returns whether there were none, so that o has no product yet.
    __device__ __forceinline__ bool steps() {
        const KeySteps& key_steps = key_steps_of(opaque(current));
        bool fresh = true;
        for (int n_block = key_steps.own.end - 2; n_block >= key_steps.own.begin;) {
            const int first_unmasked = n_block < key_steps.unmasked.end ? key_steps.unmasked.begin : n_block + 1;
            for (; n_block >= first_unmasked; --n_block, fresh = false) step<false>(n_block, fresh);
            if (n_block >= key_steps.own.begin) step<true>(n_block--, fresh), fresh = false;
        }
        if (Traits::kLateRescale) rescale_output();
        return fresh;
    }

    // Waits for the first S of work tile `number` and computes its softmax.
    __device__ __forceinline__ void first_softmax(int number) {
        scores_arrived<0>();
        const KeySteps& key_steps = key_steps_of(number);
        if (key_steps.first_unmasked) {
            score_and_mask<false>(number, key_steps.own.end - 1);
        } else {
            score_and_mask<true>(number, key_steps.own.end - 1);
        }
        softmax.clear();
        rescale[0] = rescale[1] = 1.f;
        softmax.step_row(s, 0, 0, scale_log2());
        softmax.step_row(s, 0, 1, scale_log2());
        round_p();
    }

    // Skips a stage of k, or of v: a key tile that is fully masked for this consumer's rows.
    __device__ __forceinline__ void skip(uint64_t* full, uint64_t* empty, Ring<Traits::kKeyStages>& ring) {
        wait_full(full, ring);
        arrive_warp(empty[ring.stage()], lane);  // every lane has seen this phase end
        ring.advance();
    }
    __device__ __forceinline__ void skip_k(int count) {
        for (; count > 0; --count) skip(control.k_full, control.k_empty, k_ring);
    }
    __device__ __forceinline__ void skip_v(int count) {
        for (; count > 0; --count) skip(control.v_full, control.v_empty, v_ring);
    }

    // Skips k and v, in the order in which the producer loads them. No product may be running.
    __device__ __forceinline__ void skip_keys(int count) {
        for (int i = 0; i < count; ++i) {
            skip_k(1);
            skip_v(1);
        }
    }

    // Divides o by the row sums and writes this warp's rows of a work tile.
    __device__ __forceinline__ void write(const FwdTile& tile, OnlineSoftmax<1>& statistics) {
        const int lane = opaque(this->lane);
        if (__any_sync(~0u, !o.finite()) && lane == 0) atomicOr(&control.nonfinite[tile.number / 32], 1u << tile.number % 32);
        const int row = first_row(tile) + kWarpRows * warp;
        const int lead = lead_of_v<Traits>(params.fwd, key_head(params.fwd.shape, tile.head));
        write_rows<T, true>(params.fwd, tile.sequence, tile.head, row, lane, o, statistics, scale_log2(), -lead);
    }

    // Writes o = 0 and lse = -inf for rows that see nothing.
    __device__ __forceinline__ void write_nothing_seen(const FwdTile& tile) {
        o.clear();
        OnlineSoftmax<1> nothing;
        nothing.clear();
        write(tile, nothing);
    }

    // Whether the first S of work tile `next` may start before the last o += P v of the current tile has ended. Until it ends, this
    // consumer holds the v of that product, and so the producer can load only kKeyStages + 1 more k. One of them is the k of that S, so at
    // most kKeyStages key tiles may be skipped before it.
    __device__ __forceinline__ bool flows_into(const KeySteps& next) const {
        return !next.own.empty() && key_steps_of(current).tiles_after + next.tiles_before <= Traits::kKeyStages;
    }

    // Skips a work tile in which this consumer has no rows, or in which its rows see nothing.
    __device__ __forceinline__ void skip_tile(const KeySteps& key_steps) {
        const FwdTile& tile = tile_of(current);
        if (key_steps.tiles_before + key_steps.tiles_after == 0 && first_row(tile) < tile.sequence.seqlen_q) write_nothing_seen(tile);
        skip_keys(key_steps.tiles_before + key_steps.tiles_after);
        arrive_together(control.q_empty[q_ring_of(current).stage()]);
    }

    __device__ __forceinline__ void run() {
        bool exists = take(current);
        while (exists) {
            const KeySteps& key_steps = key_steps_of(current);
            if (key_steps.own.empty()) {
                skip_tile(key_steps);
                exists = take(++current);
                continue;
            }
            skip_keys(key_steps.tiles_before);
            start_scores(current);
            first_softmax(current);
            bool flows = true;
            while (flows) {
                const bool fresh = steps();
                arrive_together(control.q_empty[q_ring_of(current).stage()]);
                OnlineSoftmax<1> statistics = softmax;
                start_output(fresh);
                flows = false;
                if constexpr (Traits::kQStages > 1) {
                    exists = take(current + 1);
                    flows = exists && flows_into(key_steps_of(current + 1));
                }
                if (flows) {
                    const int between = key_steps_of(current).tiles_after + key_steps_of(current + 1).tiles_before;
                    skip_k(between);
                    start_scores(current + 1);
                    output_arrived<1>();
                    write(tile_of(current), statistics);
                    skip_v(between);
                    first_softmax(current + 1);
                } else {
                    output_arrived();
                    skip_keys(key_steps_of(current).tiles_after);
                    write(tile_of(current), statistics);
                    if constexpr (Traits::kQStages == 1) exists = take(current + 1);
                }
                ++current;
            }
        }
    }
};

}  // namespace fa2::sm90
