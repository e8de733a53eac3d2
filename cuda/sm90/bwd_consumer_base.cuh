// The base of both backward consumers: the walk over the queries, P, and the tails of tiles.
#pragma once

#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/softmax.cuh"
#include "../core/store.cuh"
#include "barrier.cuh"
#include "bwd_block.cuh"
#include "cluster.cuh"
#include "wgmma.cuh"

namespace fa2::sm90 {

// Stores four 8 x 8 matrices (PTX ISA, "stmatrix"). Lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}

// Where a consumer is in its walk over the tiles of queries. It is in registers, because a read of shared memory would delay the first
// product of a step.
struct BwdWalk {
    QueryStep queries;
    Range m_blocks;
    Range unmasked;    // tiles in which the mask hides none of the consumer's keys
    int tail_m_block;  // the tile with rows after the end of the sequence, or -1

    __device__ __forceinline__ bool masked() const { return queries.m_block < unmasked.begin || queries.m_block >= unmasked.end; }
};

// keys: kWarpgroupRows keys of a consumer. Those after the end of the sequence are hidden from every query.
template <typename Traits>
__device__ __forceinline__ BwdWalk bwd_walk(const Shape& shape, const BwdTile& tile, Range keys) {
    const Visibility sees(shape, tile.sequence);
    const Range unmasked = keys.end > tile.sequence.seqlen_k ? Range{0, 0} : sees.common_queries(keys);
    const int tail = tile.sequence.seqlen_q % Traits::kBlockM == 0 ? -1 : tile.sequence.seqlen_q / Traits::kBlockM;
    return {first_queries(tile), tile.m_blocks, {ceil_div(unmasked.begin, Traits::kBlockM), unmasked.end / Traits::kBlockM}, tail};
}

template <typename Traits>
struct BwdConsumerBase : ConsumerThread {
    using T = typename Traits::T;
    using ScoreMod = typename Traits::ScoreMod;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TileDs = typename Traits::TileDs;
    using ScoreTile = Accumulator<1, Traits::kNTiles>;  // of S^T, dP^T: a row is a key
    using RoundedTile = uint32_t[Traits::kKSteps][4];   // P^T or dS^T as the A operand
    using SumTile = Accumulator<1, Traits::kDTiles>;    // dk or dv
    using RowValues = float2[Traits::kNTiles];          // lse or delta of the thread's queries

    const Sm90BwdParams& params;
    BwdControl<Traits>& control;
    uint8_t* const bytes;
    const uint32_t shared;
    const int rank;  // of this block in its cluster
    BwdWalk walk;
    BwdTiles<Traits> tiles{control};
    Ring<Traits::kQStages> q_ring;
    Ring<Traits::kDoStages> do_ring;
    Ring<Traits::kDsStages> ds_ring;

    __device__ __forceinline__ const BwdTile& tile() const { return tiles.current(); }

    __device__ __forceinline__ void start_walk() {
        const int first = tile().cols.begin + Traits::first_key(consumer);
        walk = bwd_walk<Traits>(params.bwd.shape, tile(), {first, first + kWarpgroupRows});
    }

    // The work tiles of this thread block. Self: the consumer.
    template <typename Self>
    __device__ __forceinline__ void run(Self& self) {
        self.dq.clear();
        while (tiles.wait()) {
            self.clear_sums();
            const int steps = tile().steps();
            wait_full(&control.keys_full, key_ring());
            if (steps > 0) {
                self.clear_key_tails();
                start_walk();
#pragma unroll 1
                for (int i = 0; i < steps; ++i) self.step(i == 0);
                self.start_dq(ds_ring.before(), true);
                wgmma_wait<0>();
                wgmma_arrived(self.dq);
            }
            arrive(control.keys_empty);
            if (steps > 0) self.pass_on_dq(ds_ring.before());
            self.write_sums();
            tiles.advance(lane);
        }
    }

    // This warp's first key in the tile.
    __device__ __forceinline__ int tile_key() const { return Traits::first_key(consumer) + warp * kWarpRows; }

    // Each work tile has a tile of k and one of v.
    __device__ __forceinline__ Ring<1> key_ring() const { return {tiles.ring.passed}; }

