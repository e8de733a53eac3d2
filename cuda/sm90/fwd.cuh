// o = softmax(mask(softmax_scale * q k^T)) v on wgmma, fed by TMA. Persistent: a block takes tile after tile.
//
// Work       a tile: kBlockM query rows of one head against the keys that the mask leaves visible, last tile of keys first.
// Warps      warpgroup 0 loads, with one warp; each of the others owns 64 rows and all keys (split Q): no sum crosses warps.
// Pipeline   of a warpgroup, step i:  start S = q k_i^T | start o += P v_(i-1) | wait S | mask, softmax | wait o | round P
//            so its softmax runs under its own o += P v and under the products of the other warpgroups. With two buffers of q the
//            first S of a tile is started before the last product of the one before: the tiles of a block are one stream of steps.
// Shared     sQ kQStages tiles of q, sK and sV kStages tiles each; then barriers, the tiles on their way, and the list of those taken.
// Registers  S and o in f32, P packed: it is the A operand of the step after the one that computes it.
// Numerics   scores, maximum, sum, o in f32; P is rounded to the input type before P v. o is rescaled where a maximum has grown.
// Numbers    of v that are not finite: see mend.cuh.
// Expects    head_dim <= kHeadDim, a multiple of 8; at most kMaxTiles tiles for a block that no other can take.
#pragma once

#include "../core/barrier.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/scores.cuh"
#include "../core/softmax.cuh"
#include "../core/tile.cuh"
#include "../params.h"
#include "barrier.cuh"
#include "mend.cuh"
#include "schedule.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, bool kModified_>
struct FwdTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr bool kModified = kModified_;
    static constexpr int kThreads = kWarps_ * kWarpSize;
    static constexpr int kMinBlocks = 1;
    static constexpr int kGroupRows = 64;  // of a warpgroup
    static constexpr int kConsumers = kBlockM / kGroupRows;
    static constexpr int kNTiles = kBlockN / 8;
    static constexpr int kDTiles = kHeadDim / 8;
    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;

    static constexpr int kStages = 2;  // of k, and of v
    static constexpr int kMaxShared = 232448, kControlBytes = 3072;
    static constexpr int kKeyBytes = 2 * kStages * TileK::kBytes;
    static constexpr int kQStages = 2 * TileQ::kBytes + kKeyBytes + kControlBytes <= kMaxShared ? 2 : 1;
    static constexpr uint32_t sQ = 0, sK = kQStages * TileQ::kBytes, sV = sK + kStages * TileK::kBytes;
    static constexpr int kSharedBytes = kQStages * TileQ::kBytes + kKeyBytes + kControlBytes;
    static constexpr int kMaxTiles = 512;  // of a block
    static constexpr int kWorks = 4;       // tiles on their way through the block
    static constexpr int kParts = 2;       // of them, in a warp that multiplies
    // Whether weights are measured from a maximum that lags behind: not where a bias lets scores climb from tile to tile.
    static constexpr bool kLags = !kModified;

    // Registers of a thread: what the driver gives a block at its launch, moved from the warpgroup that loads to the others.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;

    static_assert(kBlockM % kGroupRows == 0 && (kConsumers == 2 || kConsumers == 3), "two or three warpgroups of 64 rows");
    static_assert(kWarps_ == 4 * (kConsumers + 1), "and one that loads");
    static_assert(kBlockN % 16 == 0, "P is the A operand in steps of 16 keys");
    static_assert(kBlockM - kGroupRows <= 2 * kBlockN, "warpgroups are at most two tiles of keys apart: see Consumer::flows_into");
};

// What a warpgroup does for one tile; the rest is in the tile's Work. In tiles of keys.
struct Part {
    Range own;   // that this warpgroup's rows see; at least one if any warpgroup's do
    Range full;  // where its rows see all
    int before;  // that the producer loads before its own ..
    int behind;  // .. and behind
};

// What follows the tiles in shared memory.
template <typename Traits>
struct Control {
    uint64_t k_full[Traits::kStages], k_empty[Traits::kStages];
    uint64_t v_full[Traits::kStages], v_empty[Traits::kStages];
    uint64_t q_full[Traits::kQStages], q_empty[Traits::kQStages];  // full: also the tile's Work is there
    Work works[Traits::kWorks];
    Part parts[4 * Traits::kConsumers][Traits::kParts];
    uint32_t noted[Traits::kMaxTiles / 32];  // tiles to mend, by their number in this block
    int taken[Traits::kMaxTiles];
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Tiles of keys that some row of a tile of queries sees.
template <typename Traits>
__device__ __forceinline__ Range key_tiles(const Visibility& sees, Range rows) {
    const Range keys = sees.keys_of(rows);
    if (keys.empty()) return {0, 0};
    return {keys.begin / Traits::kBlockN, ceil_div(keys.end, Traits::kBlockN)};
}

template <typename Traits>
__device__ __forceinline__ Range rows_of(const Work& work) {
    return {work.m_block * Traits::kBlockM, min((work.m_block + 1) * Traits::kBlockM, work.seqlen_q)};
}

// The warp that loads.
template <typename Traits>
struct Producer {
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;

