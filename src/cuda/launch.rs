//! Launches a kernel. No other module does.

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda::CudaDType;
use candle_core::CudaStorage;

use super::driver::error_name;
use super::module;
use super::params::{Params, NULL};
use crate::error::{Error, Result};
use crate::plan::{Launch, MAX_GRID_YZ};

/// Collects the addresses for the arguments of one launch. It holds cudarc's guards until the kernel is queued, so earlier writes
/// finish first and later uses wait. The borrows keep the memory alive.
pub(super) struct Launcher<'a> {
    stream: &'a std::sync::Arc<CudaStream>,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Launcher<'a> {
    pub fn new(stream: &'a std::sync::Arc<CudaStream>) -> Self {
        Self { stream, guards: Vec::new() }
    }

    /// Address of memory that the kernel reads.
    pub fn read<T>(&mut self, slice: &'a CudaSlice<T>) -> CUdeviceptr {
        let (address, guard) = slice.device_ptr(self.stream);
        self.guards.push(guard);
        address
    }

    /// Address of element `offset` of a storage that the kernel reads.
    pub fn read_storage<T: CudaDType + 'a>(
        &mut self,
        storage: &'a CudaStorage,
        offset: usize,
    ) -> candle_core::Result<CUdeviceptr> {
        Ok(self.read(T::as_cuda_slice(storage)?) + (offset * size_of::<T>()) as CUdeviceptr)
    }

    /// Address of memory that the kernel writes.
    pub fn write<T>(&mut self, slice: &'a mut CudaSlice<T>) -> CUdeviceptr {
        let (address, guard) = slice.device_ptr_mut(self.stream);
        self.guards.push(guard);
        address
    }

    /// Queues the kernel, once per `MAX_GRID_YZ` sequences: gridDim.z counts them. An empty grid queues nothing, because the driver refuses it.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refuses the kernel, or if an earlier kernel has failed.
    pub fn launch<P: Params>(self, launch: &Launch, params: &P) -> Result<()> {
        let sequences = launch.grid.2;
        for first in (0..sequences).step_by(MAX_GRID_YZ) {
            let count = (sequences - first).min(MAX_GRID_YZ as u32);
            let mut params = *params;
            params.shape_mut().first_batch = first as i32;
            let (x, y, _) = launch.grid;
            self.queue(&Launch { grid: (x, y, count), ..*launch }, &params)?;
        }
        Ok(())
    }

    fn queue<P: Params>(&self, launch: &Launch, params: &P) -> Result<()> {
        let Launch { kernel, grid, .. } = *launch;
        assert_eq!(kernel.params, P::KIND, "{} takes other parameters", kernel.name);
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let function = module::function(self.stream.context(), kernel)?;
        let config = LaunchConfig {
            grid_dim: grid,
            block_dim: (kernel.threads() as u32, 1, 1),
            shared_mem_bytes: kernel.shared_bytes as u32,
        };
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(params);
        // SAFETY: this struct is the kernel's only argument; the assert above checks its name, and both compilers assert its
        // layout. Its addresses point to memory that `self` borrows, or to counters that are never freed. `Problem` and `Plan`
        // have checked shapes and strides, and `readable_grad` those of do. The kernel writes only memory from `write`, and the
        // counters. `Plan` chose a kernel whose tiles, threads and shared memory fit the GPU.
        let queued = unsafe { builder.launch(config) };
        queued.map(drop).map_err(|error| Error::Driver {
            action: "launch",
            kernel: kernel.name,
            cause: error_name(error),
            detail: launch.to_string(),
        })
    }
}

/// The address of optional memory, or [`NULL`].
pub(super) fn address_or_null<M>(
    memory: Option<M>,
    address: impl FnOnce(M) -> candle_core::Result<CUdeviceptr>,
) -> candle_core::Result<CUdeviceptr> {
    memory.map_or(Ok(NULL), address)
}