    // Byte offsets of the tiles of this step.
    __device__ __forceinline__ uint32_t q() const { return Traits::sQ + q_ring.stage() * TileQ::kBytes; }
    __device__ __forceinline__ uint32_t do_() const { return Traits::sDo + do_ring.stage() * TileQ::kBytes; }

    // The address of an operand of wgmma.
    __device__ __forceinline__ uint32_t operand(uint32_t offset) const {
        return (Traits::kCluster > 1 ? shared & kOffsetInBlock : shared) + offset;
    }

    // This warp arrives at a barrier: it has read a stage, or written its part of one.
    __device__ __forceinline__ void arrive(uint64_t& barrier) const {
        arrive_warp(barrier, lane);
    }

    __device__ __forceinline__ void wait_for_do() const {
        wait_full(control.do_full, do_ring);
    }

    // Clears the rows of a tile from `rows` on, after the end of the sequence. TMA has filled them with the next packed sequence, with
    // padding keys, or with zeros. Their NaN times 0 would be NaN. All consumers share the work.
    template <typename Tile>
    __device__ __forceinline__ void clear_tail(uint32_t tile, int rows) const {
        const int thread = (consumer * kWarpgroupWarps + warp) * kWarpSize + lane;
        for (int i = rows * Tile::kChunksPerRow + thread; i < Tile::kRows * Tile::kChunksPerRow; i += Traits::kConsumerThreads)
            *reinterpret_cast<uint4*>(bytes + tile + Tile::offset(i / Tile::kChunksPerRow, i % Tile::kChunksPerRow)) = uint4{};
    }

    // Waits until the other consumer has cleared its part too. Each consumer waits at barriers of its own, because synccheck reports an
    // error if warpgroups wait at one barrier in different code. The second barrier says that all warps have left the first one, so that it
    // may be used again.
    __device__ __forceinline__ void tails_cleared() const {
        fence_proxy_async();
        meet(kTailsCleared);
        meet(kTailsSeen);
    }

    // Waits until the other consumer is here too. `barrier`: that of consumer 0.
    __device__ __forceinline__ void meet(int barrier) const {
        bar_arrive<Traits::kConsumerThreads>(barrier + (consumer ^ 1));
        bar_sync<Traits::kConsumerThreads>(barrier + consumer);
    }

    // Waits for q and lse of this step, and clears the tails of q and do.
    __device__ __forceinline__ void wait_for_q() const {
        wait_full(control.q_full, q_ring);
        if (walk.queries.m_block == walk.tail_m_block) {
            const int rows = tile().sequence.seqlen_q - walk.queries.m_block * Traits::kBlockM;
            wait_for_do();
            clear_tail<TileQ>(q(), rows);
            clear_tail<TileQ>(do_(), rows);
            tails_cleared();
        }
    }

    __device__ __forceinline__ void advance() {
        walk.queries.advance(walk.m_blocks);
        q_ring.advance();
        do_ring.advance();
        ds_ring.advance();
    }

    // Starts S^T = k q^T, or dP^T = v do^T, of this consumer's keys and a tile of queries.
    __device__ __forceinline__ void start_product(ScoreTile& d, uint32_t tile_k, uint32_t tile_q) const {
        const Operand<TileK, Order::kContiguousK> a(operand(tile_k), Traits::first_key(consumer));
        const Operand<TileQ, Order::kContiguousK> b(operand(tile_q));
        start_multiply<T, Traits::kHeadDim / 16>(d, a, b);
    }

    // Starts dv += P^T do, or dk += dS^T q.
    __device__ __forceinline__ void start_sum(SumTile& d, const RoundedTile& a, uint32_t tile_q) const {
        start_multiply_add<T>(d, a, Operand<TileQ, Order::kTransposed>(operand(tile_q)));
    }

    __device__ __forceinline__ void load_row_values(RowValues& x, uint32_t offset, int stage) const {
        const float* from = reinterpret_cast<const float*>(bytes + offset) + stage * Traits::kBlockM + fragment_col(lane, 0);
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j) x[j] = *reinterpret_cast<const float2*>(from + 8 * j);
    }
    __device__ __forceinline__ void load_lse_log2(RowValues& x) const { load_row_values(x, Traits::sLseLog2, q_ring.stage()); }
    __device__ __forceinline__ void load_delta(RowValues& x) const { load_row_values(x, Traits::sDelta, do_ring.stage()); }