    const HopperFwdParams& params;
    Control<Traits>& control;
    const uint32_t base;
    const int lane;
    Ring<Traits::kStages> k, v;
    Ring<Traits::kQStages> q;
    int number = 0;   // tiles published
    int wanted = 0;   // tiles taken, and at most kMaxTiles
    int ticket = 0;   // lane 0: the next tile's index, perhaps still on its way from memory
    int index = 0;    // of the tile taken last

    __device__ __forceinline__ void request() {
        const Schedule& schedule = params.schedule;
        if (wanted == Traits::kMaxTiles || (schedule.counters == nullptr && wanted > 0)) {
            ticket = schedule.tiles;
        } else if (schedule.counters == nullptr) {
            ticket = int(blockIdx.x);
        } else if (lane == 0) {
            ticket = int(atomicAdd(schedule.counters, 1u));
        }
    }

    // The tile of the last request().
    __device__ __forceinline__ Work take() {
        while (true) {
            index = __shfl_sync(~0u, ticket, 0);
            if (index >= params.schedule.tiles) break;
            const Work work = tile_at<Traits::kBlockM>(params.fwd.shape, params.schedule, index, lane);
            if (work.m_block >= 0 && !rows_of<Traits>(work).empty()) {
                ++wanted;
                return work;
            }
            if (params.schedule.counters == nullptr) break;
            request();
        }
        Work end = {};
        end.m_block = -1;
        return end;
    }

    // Hands a tile, or the end, to the consumers, and starts the copy of its q if they will need it.
    __device__ __forceinline__ void publish(Work work, bool copy) {
        mbarrier_wait(shared_address(&control.q_empty[q.stage()]), q.parity() ^ 1);
        if (lane == 0) {
            const uint32_t full = shared_address(&control.q_full[q.stage()]);
            work.number = number;
            control.works[number % Traits::kWorks] = work;
            if (work.m_block >= 0) control.taken[number] = index;
            if (copy) {
                mbarrier_arrive_expect(full, TileQ::kBytes);
                tma_load_tile<TileQ>(base + Traits::sQ + q.stage() * TileQ::kBytes, params.q, full,
                                     work.first_q + work.m_block * Traits::kBlockM, work.head,
                                     params.fwd.shape.cu_seqlens_q == nullptr ? work.batch : 0);
            } else {
                mbarrier_arrive(full);
            }
        }
        __syncwarp();
        q.advance();
        ++number;
    }

    __device__ __forceinline__ void load(Ring<Traits::kStages>& ring, uint64_t* full, uint64_t* empty, uint32_t tiles,
                                         const TensorMap& map, int row, int head, int batch) {
        mbarrier_wait(shared_address(&empty[ring.stage()]), ring.parity() ^ 1);
        if (lane == 0) {
            const uint32_t barrier = shared_address(&full[ring.stage()]);
            mbarrier_arrive_expect(barrier, TileK::kBytes);
            tma_load_tile<TileK>(base + tiles + ring.stage() * TileK::kBytes, map, barrier, row, head, batch);
        }
        __syncwarp();
        ring.advance();
    }

    __device__ __forceinline__ Range tiles_of(const Work& work) const {
        if (work.m_block < 0) return {0, 0};
        return key_tiles<Traits>(Visibility(params.fwd.shape, work.sequence(params.fwd.shape)), rows_of<Traits>(work));
    }

    __device__ __forceinline__ void run() {
        const Shape& shape = params.fwd.shape;
        // v of a step is loaded behind k of the next one: S never waits for a v.
        bool v_owed = false;
        int v_row = 0, v_head = 0, v_batch = 0;
        const auto load_v = [&] {
            if (v_owed) load(v, control.v_full, control.v_empty, Traits::sV, params.v, v_row, v_head, v_batch);
            v_owed = false;
        };
        request();
        Work next = take();
        if (Traits::kQStages > 1) publish(next, !tiles_of(next).empty());
        while (next.m_block >= 0) {
            const Work work = next;
            const Range tiles = tiles_of(work);
            bool taken = false, published = Traits::kQStages > 1;
            request();
            const auto go_on = [&] {
                next = take();
                if (Traits::kQStages > 1) publish(next, !tiles_of(next).empty());
                taken = true;
            };
            const int head = work.head / (shape.num_heads / shape.num_heads_k);
            const int batch = shape.cu_seqlens_q == nullptr ? work.batch : 0;
            for (int n = tiles.end - 1; n >= tiles.begin; --n) {
                const int row = work.first_k + n * Traits::kBlockN;
                load(k, control.k_full, control.k_empty, Traits::sK, params.k, row, head, batch);
                load_v();
                v_owed = true, v_row = row, v_head = head, v_batch = batch;
                if (!published) publish(work, true);
                published = true;
                if (!taken && n < tiles.end - 1) go_on();
            }
            // A warpgroup without rows lets v go by before it gives up its tile, for which publish() waits.
            if (tiles.empty()) load_v();
            if (!published) publish(work, false);
            if (!taken) go_on();
        }
        load_v();
        if (Traits::kQStages == 1) publish(next, false);
        finish();
    }

