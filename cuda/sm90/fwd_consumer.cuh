// A warpgroup of the forward that multiplies.
#pragma once

#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/scores.cuh"
#include "../core/softmax.cuh"
#include "barrier.cuh"
#include "fwd_block.cuh"
#include "wgmma.cuh"

namespace fa2::sm90 {

template <typename Traits>
struct Consumer {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;

    const HopperFwdParams& params;
    Control<Traits>& control;
    const uint32_t base;
    const int group;  // 0 .. kConsumers - 1
    const int warp;   // in the warpgroup
    const int lane;
    Ring<Traits::kStages> k, v;
    Accumulator<1, Traits::kNTiles> s;
    Accumulator<1, Traits::kDTiles> o;
    uint32_t p[Traits::kBlockN / 16][4];
    OnlineSoftmax<1> softmax;
    float rescale[2];  // of o, for the maxima of the last softmax
    int number = 0;  // of the block's tiles: the one in work

    __device__ __forceinline__ const Work& work_of(int number) const { return control.works[number % Traits::kWorks]; }
    __device__ __forceinline__ Part& part_of(int number) const {
        return control.parts[4 * group + warp][number % Traits::kParts];
    }
    __device__ __forceinline__ Ring<Traits::kQStages> q_of(int number) const { return {uint32_t(number)}; }
    __device__ __forceinline__ int group_row(const Work& work) const {
        return work.m_block * Traits::kBlockM + Traits::kGroupRows * group;
    }

    // Waits for tile `number`. False: there is none.
    __device__ __forceinline__ bool take(int number) {
        const Ring<Traits::kQStages> q = q_of(number);
        mbarrier_wait(shared_address(&control.q_full[q.stage()]), q.parity());
        const Work& work = work_of(number);
        if (work.m_block < 0) return false;
        const Visibility sees(params.fwd.shape, work.sequence(params.fwd.shape));
        const Range tiles = key_tiles<Traits>(sees, rows_of<Traits>(work));
        const int first = group_row(work);
        const Range rows = {first, min(first + Traits::kGroupRows, work.seqlen_q)};
        Part part;
        part.own = rows.empty() ? Range{tiles.begin, tiles.begin} : key_tiles<Traits>(sees, rows);
        // Rows that see nothing still need a sum: of one tile that is hidden altogether.
        if (!rows.empty() && part.own.empty() && !tiles.empty()) part.own = {tiles.end - 1, tiles.end};
        const Range common = sees.common_keys(rows);
        part.plain = {max(ceil_div(common.begin, Traits::kBlockN), part.own.begin), common.end / Traits::kBlockN};
        part.plain_at_first = part.own.end - 1 >= part.plain.begin && part.own.end - 1 < part.plain.end;
        part.before = tiles.end - part.own.end;
        part.behind = part.own.begin - tiles.begin;
        __syncwarp();
        if (lane == 0) part_of(number) = part;
        __syncwarp();
        return true;
    }

    __device__ __forceinline__ void release(uint64_t& barrier) const {
        if (lane == 0) mbarrier_arrive(shared_address(&barrier));
    }

    // Starts S = q k^T of tile `number` with the next k.
    __device__ __forceinline__ void start_scores(int number) {
        mbarrier_wait(shared_address(&control.k_full[k.stage()]), k.parity());
        const uint32_t tile_q = base + Traits::sQ + q_of(number).stage() * TileQ::kBytes;
        const uint64_t rows = Descriptor<TileQ>::of(anew(tile_q + group * Traits::kGroupRows * Descriptor<TileQ>::kRowBytes));
        const uint64_t columns = Descriptor<TileK>::of(anew(base + Traits::sK + k.stage() * TileK::kBytes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kHeadDim / 16; ++step)
            WgmmaShared<T, Traits::kBlockN>::step(s.x[0], rows + Descriptor<TileQ>::columns(step),
                                                  columns + Descriptor<TileK>::columns(step), step > 0);
        wgmma_commit();
    }

    // Starts o += P v with the next v; `fresh`: o = P v.
    __device__ __forceinline__ void start_output(bool fresh) {
        mbarrier_wait(shared_address(&control.v_full[v.stage()]), v.parity());
        const uint64_t columns = Descriptor<TileK>::of(anew(base + Traits::sV + v.stage() * TileK::kBytes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kBlockN / 16; ++step)
            WgmmaRegisters<T, Traits::kHeadDim>::step(o.x[0], p[step], columns + Descriptor<TileK>::rows(step), step > 0 || !fresh);
        wgmma_commit();
    }

    template <int kPending>
    __device__ __forceinline__ void scores_arrived() {
        wgmma_wait<kPending>();
        wgmma_arrived(s);
        release(control.k_empty[k.stage()]);
        k.advance();
    }

    template <int kPending = 0>
    __device__ __forceinline__ void output_arrived() {
        wgmma_wait<kPending>();
        wgmma_arrived(o);
        release(control.v_empty[v.stage()]);
        v.advance();
    }

    // A bit for each of a thread's columns of a tile, counted from its first: bit 2j + e for column 8j + e. Set for those below `col`,
    // which may be negative.
    __device__ __forceinline__ static uint32_t columns_below(int col) {
        const int count = 2 * (col >> 3) + min(col & 7, 2);
        return count >= 32 ? ~0u : (1u << max(count, 0)) - 1;
    }

    // Hides what a row does not see, and applies softcap and ALiBi.
    template <bool kMasked>
    __device__ __forceinline__ void modify(int number, int n) {
        if (!kMasked && !Traits::kModified) return;
        const Shape& shape = params.fwd.shape;
        const Work& work = work_of(anew(number));
        const Sequence sequence = work.sequence(shape);
        const Visibility sees(shape, sequence);
        const Scoring<Traits::kModified> scoring(shape, sequence, work.batch, work.head);
        const int lane = anew(this->lane);
        const int row = group_row(work) + 16 * warp + fragment_row(lane, 0);
        const int lane_col = n * Traits::kBlockN + fragment_col(lane, 0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int this_row = row + 8 * half;
            const Range keys = sees.keys(this_row);
            const uint32_t seen = columns_below(keys.end - lane_col) & ~columns_below(keys.begin - lane_col);
#pragma unroll
            for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = s.x[0][j][2 * half + e];
                    if (Traits::kModified) x = scoring.apply(x, this_row, lane_col + 8 * j + e);
                    if (kMasked && (seen & 1u << (2 * j + e)) == 0) x = -INFINITY;
                }
        }
    }

    __device__ __forceinline__ float factor() const { return Traits::kModified ? 1.f : params.fwd.shape.product_factor; }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int step = 0; step < Traits::kBlockN / 16; ++step) to_a_operand<T>(p[step], s.x[0], step);
    }

