// prototype consumer
#pragma once
#include "../core/barrier.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/softmax.cuh"
#include "../core/store.cuh"
#include "barrier.cuh"
#include "bwd_cluster_block.cuh"
#include "bwd_consumer.cuh"  // stmatrix
#include "wgmma.cuh"

namespace fa2::sm90 {

template <typename Traits, bool kOrdered>
struct BwdClusterConsumer {
    using T = typename Traits::T;
    using ScoreMod = typename Traits::ScoreMod;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TilePeerK = typename Traits::TilePeerK;
    using TileDs = typename Traits::TileDs;
    using DsRing = Ring<Traits::kDsStages>;

    const Sm90BwdParams& params;
    BwdClusterControl<Traits>& control;
    uint8_t* const bytes;
    const uint32_t shared;
    const int rank;
    const int warp;  // in the warpgroup
    const int lane;
    Ring<Traits::kQStages> q_ring;
    Ring<Traits::kDoStages> do_ring;
    DsRing ds_ring;
    Accumulator<1, Traits::kDTiles> sum;  // dv, or dk
    Accumulator<1, Traits::kNTiles> x;    // S^T, then P^T; or dP^T, then dS^T
    uint32_t a[Traits::kKSteps][4];       // P^T, or dS^T, rounded
    Accumulator<1, Traits::kDqDTiles> dq;

    __device__ __forceinline__ int tile_key() const { return warp * Traits::kWarpRows; }

