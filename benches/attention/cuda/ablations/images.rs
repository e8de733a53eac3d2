//! The kernels of benches/ablations, compiled for this GPU, and the crate's own kernels.

use std::sync::Arc;
use std::{fs, thread};

use anyhow::{bail, Context, Result};
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
use candle_core::cuda::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda::cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use candle_core::DType;
use candle_fa2::testing::{self, CudaPlan};
use kernel_build::nvcc::Nvcc;

use super::super::gpu::Gpu;
use crate::cases::{Case, Pass};

/// A kernel of ablations.cu. That file describes each of them.
pub struct Variant {
    pub name: &'static str,
    pub pass: Pass,
    /// A thread block takes all tiles of its head.
    pub heads_only: bool,
    /// The forward writes row maxima and row sums instead of lse, and the backward reads them.
    pub max_and_sum: bool,
}

const fn variant(name: &'static str, pass: Pass, heads_only: bool, max_and_sum: bool) -> Variant {
    Variant { name, pass, heads_only, max_and_sum }
}

/// The forward whose row maxima and row sums the backwards read.
pub static RESCALE: Variant = variant("rescale", Pass::Forward, false, true);

static VARIANTS: [&Variant; 9] = [
    &variant("none", Pass::Forward, false, false),
    &RESCALE,
    &variant("heads_only", Pass::Forward, true, false),
    &variant("split_k", Pass::Forward, false, false),
    &variant("flash1", Pass::Forward, true, true),
    &variant("none", Pass::Backward, false, false),
    &variant("max_and_sum", Pass::Backward, false, true),
    &variant("heads_only", Pass::Backward, true, false),
    &variant("flash1", Pass::Backward, true, true),
];

impl Variant {
    pub fn of(pass: Pass) -> impl Iterator<Item = &'static Self> {
        VARIANTS.into_iter().filter(move |variant| variant.pass == pass)
    }

    /// Its name in ablations.cu.
    pub fn symbol(&self) -> String {
        format!("{}_{}", self.pass, self.name)
    }
}

/// A kernel and the numbers for its launch.
pub struct Kernel {
    pub function: CudaFunction,
    pub pass: Pass,
    /// `None` for the crate's own kernels. Their only argument is the parameters. A variant also takes
    /// [`super::call::Statistics`].
    pub variant: Option<&'static Variant>,
    pub block_m: usize,
    pub block_n: usize,
    pub threads: usize,
    pub shared_bytes: usize,
}

impl Kernel {
    /// The crate's own kernel for a pass.
    pub fn ours(plan: &CudaPlan, pass: Pass, context: &Arc<CudaContext>) -> Result<Self> {
        let of_crate = if pass == Pass::Forward { testing::Pass::Forward } else { testing::Pass::Backward };
        let launch = plan.launch(of_crate).with_context(|| format!("no kernel computes {pass}"))?;
        Self::of_crate(launch.kernel, pass, context)
    }

    /// Any kernel of the crate.
    pub fn of_crate(kernel: &'static testing::Kernel, pass: Pass, context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self {
            function: testing::cuda::function(context, kernel)?,
            pass,
            variant: None,
            block_m: kernel.block_m,
            block_n: kernel.block_n,
            threads: kernel.threads(),
            shared_bytes: kernel.shared_bytes,
        })
    }

    pub fn max_and_sum(&self) -> bool {
        self.variant.is_some_and(|variant| variant.max_and_sum)
    }

    /// Thread blocks for `case`.
    pub fn grid(&self, case: &Case) -> (u32, u32, u32) {
        let rows = if self.pass == Pass::Forward { self.block_m } else { self.block_n };
        let heads_only = self.variant.is_some_and(|variant| variant.heads_only);
        let tiles = if heads_only { 1 } else { case.seqlens().0.div_ceil(rows) };
        (tiles as u32, case.num_heads as u32, case.batch as u32)
    }
}