    // The last block to come here leaves the counters as it found them.
    __device__ __forceinline__ void finish() const {
        uint32_t* counters = params.schedule.counters;
        if (counters == nullptr || lane != 0) return;
        __threadfence();
        if (atomicAdd(&counters[1], 1u) == gridDim.x - 1) {
            __threadfence();
            counters[0] = 0;
            counters[1] = 0;
        }
    }
};

// A warpgroup that multiplies.
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
    int number = 0;        // of the block's tiles: the one in work
    bool settled = false;  // every row of this warp has a maximum to lag behind

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
        part.full = {ceil_div(common.begin, Traits::kBlockN), common.end / Traits::kBlockN};
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

    // The same, and then rescale() if `moved`, which is one value for the warp. Among instructions without a branch ptxas moves the
    // wait in front of the softmax that is to run meanwhile: this branch holds it back.
    template <typename Rescale>
    __device__ __forceinline__ void output_arrived(bool moved, const Rescale& rescale) {
        if (moved) {
            wgmma_wait<0, 1>();
            wgmma_arrived(o);
            rescale();
        } else {
            wgmma_wait<0, 2>();
            wgmma_arrived(o);
        }
        release(control.v_empty[v.stage()]);
        v.advance();
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
            // Of this thread's columns, counted from its first: those that the row sees.
            const int begin = this_row - sees.left - lane_col;
            const int end = min(this_row + sees.right + 1, sees.seqlen_k) - lane_col;
#pragma unroll
            for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = s.x[0][j][2 * half + e];
                    const int col = 8 * j + e;
                    if (Traits::kModified) x = scoring.apply(x, this_row, lane_col + col);
                    if (kMasked && (col < begin || col >= end)) x = -INFINITY;
                }
        }
    }

    __device__ __forceinline__ float factor() const { return Traits::kModified ? 1.f : params.fwd.shape.product_factor; }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int step = 0; step < Traits::kBlockN / 16; ++step) to_a_operand<T>(p[step], s.x[0], step);
    }

    // S of tile n of keys, masked if need be, becomes weights, and o is rescaled where a maximum has grown: from the maximum of all
    // scores so far.
    template <bool kMasked>
    __device__ __forceinline__ void exact_step(int n, bool fresh) {
        start_scores(number);
        start_output(fresh);
        scores_arrived<1>();
        modify<kMasked>(number, n);
        const float max[2] = {softmax.max[0][0], softmax.max[0][1]};
        const float rescale[2] = {softmax.scores(s, 0, 0, factor()), softmax.scores(s, 0, 1, factor())};
        const bool grew = __any_sync(~0u, softmax.max[0][0] != max[0] || softmax.max[0][1] != max[1]);
        settle();
        output_arrived(grew, [&] {
            softmax.rescale(o, 0, 0, rescale[0]);
            softmax.rescale(o, 0, 1, rescale[1]);
        });
        round_weights();
    }

    // The same where nothing is hidden and every row has a maximum: from that.
    __device__ __forceinline__ void lagging_step(bool fresh) {
        start_scores(number);
        start_output(fresh);
        scores_arrived<1>();
        const bool outgrown = __any_sync(~0u, softmax.lagging_scores(s, 0, factor()));
        output_arrived(outgrown, [&] {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float rescale = softmax.catch_up(0, half, factor());
                softmax.rescale(s, 0, half, rescale);
                softmax.rescale(o, 0, half, rescale);
            }
        });
        round_weights();
    }

    __device__ __forceinline__ void settle() {
        if (Traits::kLags) settled = __all_sync(~0u, fminf(softmax.max[0][0], softmax.max[0][1]) != -INFINITY);
    }

    // All steps of a tile but the first. Whether there were none: o is still to be begun.
    __device__ __forceinline__ bool steps() {
        const Part& part = part_of(anew(number));
        bool fresh = true;
        for (int n = part.own.end - 2; n >= part.own.begin;) {
            const int first_full = n < part.full.end ? max(part.own.begin, part.full.begin) : n + 1;
            if constexpr (Traits::kLags) {
                for (; settled && n >= first_full; --n, fresh = false) lagging_step(fresh);
                if (n >= part.own.begin) exact_step<true>(n--, fresh), fresh = false;
            } else {
                for (; n >= first_full; --n, fresh = false) exact_step<false>(n, fresh);
                if (n >= part.own.begin) exact_step<true>(n--, fresh), fresh = false;
            }
        }
        return fresh;
    }

    // The first softmax of tile `number`, over the S that has arrived.
    __device__ __forceinline__ void first_softmax(int number) {
        const Part& part = part_of(number);
        const int n = part.own.end - 1;
        if (n < part.full.begin || n >= part.full.end) {
            modify<true>(number, n);
        } else {
            modify<false>(number, n);
        }
        softmax.clear();
        softmax.scores(s, 0, 0, factor());
        softmax.scores(s, 0, 1, factor());
        settle();
    }

    // Lets tiles of keys go by that none of this warpgroup's rows sees.
    __device__ __forceinline__ void pass_k(int count) {
        for (; count > 0; --count) {
            mbarrier_wait(shared_address(&control.k_full[k.stage()]), k.parity());
            release(control.k_empty[k.stage()]);
            k.advance();
        }
    }

    __device__ __forceinline__ void pass_v(int count) {
        for (; count > 0; --count) {
            mbarrier_wait(shared_address(&control.v_full[v.stage()]), v.parity());
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
        T* to = row_of<T>(params.fwd.o, params.fwd.o_strides, work.batch, work.first_q, work.head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + fragment_row(lane, half);
            const bool blind = sees.keys(row).empty();
            const float scale = blind ? 0.f : 1.f / statistics.sum[0][half];
            const bool stored = row < work.seqlen_q;
            if (lane % 4 == 0 && stored) lse[row] = blind ? -INFINITY : statistics.lse(0, half, factor());
            T* to_row = to + row * params.fwd.o_strides.row;
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

    // Whether the first S of tile `next` may start before the last product of the one in work. The warpgroup then passes the tiles
    // of k between them with a v still to come: with two stages the producer gets three ahead of that v, so two may be passed.
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
            scores_arrived<0>();
            first_softmax(number);
            round_weights();
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
                    scores_arrived<0>();
                    first_softmax(number + 1);
                    round_weights();
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

template <typename Traits>
__device__ __forceinline__ void forward(const HopperFwdParams& params) {
    extern __shared__ __align__(1024) uint8_t shared[];
    Control<Traits>& control = *reinterpret_cast<Control<Traits>*>(shared + Traits::kSharedBytes - Traits::kControlBytes);
    static_assert(sizeof(Control<Traits>) <= Traits::kControlBytes, "it must fit behind the tiles");
    const uint32_t base = shared_address(shared);
    // One value for all lanes: branches on it are the warp's.
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    if (threadIdx.x == 0) {
        constexpr int kWarpsThatRead = 4 * Traits::kConsumers;
        for (int i = 0; i < Traits::kStages; ++i) {
            mbarrier_init(shared_address(&control.k_full[i]), 1);
            mbarrier_init(shared_address(&control.v_full[i]), 1);
            mbarrier_init(shared_address(&control.k_empty[i]), kWarpsThatRead);
            mbarrier_init(shared_address(&control.v_empty[i]), kWarpsThatRead);
        }
        for (int i = 0; i < Traits::kQStages; ++i) {
            mbarrier_init(shared_address(&control.q_full[i]), 1);
            mbarrier_init(shared_address(&control.q_empty[i]), kWarpsThatRead);
        }
        mbarrier_fence_init();
        tma_prefetch(params.q);
        tma_prefetch(params.k);
        tma_prefetch(params.v);
    }
    if (threadIdx.x < Traits::kMaxTiles / 32) control.noted[threadIdx.x] = 0;
    __syncthreads();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) Producer<Traits>{params, control, base, lane}.run();
        return;
    }
    take_registers<Traits::kConsumerRegisters>();
    const int group = warp / 4 - 1;
    Consumer<Traits>{params, control, base, group, warp % 4, lane}.run();
    bar_sync<128 * Traits::kConsumers>(1);  // 0 is __syncthreads; what any warp has noted is there
    uint32_t any = 0;
    for (int i = 0; i < Traits::kMaxTiles / 32; ++i) any |= control.noted[i];
    if (any != 0) mend<Traits>(params, control.noted, control.taken, Traits::kGroupRows * group + 16 * (warp % 4), lane);
}

}  // namespace fa2::sm90