    // Rescales o where a maximum has grown, or there is none yet.
    __device__ __forceinline__ void rescale_output() {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (__any_sync(~0u, rescale[half] != 1.f)) softmax.rescale(o, 0, half, rescale[half]);
    }

    // S of tile n of keys, masked if need be, becomes weights.
    template <bool kMasked>
    __device__ __forceinline__ void step(int n, bool fresh) {
        start_scores(number);
        if (Traits::kDefers) rescale_output();
        start_output(fresh);
        scores_arrived<1>();
        modify<kMasked>(number, n);
        float row_max[2];
        if (softmax.positive(0)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) row_max[half] = softmax.largest_from_positive(s, 0, half);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) row_max[half] = softmax.largest(s, 0, half);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) rescale[half] = softmax.raise(0, half, row_max[half], factor());
        softmax.weights(s, 0, 0, factor(), rescale[0]);
        if (Traits::kHolds) {
            hold();
            output_arrived();
        }
        softmax.weights(s, 0, 1, factor(), rescale[1]);
        if (!Traits::kHolds) output_arrived();
        round_weights();
        if (!Traits::kDefers) rescale_output();
    }

    // A branch that is never taken, which ptxas does not know: the wait for o, which it would otherwise move in front of the softmax,
    // stays behind. No wgmma and no wait may stand in a branch like this, which the warps of a warpgroup must all come to.
    __device__ __forceinline__ void hold() {
        float& sum = softmax.sum[0][0];
        if (__any_sync(~0u, sum < 0.f)) {
            __syncwarp();
            sum = __shfl_sync(~0u, sum, 0);
        }
    }

    // All steps of a tile but the first. Whether there were none: o is still to be begun.
    __device__ __forceinline__ bool steps() {
        const Part& part = part_of(anew(number));
        bool fresh = true;
        for (int n = part.own.end - 2; n >= part.own.begin;) {
            const int first_plain = n < part.plain.end ? part.plain.begin : n + 1;
            for (; n >= first_plain; --n, fresh = false) step<false>(n, fresh);
            if (n >= part.own.begin) step<true>(n--, fresh), fresh = false;
        }
        if (Traits::kDefers) rescale_output();
        return fresh;
    }

    // The first softmax of tile `number`, over the S under way.
    __device__ __forceinline__ void first_softmax(int number) {
        scores_arrived<0>();
        const Part& part = part_of(number);
        if (part.plain_at_first) {
            modify<false>(number, part.own.end - 1);
        } else {
            modify<true>(number, part.own.end - 1);
        }
        softmax.clear();
        rescale[0] = rescale[1] = 1.f;
        softmax.scores(s, 0, 0, factor());
        softmax.scores(s, 0, 1, factor());
        round_weights();
    }

    // Lets tiles of keys go by that none of this warpgroup's rows sees.
    __device__ __forceinline__ void pass_k(int count) {
        for (; count > 0; --count) {
            mbarrier_wait(shared_address(&control.k_full[k.stage()]), k.parity());
            __syncwarp();  // no lane still waits for this phase
            release(control.k_empty[k.stage()]);
            k.advance();
        }
    }

    __device__ __forceinline__ void pass_v(int count) {
        for (; count > 0; --count) {
            mbarrier_wait(shared_address(&control.v_full[v.stage()]), v.parity());
            __syncwarp();
            release(control.v_empty[v.stage()]);
            v.advance();
        }
    }

    // In step, where nothing is under way.
    __device__ __forceinline__ void pass(int count) {
        for (int i = 0; i < count; ++i) {
            pass_k(1);
            pass_v(1);
        }
    }

    // Divides by the sums and writes a tile's rows.
    __device__ __forceinline__ void write(const Work& work, OnlineSoftmax<1>& statistics) {
        const Shape& shape = params.fwd.shape;
        const Sequence sequence = work.sequence(shape);
        const Visibility sees(shape, sequence);
        const int lane = anew(this->lane);
        if (__any_sync(~0u, !o.finite()) && lane == 0) atomicOr(&control.noted[work.number / 32], 1u << work.number % 32);
        statistics.finish();
        const int first = group_row(work) + 16 * warp;
        float* lse = params.fwd.lse + sequence.statistics(shape, work.head);
        const int64_t first_o = work.batch * params.fwd.o_strides.batch + work.first_q * params.fwd.o_strides.row +
                                work.head * params.fwd.o_strides.head;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + fragment_row(lane, half);
            const bool blind = sees.keys(row).empty();
            const float scale = blind ? 0.f : 1.f / statistics.sum[0][half];
            const bool stored = row < work.seqlen_q;
            if (lane % 4 == 0 && stored) lse[row] = blind ? -INFINITY : statistics.lse(0, half, factor());
            const int64_t first_of_row = first_o + row * params.fwd.o_strides.row;
            if (params.fwd.unrounded) {
                float* to_row = static_cast<float*>(params.fwd.o) + first_of_row;
#pragma unroll
                for (int j = 0; j < Traits::kDTiles; ++j) {
                    const int col = fragment_col(lane, j);
                    const float2 x = {o.x[0][j][2 * half] * scale, o.x[0][j][2 * half + 1] * scale};
                    if (stored && col < shape.head_dim) *reinterpret_cast<float2*>(to_row + col) = x;
                }
                continue;
            }
            T* to_row = static_cast<T*>(params.fwd.o) + first_of_row;
#pragma unroll
            for (int j = 0; j < Traits::kDTiles; j += 4) {
                uint32_t x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    x[i] = pack2<T>(o.x[0][j + i][2 * half] * scale, o.x[0][j + i][2 * half + 1] * scale);
                gather_chunks(x, lane);
                const int col = 8 * (j + lane % 4);
                if (stored && col < shape.head_dim) *reinterpret_cast<uint4*>(to_row + col) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }

    // o = 0 and lse = -inf of rows that see nothing.
    __device__ __forceinline__ void write_blind(const Work& work) {
        o.clear();
        OnlineSoftmax<1> nothing;
        nothing.clear();
        write(work, nothing);
    }

    // Whether the first S of tile `next` may start behind the last product of the one in work. The warpgroup then passes the tiles of
    // k between them while it holds the v of that: with two stages the producer gets three ahead of that v, so two may be passed.
    __device__ __forceinline__ bool flows_into(const Part& next) const {
        return !next.own.empty() && part_of(number).behind + next.before <= 2;
    }

    // A tile of which this warpgroup's rows see nothing, or of which it has no rows.
    __device__ __forceinline__ void skip(const Part& part) {
        const Work& work = work_of(number);
        if (part.before + part.behind == 0 && group_row(work) < work.seqlen_q) write_blind(work);
        pass(part.before + part.behind);
        release(control.q_empty[q_of(number).stage()]);
    }

    __device__ __forceinline__ void run() {
        bool exists = take(number);
        while (exists) {
            const Part& part = part_of(number);
            if (part.own.empty()) {
                skip(part);
                exists = take(++number);
                continue;
            }
            pass(part.before);
            start_scores(number);
            first_softmax(number);
            bool flows = true;
            while (flows) {
                const bool fresh = steps();
                release(control.q_empty[q_of(number).stage()]);
                OnlineSoftmax<1> statistics = softmax;
                start_output(fresh);
                flows = false;
                if constexpr (Traits::kQStages > 1) {
                    exists = take(number + 1);
                    flows = exists && flows_into(part_of(number + 1));
                }
                if (flows) {
                    const int between = part_of(number).behind + part_of(number + 1).before;
                    pass_k(between);
                    start_scores(number + 1);
                    output_arrived<1>();
                    write(work_of(number), statistics);
                    pass_v(between);
                    first_softmax(number + 1);
                } else {
                    output_arrived();
                    pass(part_of(number).behind);
                    write(work_of(number), statistics);
                    if constexpr (Traits::kQStages == 1) exists = take(number + 1);
                }
                ++number;
            }
        }
    }
};

}  // namespace fa2::sm90