    __device__ __forceinline__ void release(uint64_t& barrier) const {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&barrier));
    }

    template <typename Tile>
    __device__ __forceinline__ void clear_tail(uint32_t tile, int rows, int thread) const {
        for (int i = rows * Tile::kChunksPerRow + thread; i < Tile::kRows * Tile::kChunksPerRow; i += Traits::kConsumerThreads)
            *reinterpret_cast<uint4*>(bytes + tile + Tile::offset(i / Tile::kChunksPerRow, i % Tile::kChunksPerRow)) = uint4{};
    }
    __device__ __forceinline__ void tails_cleared() const {
        fence_proxy_async();
        bar_sync<Traits::kConsumerThreads>(kFirstNamedBarrier + Traits::kConsumers);
    }

    __device__ __forceinline__ uint32_t operands() const { return shared & 0x3ffff; }

    // S^T = k q^T or dP^T = v do^T
    __device__ __forceinline__ void start_product(uint32_t keys, uint32_t queries) {
        const uint64_t rows = Descriptor<TileK>::of(opaque(operands() + keys));
        const uint64_t columns = Descriptor<TileQ>::of(opaque(operands() + queries));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kHeadDim / 16; ++step)
            WgmmaShared<T, Traits::kBlockM, false, false>::step(x.x[0], rows + Descriptor<TileK>::columns(step),
                                                                columns + Descriptor<TileQ>::columns(step), step > 0);
        wgmma_commit();
    }
    __device__ __forceinline__ void start_sum(uint32_t queries) {
        const uint64_t columns = Descriptor<TileQ>::of(opaque(operands() + queries));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step)
            WgmmaRegisters<T, Traits::kHeadDim, true>::step(sum.x[0], a[step], columns + Descriptor<TileQ>::rows(step), 1);
        wgmma_commit();
    }
    template <int kWarpgroup>
    __device__ __forceinline__ void start_dq(DsRing at, bool exists) {
        if (exists) mbarrier_wait(shared_address(&control.ds_full[at.stage()]), at.parity());
        const uint32_t ds = operands() + Traits::sDs + at.stage() * TileDs::kBytes;
        constexpr int kPanels = Traits::kDqCols / TileK::kPanel;
        const int panel = rank * (Traits::kBlockCols / TileK::kPanel) + kWarpgroup * kPanels;
        const uint64_t rows = Descriptor<TileDs>::of(opaque(ds));
        const uint64_t columns = Descriptor<TileK>::of(opaque(operands() + Traits::sK + panel * Descriptor<TileK>::kPanelBytes));
        const uint64_t peer_columns =
            Descriptor<TilePeerK>::of(opaque(operands() + Traits::sPeerK + kWarpgroup * kPanels * Descriptor<TilePeerK>::kPanelBytes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kBlockN / 16; ++step)
            WgmmaShared<T, Traits::kDqCols, true, true>::step(dq.x[0], rows + Descriptor<TileDs>::rows(step),
                                                             columns + Descriptor<TileK>::rows(step), step > 0);
#pragma unroll
        for (int step = 0; step < Traits::kBlockN / 16; ++step)
            WgmmaShared<T, Traits::kDqCols, true, true>::step(dq.x[0], rows + Descriptor<TileDs>::rows(step + Traits::kBlockN / 16),
                                                             peer_columns + Descriptor<TilePeerK>::rows(step), 1);
        wgmma_commit();
    }

    template <int kWarpgroup>
    __device__ __forceinline__ void add_dq(DsRing at, const QueryTile& tile) {
        __syncwarp();
        if (lane == 0) {
            const uint32_t barrier = shared_address(&control.ds_empty[at.stage()]);
            mbarrier_arrive(barrier);
            mbarrier_arrive_peer(peer_address(barrier, rank ^ 1));
        }
#ifdef NOADD
        if (params.bwd.softmax_scale != -1.f) return;
#endif
        const BwdParams& bwd = params.bwd;
        const Sequence& sequence = control.block.sequence;
        const int first = is_packed(bwd.shape) ? sequence.first_q / 8 + sequence.batch : 0;
        const int64_t group = sequence.batch * bwd.dq_tiles.batch + tile.head * bwd.dq_tiles.head + first + tile.m_block * (Traits::kBlockM / 8) + 2 * warp;
        const int col = rank * Traits::kBlockCols + kWarpgroup * Traits::kDqCols;
        float* to = bwd.dq_accum + (group * (Traits::kHeadDim / 16) + col / 16) * 128 + lane * 4;
        const int rows = sequence.seqlen_q - tile.m_block * Traits::kBlockM - 16 * warp;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (8 * half >= rows) break;
#pragma unroll
            for (int j = 0; j < Traits::kDqDTiles; j += 2)
                asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + (half * (Traits::kHeadDim / 16) + j / 2) * 128),
                             "f"(dq.x[0][j][2 * half]), "f"(dq.x[0][j][2 * half + 1]), "f"(dq.x[0][j + 1][2 * half]),
                             "f"(dq.x[0][j + 1][2 * half + 1])
                             : "memory");
        }
    }

    __device__ __forceinline__ void load_row_values(float2 (&y)[Traits::kNTiles], uint32_t offset, int stage) const {
        const float* from = reinterpret_cast<const float*>(bytes + offset) + stage * Traits::kBlockM + fragment_col(lane, 0);
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j) y[j] = *reinterpret_cast<const float2*>(from + 8 * j);
    }

    template <bool kMasked>
    __device__ __forceinline__ void to_p(const QueryTile& tile, const float2 (&lse)[Traits::kNTiles]) {
        const Shape& shape = params.bwd.shape;
        const float scale_log2 = ScoreMod::scale_log2(shape);
        const ScoreMod score_mod(shape, control.block.sequence, tile.head);
        const int first_query = tile.m_block * Traits::kBlockM + fragment_col(lane, 0);
        const int first_key = control.block.cols.begin + tile_key();
        uint32_t seen[2];
        if constexpr (kMasked) {
            const Visibility sees(shape, control.block.sequence);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = first_key + fragment_row(lane, half);
                const Range queries = key < control.block.cols.end ? sees.queries_of({key, key + 1}) : Range{0, 0};
                seen[half] = columns_in(queries, first_query);
            }
        }
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) {
            float derivative[2][4];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int j = 2 * step + c;
                const float lse_log2[2] = {lse[j].x, lse[j].y};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& y = x.x[0][j][e];
                    y = score_mod.apply(y, first_query + 8 * j + e % 2, first_key + fragment_row(lane, e / 2), derivative[c][e]);
                    y = weight_of(y, scale_log2, lse_log2[e % 2]);
                    if (kMasked && (seen[e / 2] & 1u << (2 * j + e % 2)) == 0) y = 0.f;
                }
            }
            to_a_operand<T>(a[step], x.x[0], step);
            if constexpr (!ScoreMod::kIdentity) {
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e) x.x[0][2 * step + c][e] *= derivative[c][e];
            }
        }
    }

    __device__ __forceinline__ float4* p_of_thread() const {
        return reinterpret_cast<float4*>(bytes + Traits::sP) + warp * kWarpSize + lane;
    }

    __device__ __forceinline__ void wait_tails(const BwdStep& info, uint32_t q, uint32_t do_, int warpgroup) const {
        if (info.rows < Traits::kBlockM) {
            mbarrier_wait(shared_address(&control.do_full[do_ring.stage()]), do_ring.parity());
            const int thread = (warpgroup * 4 + warp) * kWarpSize + lane;
            clear_tail<TileQ>(q, info.rows, thread);
            clear_tail<TileQ>(do_, info.rows, thread);
            tails_cleared();
        }
    }

    // P and dv
    __device__ __forceinline__ void step_p(bool first, QueryTile& before) {
        const uint32_t q = Traits::sQ + q_ring.stage() * TileQ::kBytes, do_ = Traits::sDo + do_ring.stage() * TileQ::kBytes;
        const BwdStep& info = control.steps[q_ring.stage()];
        mbarrier_wait(shared_address(&control.q_full[q_ring.stage()]), q_ring.parity());
        wait_tails(info, q, do_, 0);
        start_product(Traits::sK, q);
        float2 lse[Traits::kNTiles];
        if (PRE & 1) load_row_values(lse, Traits::sLse, q_ring.stage());
        const QueryTile tile = info.tile;
        if (PRE & 4) mbarrier_wait(shared_address(&control.p_empty[warp]), (q_ring.passed & 1) ^ 1);
        wgmma_wait<0>();
        wgmma_arrived(x);
        if (!(PRE & 1)) load_row_values(lse, Traits::sLse, q_ring.stage());
        if (info.hides) {
            to_p<true>(tile, lse);
        } else {
            to_p<false>(tile, lse);
        }
        release(control.q_empty[q_ring.stage()]);
        if (!(PRE & 4)) mbarrier_wait(shared_address(&control.p_empty[warp]), (q_ring.passed & 1) ^ 1);
        float4* to = p_of_thread();
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j)
            to[j * Traits::kWarpgroupThreads] = make_float4(x.x[0][j][0], x.x[0][j][1], x.x[0][j][2], x.x[0][j][3]);
        release(control.p_full[warp]);
        mbarrier_wait(shared_address(&control.do_full[do_ring.stage()]), do_ring.parity());
        const DsRing ds_before{ds_ring.passed - 1};
