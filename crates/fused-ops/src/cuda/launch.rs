//! Collects the arguments of a kernel and queues it. No other module calls [`launch_early`].

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, SyncOnDrop};
use candle_core::cuda::{CudaStorageSlice, WrapErr};
use candle_core::{CudaStorage, Result};

use super::early::launch_early;
use super::memory::Locked;
use super::module::{self, error_name};
use super::params::NULL;
use crate::check;

/// Collects the addresses for the arguments of launches. It holds cudarc's guards until they are queued, so earlier writes finish
/// first and later uses wait. The borrows keep the memory alive.
pub(super) struct Launcher<'a> {
    stream: &'a Arc<CudaStream>,
    guards: Vec<SyncOnDrop<'a>>,
}

/// `blocks` blocks of `threads` threads in one row, without dynamic shared memory.
pub(super) fn grid(blocks: usize, threads: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (threads as u32, 1, 1), shared_mem_bytes: 0 }
}

/// Evaluates an expression for the slice inside a [`CudaStorageSlice`], whatever its element type.
macro_rules! for_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            CudaStorageSlice::U8($slice) => $body,
            CudaStorageSlice::U32($slice) => $body,
            CudaStorageSlice::I64($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F64($slice) => $body,
            _ => unreachable!("the operators have no tensors of other types"),
        }
    };
}

impl<'a> Launcher<'a> {
    pub(super) fn new(stream: &'a Arc<CudaStream>) -> Self {
        Self { stream, guards: Vec::new() }
    }

    /// Address of the first element of a tensor that the kernel reads.
    pub(super) fn read(&mut self, tensor: &'a Locked) -> CUdeviceptr {
        let storage = tensor.storage();
        let (address, guard) = for_slice!(&storage.slice, slice => slice.device_ptr(self.stream));
        self.guards.push(guard);
        address + (tensor.start() * storage.dtype().size_in_bytes()) as CUdeviceptr
    }

    /// [`Self::read`], or [`NULL`].
    pub(super) fn read_or_null(&mut self, tensor: Option<&'a Locked>) -> CUdeviceptr {
        tensor.map_or(NULL, |tensor| self.read(tensor))
    }

    /// Address of memory that the kernel writes.
    pub(super) fn write(&mut self, storage: &'a mut CudaStorage) -> CUdeviceptr {
        let (address, guard) = for_slice!(&mut storage.slice, slice => slice.device_ptr_mut(self.stream));
        self.guards.push(guard);
        address
    }

    /// [`Self::write`], or [`NULL`].
    pub(super) fn write_or_null(&mut self, storage: Option<&'a mut CudaStorage>) -> CUdeviceptr {
        storage.map_or(NULL, |storage| self.write(storage))
    }

    /// [`Self::queue`], and gives the memory back.
    ///
    /// # Safety
    /// As [`Self::queue`].
    ///
    /// # Errors
    /// As [`Self::queue`].
    pub(super) unsafe fn launch<P: DeviceRepr>(
        self,
        file: &'static str,
        name: &str,
        config: LaunchConfig,
        params: &P,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.queue(file, name, config, params) }
    }

    /// Queues the kernel `name` of the file `cuda/FILE.cu`. An empty grid queues nothing, because the driver refuses it.
    ///
    /// # Safety
    /// `params` is the kernel's struct, its addresses are from this launcher, and their memory has the shapes that cuda/params.h
    /// tells for its sizes. Block and shared memory are those that the kernel expects.
    ///
    /// # Errors
    /// If the kernel cannot be loaded, if the driver refuses it, or if an earlier kernel has failed.
    pub(super) unsafe fn queue<P: DeviceRepr>(
        &self,
        file: &'static str,
        name: &str,
        config: LaunchConfig,
        params: &P,
    ) -> Result<()> {
        if config.grid_dim.0 == 0 || config.grid_dim.1 == 0 {
            return Ok(());
        }
        let function = module::function(self.stream.context(), file, name)?;
        if config.shared_mem_bytes > 48 << 10 {
            // More than 48 KiB must be enabled per function.
            let enabled =
                function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, config.shared_mem_bytes as i32);
            enabled.w()?;
        }
        // SAFETY: as the caller promises; the struct is the only argument of every kernel, and `KERNEL` of cuda/core.cuh waits.
        let queued = unsafe { launch_early(self.stream, &function, config, params) };
        queued.map_err(|error| {
            let LaunchConfig { grid_dim, block_dim, shared_mem_bytes } = config;
            check::error(format!(
                "launch {name} failed: {}; grid {grid_dim:?}, block {block_dim:?}, shared {shared_mem_bytes} bytes",
                error_name(error)
            ))
        })
    }
}
