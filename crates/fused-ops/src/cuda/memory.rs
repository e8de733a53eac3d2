//! Device memory of new tensors and of existing tensors.

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, StorageRef, Tensor};

use crate::node;

/// Uninitialised memory, at least one element, because the driver refuses to allocate 0 bytes.
pub(super) fn uninit(device: &CudaDevice, len: usize, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: the kernel that gets this memory writes every element of the tensor. Nothing reads it before.
    unsafe { device.alloc_uninit(&Shape::from(len.max(1)), dtype) }
}

/// Memory that a kernel has written, as a tensor that no gradient flows through.
pub(super) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    node::untracked(Storage::Cuda(storage), shape)
}

/// The storage of a contiguous tensor on the GPU, locked against writers while this exists.
pub(super) struct Locked<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Locked<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Self {
        debug_assert!(tensor.is_contiguous());
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(super) fn storage(&self) -> &CudaStorage {
        match &*self.storage {
            Storage::Cuda(storage) => storage,
            _ => unreachable!("check::same_device has compared the devices"),
        }
    }

    /// The index of the tensor's first element in the storage.
    pub(super) fn start(&self) -> usize {
        self.layout.start_offset()
    }
}