    // P^T = exp2(scale_log2 * score - lse_log2). With a score_mod, s becomes P^T times its derivative. kRound: P^T itself, rounded, goes to
    // p.
    template <bool kMasked, bool kRound>
    __device__ __forceinline__ void to_p(ScoreTile& s, RoundedTile& p, const RowValues& lse_log2) const {
        const Shape& shape = params.bwd.shape;
        const float scale_log2 = ScoreMod::scale_log2(shape);
        const ScoreMod score_mod(shape, tile().sequence, walk.queries.head);
        const int first_query = walk.queries.m_block * Traits::kBlockM + fragment_col(lane, 0);
        const int first_key = tile().cols.begin + tile_key();
        uint32_t seen[2];  // for each of the thread's keys, a bit for each of its queries
        if constexpr (kMasked) {
            const Visibility sees(shape, tile().sequence);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = first_key + fragment_row(lane, half);
                const Range queries = key < tile().cols.end ? sees.queries_of({key, key + 1}) : Range{0, 0};
                seen[half] = columns_in(queries, first_query);
            }
        }
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) {
            float derivative[2][4];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int j = 2 * step + c;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& x = s.x[0][j][e];
                    x = score_mod.apply(x, first_query + 8 * j + e % 2, first_key + fragment_row(lane, e / 2), derivative[c][e]);
                    x = weight_of(x, scale_log2, e % 2 ? lse_log2[j].y : lse_log2[j].x);
                    if (kMasked && (seen[e / 2] & 1u << (2 * j + e % 2)) == 0) x = 0.f;
                }
            }
            if constexpr (kRound) to_a_operand<T>(p[step], s.x[0], step);
            if constexpr (!ScoreMod::kIdentity) {
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s.x[0][2 * step + c][e] *= derivative[c][e];
            }
        }
    }

    // dS^T = P^T (dP^T - delta), in place of dP^T, and rounded. p_of(j): this thread's P^T in n8 tile j.
    template <typename POf>
    __device__ __forceinline__ void to_ds(ScoreTile& dp, RoundedTile& ds, const RowValues& delta, const POf& p_of) const {
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j) {
            const float4 p = p_of(j);
            float(&x)[4] = dp.x[0][j];
            x[0] = ds_of(p.x, x[0], delta[j].x);
            x[1] = ds_of(p.y, x[1], delta[j].y);
            x[2] = ds_of(p.z, x[2], delta[j].x);
            x[3] = ds_of(p.w, x[3], delta[j].y);
        }
        round(dp, ds);
    }

    // A tile as the A operand.
    __device__ __forceinline__ static void round(const ScoreTile& x, RoundedTile& rounded) {
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) to_a_operand<T>(rounded[step], x.x[0], step);
    }

    // Writes dS^T of this warp's keys to its stage. The caller has waited for the stage. Its readers must call fence_proxy_async().
    __device__ __forceinline__ void store_ds(const RoundedTile& ds) const {
        const uint32_t to = shared + Traits::sDs + ds_ring.stage() * TileDs::kBytes + TileDs::offset(tile_key() + lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) stmatrix_x4(TileDs::advance(to, 2 * step), ds[step]);
    }

    // Writes this warp's keys of dk, times the softmax scale, or of dv.
    __device__ __forceinline__ void write_dk(SumTile& dk) const {
        dk.scale(params.bwd.softmax_scale);
        write(params.bwd.dk, params.bwd.dk_strides, params.bwd.shape.head_dim, dk);
    }
    __device__ __forceinline__ void write_dv(const SumTile& dv) const {
        write(params.bwd.dv, params.bwd.dv_strides, params.bwd.shape.head_dim_v, dv);
    }

private:
    __device__ __forceinline__ void write(void* to, const Strides& strides, int head_dim, const SumTile& x) const {
        const BwdTile& tile = tiles.current();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = tile.cols.begin + tile_key() + fragment_row(lane, half);
            T* row = row_of<T>(to, strides, tile.sequence.batch, tile.sequence.first_k + key, tile.head_k);
            store_row(row, x.x[0], half, head_dim, key < tile.cols.end, lane);
        }
    }
};

}  // namespace fa2::sm90