/// The kernels of ablations.cu for some head_dims and one element type.
pub struct Images {
    modules: Vec<(usize, Arc<CudaModule>)>,
    stream: Arc<CudaStream>,
    /// The most shared memory of a thread block.
    shared_limit: usize,
}

const SOURCE: &str = "benches/ablations/ablations.cu";

// `SOURCES`: this file and its headers. build.rs embeds them, so that the bench runs without the repository.
include!(concat!(env!("OUT_DIR"), "/ablations.rs"));

impl Images {
    /// Compiles the kernels of all head_dims in parallel, and loads them.
    ///
    /// # Errors
    /// If nvcc or the driver fails.
    pub fn compile(nvcc: &Nvcc, dtype: DType, cases: &[Case], gpu: &Gpu) -> Result<Self> {
        let stream = gpu.device.as_cuda_device()?.cuda_stream();
        let context = stream.context();
        let (major, minor) = context.compute_capability()?;
        let folder = tempfile::tempdir()?;
        for (path, text) in SOURCES {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().context("every source lies in a folder")?)?;
            fs::write(path, text)?;
        }
        let mut head_dims: Vec<usize> = cases.iter().map(|case| case.head_dim).collect();
        head_dims.sort_unstable();
        head_dims.dedup();
        let compile = |head_dim: usize| -> Result<Vec<u8>> {
            let cubin = folder.path().join(format!("d{head_dim}.cubin"));
            let (source, include) = (folder.path().join(SOURCE), folder.path().join("cuda"));
            let defines = [format!("-DABLATION_TYPE={}", dtype.as_str()), format!("-DABLATION_HEAD_DIM={head_dim}")];
            nvcc.cubin(&source, &cubin, &format!("{major}{minor}"), &[&include], &defines)?;
            Ok(fs::read(cubin)?)
        };
        let compiled: Vec<Result<Vec<u8>>> = thread::scope(|scope| {
            let jobs: Vec<_> = head_dims.iter().map(|&head_dim| scope.spawn(move || compile(head_dim))).collect();
            jobs.into_iter().map(|job| job.join().expect("compiling does not panic")).collect()
        });
        let mut modules = Vec::new();
        for (head_dim, image) in head_dims.into_iter().zip(compiled) {
            modules.push((head_dim, context.load_module(Ptx::from_binary(image?))?));
        }
        let shared_limit = context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        Ok(Self { modules, stream, shared_limit })
    }

    /// A variant for the head_dim of `case`. Prints a line and returns `None` if the GPU has too little shared memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn kernel(&self, case: &Case, variant: &'static Variant) -> Result<Option<Kernel>> {
        let module = self.module(case)?;
        let symbol = variant.symbol();
        let launch = module.get_global(&format!("{symbol}_launch"), &self.stream)?;
        let launch = self.stream.clone_dtoh(&launch)?;
        let numbers: Vec<i32> = launch.chunks_exact(4).map(|x| i32::from_ne_bytes([x[0], x[1], x[2], x[3]])).collect();
        let [block_m, block_n, threads, shared_bytes] = numbers[..] else {
            bail!("{symbol}_launch has {} numbers", numbers.len());
        };
        let shared_limit = self.shared_limit;
        if shared_bytes as usize > shared_limit {
            println!(
                "SKIPPED: {symbol} needs {shared_bytes} bytes of shared memory, a thread block has {shared_limit}"
            );
            return Ok(None);
        }
        let function = module.load_function(&symbol)?;
        // The driver requires this for more than 48 KB.
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)?;
        let [block_m, block_n, threads, shared_bytes] =
            [block_m, block_n, threads, shared_bytes].map(|number| number as usize);
        Ok(Some(Kernel {
            function,
            pass: variant.pass,
            variant: Some(variant),
            block_m,
            block_n,
            threads,
            shared_bytes,
        }))
    }

    fn module(&self, case: &Case) -> Result<&Arc<CudaModule>> {
        let found = self.modules.iter().find(|(head_dim, _)| *head_dim == case.head_dim);
        Ok(&found.context("every case's head_dim is compiled")?.1)
    }
}