#if DQFIRST
        start_dq<0>(ds_before, !first);
        start_sum(do_);
        wgmma_wait<1>();
        wgmma_arrived(dq);
        if (!first) add_dq<0>(ds_before, before);
        wgmma_wait<0>();
        wgmma_arrived(sum);
        release(control.do_empty[do_ring.stage()]);
#else
        start_sum(do_);
        start_dq<0>(ds_before, !first);
        wgmma_wait<1>();
        wgmma_arrived(sum);
        release(control.do_empty[do_ring.stage()]);
        wgmma_wait<0>();
        wgmma_arrived(dq);
        if (!first) add_dq<0>(ds_before, before);
#endif
        before = tile;
        q_ring.advance();
        do_ring.advance();
        ds_ring.advance();
    }

    // dS and dk
    __device__ __forceinline__ void step_ds(bool first, QueryTile& before) {
        const uint32_t q = Traits::sQ + q_ring.stage() * TileQ::kBytes, do_ = Traits::sDo + do_ring.stage() * TileQ::kBytes;
        const BwdStep& info = control.steps[q_ring.stage()];
        mbarrier_wait(shared_address(&control.q_full[q_ring.stage()]), q_ring.parity());
        wait_tails(info, q, do_, 1);
        mbarrier_wait(shared_address(&control.do_full[do_ring.stage()]), do_ring.parity());
        start_product(Traits::sV, do_);
        float2 delta[Traits::kNTiles];
        if (PRE & 2) load_row_values(delta, Traits::sDelta, do_ring.stage());
        const float4* p = p_of_thread();
#if PRE & 8
        float4 p_pre[Traits::kNTiles];
        mbarrier_wait(shared_address(&control.p_full[warp]), q_ring.passed & 1);
        for (int j = 0; j < Traits::kNTiles; ++j) p_pre[j] = p[j * Traits::kWarpgroupThreads];
        release(control.p_empty[warp]);
#endif
        if (PRE & 4) mbarrier_wait(shared_address(&control.ds_empty[ds_ring.stage()]), ds_ring.parity() ^ 1);
        wgmma_wait<0>();
        wgmma_arrived(x);
        if (!(PRE & 2)) load_row_values(delta, Traits::sDelta, do_ring.stage());
        if (!(PRE & 8)) mbarrier_wait(shared_address(&control.p_full[warp]), q_ring.passed & 1);
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j) {
#if PRE & 8
            const float4 p_j = p_pre[j];
#else
            const float4 p_j = p[j * Traits::kWarpgroupThreads];
#endif
            const float2 delta_j = delta[j];
            x.x[0][j][0] = ds_of(p_j.x, x.x[0][j][0], delta_j.x);
            x.x[0][j][1] = ds_of(p_j.y, x.x[0][j][1], delta_j.y);
            x.x[0][j][2] = ds_of(p_j.z, x.x[0][j][2], delta_j.x);
            x.x[0][j][3] = ds_of(p_j.w, x.x[0][j][3], delta_j.y);
        }
        if (!(PRE & 8)) release(control.p_empty[warp]);
        release(control.do_empty[do_ring.stage()]);
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) to_a_operand<T>(a[step], x.x[0], step);
        // dS^T for the dq of both blocks
        const uint32_t empty = shared_address(&control.ds_empty[ds_ring.stage()]), full = shared_address(&control.ds_full[ds_ring.stage()]);
        if (!(PRE & 4)) mbarrier_wait(empty, ds_ring.parity() ^ 1);
        const uint32_t ds = shared + Traits::sDs + ds_ring.stage() * TileDs::kBytes;
        const uint32_t to = ds + TileDs::offset(tile_key() + lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) stmatrix_x4(TileDs::advance(to, 2 * step), a[step]);
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            constexpr int kWarpBytes = Traits::kWarpRows * Traits::kBlockM * 2;
            const uint32_t rows = ds + warp * kWarpBytes;
            mbarrier_arrive_expect(full, kWarpBytes);
            copy_to_peer(peer_address(rows + Traits::kDsBytes, rank ^ 1), rows, kWarpBytes, peer_address(full, rank ^ 1));
        }
        __syncwarp();
        const DsRing ds_before{ds_ring.passed - 1};
        const QueryTile tile = info.tile;
