//! The loss of a linear layer never holds all logits. A test target of its own, because it counts all memory of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_ops::CrossEntropy;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all memory comes from `System` and goes back to it, with the same layouts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `memory` is from `alloc` with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn the_loss_of_a_linear_layer_holds_one_chunk_of_logits() -> Result<()> {
    const ROWS: usize = 512;
    const VOCAB: usize = 20_000;
    const CHUNK: usize = 1 << 20;
    for dtype in [DType::F32, DType::BF16] {
        let x = Var::ones((ROWS, 4), dtype, &Device::Cpu)?;
        let weight = Var::ones((VOCAB, 4), dtype, &Device::Cpu)?;
        let targets = Tensor::zeros(ROWS, DType::U32, &Device::Cpu)?;
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        CrossEntropy::new().chunk_bytes(CHUNK).forward_linear(&x, &weight, &targets)?.backward()?;
        let peak = PEAK.load(Ordering::Relaxed) - before;
        // The chunk, and a few tensors as large as the weight in f32: its copy, the sum and the part of a chunk.
        let limit = 2 * CHUNK + 8 * VOCAB * 4 * 4;
        assert!(peak <= limit, "{peak} bytes in {dtype:?}, limit {limit}");
        assert!(limit < ROWS * VOCAB * 4 / 4, "all logits would need four times the limit");
    }
    Ok(())
}
