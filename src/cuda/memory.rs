//! Device memory of new tensors and of existing tensors.

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda::CudaDType;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};

use super::launch::Launcher;

/// Element types with kernels.
pub(super) trait Element: CudaDType + DeviceRepr + ValidAsZeroBits + WithDType {}
impl Element for f16 {}
impl Element for bf16 {}
impl Element for f32 {}

/// Uninitialised memory, at least one element, because the driver refuses to allocate 0 bytes.
pub(super) fn uninit<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every element is written before it is read. Kernels write `o`, `lse`, `delta`, `dq`, `dk` and `dv` for every row.
    // With key lengths, `dk` and `dv` are allocated by `zeros`. A copy writes the lse of the flat result.
    unsafe { device.alloc::<T>(len.max(1)) }
}

/// Zeroed memory, at least one element, because the driver refuses to allocate 0 bytes.
pub(super) fn zeros<T: DeviceRepr + ValidAsZeroBits>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    device.alloc_zeros::<T>(len.max(1))
}

/// The storage of a tensor on the GPU, locked against writers.
pub(super) struct Locked<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Locked<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(super) fn storage(&self) -> &CudaStorage {
        match &*self.storage {
            Storage::Cuda(storage) => storage,
            _ => unreachable!("Problem admits one device"),
        }
    }

    /// The address of the tensor's first element, for a kernel that reads it.
    pub(super) fn read<'b, T: CudaDType + 'b>(&'b self, launcher: &mut Launcher<'b>) -> Result<CUdeviceptr> {
        launcher.read_storage::<T>(self.storage(), self.layout.start_offset())
    }
}