#if DQFIRST & 2
        start_dq<1>(ds_before, !first);
        start_sum(q);
        wgmma_wait<1>();
        wgmma_arrived(dq);
        if (!first) add_dq<1>(ds_before, before);
        wgmma_wait<0>();
        wgmma_arrived(sum);
        release(control.q_empty[q_ring.stage()]);
#else
        start_sum(q);
        start_dq<1>(ds_before, !first);
        wgmma_wait<1>();
        wgmma_arrived(sum);
        release(control.q_empty[q_ring.stage()]);
        wgmma_wait<0>();
        wgmma_arrived(dq);
        if (!first) add_dq<1>(ds_before, before);
#endif
        before = tile;
        q_ring.advance();
        do_ring.advance();
        ds_ring.advance();
    }

    __device__ __forceinline__ void write(void* to) const {
        const BwdBlock& block = control.block;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = block.cols.begin + tile_key() + fragment_row(lane, half);
            T* row = row_of<T>(to, params.bwd.dk_strides, block.sequence.batch, block.sequence.first_k + key, block.head_k);
            store_row(row, sum.x[0], half, params.bwd.shape.head_dim, key < block.cols.end, lane);
        }
    }

    template <int kWarpgroup>
    __device__ __forceinline__ void walk_queries(int steps) {
        const BwdBlock& block = control.block;
        mbarrier_wait(shared_address(&control.keys_full), 0);
        const int keys = max(block.cols.end - block.cols.begin, 0), peer_keys = min(max(block.sequence.seqlen_k - control.peer_first, 0), Traits::kBlockN);
        if (keys < Traits::kBlockN || peer_keys < Traits::kBlockN) {
            const int thread = (kWarpgroup * 4 + warp) * kWarpSize + lane;
            clear_tail<TileK>(Traits::sK, keys, thread);
            clear_tail<TileK>(Traits::sV, keys, thread);
            clear_tail<TilePeerK>(Traits::sPeerK, peer_keys, thread);
            tails_cleared();
        }
        QueryTile before{};
#pragma unroll 1
        for (int i = 0; i < steps; ++i) {
            if constexpr (kWarpgroup == 0) step_p(i == 0, before);
            else step_ds(i == 0, before);
        }
        const DsRing last{ds_ring.passed - 1};
        start_dq<kWarpgroup>(last, true);
        wgmma_wait<0>();
        wgmma_arrived(dq);
        add_dq<kWarpgroup>(last, before);
    }

    template <int kWarpgroup>
    __device__ __forceinline__ void run() {
        sum.clear();
        dq.clear();
        const int steps = control.block.steps();
        if (steps > 0) walk_queries<kWarpgroup>(steps);
        if constexpr (kWarpgroup == 1) sum.scale(params.bwd.softmax_scale);
        write(kWarpgroup == 0 ? params.bwd.dv : params.bwd.dk);
    }
};
}  // namespace fa2::sm90
