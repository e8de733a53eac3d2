// Clusters of two thread blocks (PTX ISA, "Cluster of Cooperative Thread Arrays"). Each block can write to the shared memory of the other,
// its peer.
#pragma once

#include <cstdint>

namespace fa2::sm90 {

// The bits of a shared address that a wgmma descriptor holds. In a cluster, the bits above them are the rank of the block.
constexpr uint32_t kOffsetInBlock = 0x3ffff;

// The rank of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// The address that the peer's shared memory at `shared` has in the cluster.
__device__ __forceinline__ uint32_t peer_address(uint32_t shared, int peer) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(peer));
    return address;
}

// All threads of both blocks wait for each other. Writes before it are visible after it.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Starts to store a word in the peer's shared memory. `to` and `barrier` are addresses of peer_address(); the barrier counts the bytes.
__device__ __forceinline__ void store_to_peer(uint32_t to, uint32_t value, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(value), "r"(barrier)
                 : "memory");
}

// Arrives at a barrier of the peer. `barrier` is an address of peer_address(). It publishes no data, it only says that a stage is free: a
// release at cluster scope would cost 7% (head_dim 256 without the additions to dq_accum, H200).
__device__ __forceinline__ void mbarrier_arrive_peer(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Starts a copy of `size_bytes` to the peer. `to` and `barrier` are addresses of peer_address(); the barrier counts the bytes.
__device__ __forceinline__ void copy_to_peer(uint32_t to, uint32_t from, int size_bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "r"(from),
                 "r"(size_bytes), "r"(barrier)
                 : "memory");
}

}  // namespace fa2::sm90
