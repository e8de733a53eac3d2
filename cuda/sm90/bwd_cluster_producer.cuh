// prototype producer
#pragma once
#include "barrier.cuh"
#include "bwd_cluster_block.cuh"
#include "tma.cuh"
namespace fa2::sm90 {
template <typename Traits>
struct BwdClusterProducer {
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TilePeerK = typename Traits::TilePeerK;
    const Sm90BwdParams& params;
    BwdClusterControl<Traits>& control;
    uint8_t* const bytes;
    const int rank;
    const int lane;

    __device__ __forceinline__ int batch() const { return batch_entry(params.bwd.shape, control.block.sequence); }

    __device__ __forceinline__ void load_keys() const {
        const BwdBlock& block = control.block;
        const uint32_t full = shared_address(&control.keys_full), shared = shared_address(bytes);
        const int row = block.sequence.first_k + block.cols.begin, peer_row = block.sequence.first_k + control.peer_first;
        mbarrier_arrive_expect(full, 2 * TileK::kBytes + TilePeerK::kBytes);
        tma_load_tile<TileK>(shared + Traits::sK, params.k, full, row, block.head_k, batch());
        tma_load_tile<TileK>(shared + Traits::sV, params.v, full, row, block.head_k, batch());
#pragma unroll
        for (int col = 0; col < TilePeerK::kCols; col += TilePeerK::kPanel)
            tma_load(shared + Traits::sPeerK + col * TilePeerK::kRows * 2, params.k, full, rank * Traits::kBlockCols + col, peer_row,
                     block.head_k, batch());
    }

    __device__ __forceinline__ void load_tiles() const {
        const BwdBlock& block = control.block;
        const uint32_t shared = shared_address(bytes);
        Ring<Traits::kQStages> q_ring;
        Ring<Traits::kDoStages> do_ring;
        QueryTile tile = first_tile(block);
        for (int step = block.steps(); step > 0; --step) {
            const int row = block.sequence.first_q + tile.m_block * Traits::kBlockM;
            const auto load = [&](uint64_t* full, uint64_t* empty, uint32_t tiles, const TensorMap& map, const auto& ring) {
                mbarrier_wait(shared_address(&empty[ring.stage()]), ring.parity() ^ 1);
                const uint32_t barrier = shared_address(&full[ring.stage()]);
                tma_fill<TileQ>(shared + tiles + ring.stage() * TileQ::kBytes, map, barrier, row, tile.head, batch());
            };
            load(control.q_full, control.q_empty, Traits::sQ, params.q, q_ring);
            if (q_ring.passed == 0) load_keys();
            load(control.do_full, control.do_empty, Traits::sDo, params.do_, do_ring);
            q_ring.advance();
            do_ring.advance();
            tile.advance(block);
        }
    }

    __device__ __forceinline__ BwdStep step_of(const QueryTile& tile) const {
        const BwdBlock& block = control.block;
        const Range rows = tile_range(tile.m_block * Traits::kBlockM, Traits::kBlockM, block.sequence.seqlen_q);
        const Range common = Visibility(params.bwd.shape, block.sequence).common_keys(rows);
        const int first = block.cols.begin;
        return {tile, rows.end - rows.begin, !common.contains({first, first + Traits::kBlockN})};
    }

    __device__ __forceinline__ void load_lse_and_delta() const {
        constexpr int kRows = Traits::kBlockM / kWarpSize;
        const BwdBlock& block = control.block;
        Ring<Traits::kQStages> q_ring;
        Ring<Traits::kDoStages> do_ring;
        QueryTile tile = first_tile(block);
        for (int step = block.steps(); step > 0; --step) {
            const int64_t head_offset = block.sequence.lse_offset(params.bwd.shape, tile.head);
            const int first_row = tile.m_block * Traits::kBlockM + lane;
            const auto load = [&](const float* from, float factor, float past_the_end, uint32_t to, uint64_t* full, uint64_t* empty, const auto& ring) {
                float x[kRows];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const int row = first_row + i * kWarpSize;
                    x[i] = row < block.sequence.seqlen_q ? from[head_offset + row] * factor : past_the_end;
                }
                mbarrier_wait(shared_address(&empty[ring.stage()]), ring.parity() ^ 1);
                float* stage = reinterpret_cast<float*>(bytes + to) + ring.stage() * Traits::kBlockM + lane;
#pragma unroll
                for (int i = 0; i < kRows; ++i) stage[i * kWarpSize] = x[i];
                __syncwarp();
                if (lane == 0) mbarrier_arrive(shared_address(&full[ring.stage()]));
            };
            if (lane == 0) {
                mbarrier_wait(shared_address(&control.q_empty[q_ring.stage()]), q_ring.parity() ^ 1);
                control.steps[q_ring.stage()] = step_of(tile);
            }
            __syncwarp();
            load(params.bwd.lse, kLog2e, INFINITY, Traits::sLse, control.q_full, control.q_empty, q_ring);
            load(params.bwd.delta, 1.f, 0.f, Traits::sDelta, control.do_full, control.do_empty, do_ring);
            q_ring.advance();
            do_ring.advance();
            tile.advance(block);
        }
    }
};
}  // namespace fa2::sm90
