// Kernels for the bench that lack FlashAttention-2's contributions: each of the three is left out alone, and then all of them.
//
//     variant      rescales o           a block takes    warps split
//     none         at the end, by lse   a tile           queries        as ours: shows what else differs from our kernels
//     rescale      at every step        a tile           queries        non-matmul work (paper, 3.1)
//     heads_only   at the end, by lse   a head           queries        parallelism (3.2)
//     split_k      at the end, by lse   a tile           keys           work of warps (3.3)
//     flash1       at every step        a head           keys           FlashAttention-1, except for the order of its loops
//
// In the backward, max_and_sum takes the place of rescale: P comes from max and sum instead of lse. flash1 is that with heads_only.
//
// Compiled for one element type and head_dim at a time, with -I cuda: -DABLATION_TYPE=bf16 -DABLATION_HEAD_DIM=128.
#include "backward.cuh"
#include "forward.cuh"

using namespace fa2;
using namespace fa2::sm80;
using namespace fa2::ablations;

// The tiles of cuda/instances.def, so that nothing else differs. tests/docs/ablations.rs compares them.
#if ABLATION_HEAD_DIM == 64
using SplitQ = sm80::FwdTraits<ABLATION_TYPE, 64, 128, 128, 4, 1, NoScoreMod>;
using FromLse = sm80::BwdTraits<ABLATION_TYPE, 64, 32, 128, 4, 1, 2, 1, 4, 1, NoScoreMod>;
#elif ABLATION_HEAD_DIM == 128
using SplitQ = sm80::FwdTraits<ABLATION_TYPE, 128, 128, 64, 4, 1, NoScoreMod>;
using FromLse = sm80::BwdTraits<ABLATION_TYPE, 128, 64, 128, 8, 1, 2, 2, 4, 4, NoScoreMod>;
#endif
using SplitKeys = SplitKTraits<ABLATION_TYPE, ABLATION_HEAD_DIM>;
using FromMaxAndSum = MaxAndSumTraits<FromLse>;

// The numbers that the host needs for a launch: tile of queries, tile of keys, threads and bytes of shared memory.
#define LAUNCH(name, Traits)                                                                                    \
    extern "C" __constant__ int name##_launch[4] = {Traits::kBlockM, Traits::kBlockN, Traits::kThreads, Traits::kSharedBytes};

#define FORWARD(name, Traits, kRescale, kGrid)                                                      \
    LAUNCH(name, Traits)                                                                            \
    extern "C" __global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)              \
    name(const __grid_constant__ FwdParams params, const __grid_constant__ Statistics statistics) { \
        ablations::forward<Traits, kRescale, kGrid>(params, statistics);                                       \
    }

#define BACKWARD(name, Block, Traits, kGrid)                                                            \
    LAUNCH(name, Traits)                                                                            \
    extern "C" __global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)              \
    name(const __grid_constant__ BwdParams params, const __grid_constant__ Statistics statistics) { \
        ablations::backward<Block<Traits>, kGrid>(params, statistics);                                                \
    }

FORWARD(fwd_none, SplitQ, Rescale::kAtTheEnd, Grid::kTiles)
FORWARD(fwd_rescale, SplitQ, Rescale::kEveryStep, Grid::kTiles)
FORWARD(fwd_heads_only, SplitQ, Rescale::kAtTheEnd, Grid::kHeads)
FORWARD(fwd_split_k, SplitKeys, Rescale::kAtTheEnd, Grid::kTiles)
FORWARD(fwd_flash1, SplitKeys, Rescale::kEveryStep, Grid::kHeads)

BACKWARD(bwd_none, LseBlock, FromLse, Grid::kTiles)
BACKWARD(bwd_max_and_sum, MaxAndSumBlock, FromMaxAndSum, Grid::kTiles)
BACKWARD(bwd_heads_only, LseBlock, FromLse, Grid::kHeads)
BACKWARD(bwd_flash1, MaxAndSumBlock, FromMaxAndSum, Grid::kHeads)
