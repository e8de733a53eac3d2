//! The machine: its name, and its rate of matrix products.

use std::sync::Mutex;

use anyhow::{ensure, Result};
use attention_reference::draw;
use rand::Rng;

use crate::timing::{on_pool, seconds, Job};

/// Cores, rayon's threads and the CPU's name, in one line.
pub fn describe() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown CPU", |(_, model)| model.trim());
    format!("{model}, {cores} cores, {} rayon threads", rayon::current_num_threads())
}

/// The ceiling: a product of two square f32 matrices by the `gemm` crate, on which both Candle and this crate run.
pub struct Gemm {
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    out: Mutex<Vec<f32>>,
}

impl Gemm {
    /// Rows and columns. The `gemm` crate reaches its best rate at this size; a product takes 6.7 ms on two cores of a Sapphire
    /// Rapids Xeon.
    pub const SIZE: usize = 1024;
    pub const FLOP: f64 = 2.0 * (Self::SIZE * Self::SIZE * Self::SIZE) as f64;

    /// Random matrices whose product has been checked.
    ///
    /// # Errors
    /// If a sampled element is not the product's.
    pub fn new() -> Result<Self> {
        let mut rng = draw::generator("gemm");
        let len = Self::SIZE * Self::SIZE;
        let mut matrix = || (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let gemm = Self { lhs: matrix(), rhs: matrix(), out: Mutex::new(vec![0.0; len]) };
        for parallelism in [gemm::Parallelism::None, gemm::Parallelism::Rayon(0)] {
            gemm.multiply(parallelism);
            gemm.check()?;
        }
        Ok(gemm)
    }

    /// The product on the threads of the current pool.
    pub fn job(&self, pool: Option<std::sync::Arc<rayon::ThreadPool>>) -> Job<'_> {
        let multiply = move || {
            let parallelism = match rayon::current_num_threads() {
                1 => gemm::Parallelism::None,
                threads => gemm::Parallelism::Rayon(threads),
            };
            seconds(|| {
                self.multiply(parallelism);
                Ok(())
            })
        };
        let threads = pool.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads());
        Job { run: on_pool(pool, multiply), known_s: None, threads }
    }

    fn multiply(&self, parallelism: gemm::Parallelism) {
        let mut out = self.out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (size, stride) = (Self::SIZE, Self::SIZE as isize);
        // SAFETY: three matrices of `size` x `size`, row after row, and `out` is borrowed alone.
        unsafe {
            gemm::gemm(
                size,
                size,
                size,
                out.as_mut_ptr(),
                1,
                stride,
                false,
                self.lhs.as_ptr(),
                1,
                stride,
                self.rhs.as_ptr(),
                1,
                stride,
                0f32,
                1f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    }

    fn check(&self) -> Result<()> {
        let out = self.out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let size = Self::SIZE;
        for index in (0..size).map(|row| row * size + (row * 37) % size) {
            let (row, col) = (index / size, index % size);
            let product =
                |inner: usize| f64::from(self.lhs[row * size + inner]) * f64::from(self.rhs[inner * size + col]);
            let want: f64 = (0..size).map(product).sum();
            let got = f64::from(out[index]);
            // One rounding step at 1 for each addition: rounding adds far less, one lost product far more.
            let limit = size as f64 * f64::from(f32::EPSILON);
            ensure!((got - want).abs() <= limit, "gemm: {got} where {want} is right, at [row {row}, col {col}]");
        }
        Ok(())
    }
}
