//! Device memory of new tensors and of existing tensors.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, StorageRef, Tensor};

use crate::node;

/// Uninitialised memory, at least one element, because the driver refuses to allocate 0 bytes.
pub(super) fn uninit(device: &CudaDevice, len: usize, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: the kernel that gets this memory writes every element of the tensor. Nothing reads it before.
    unsafe { device.alloc_uninit(&Shape::from(len.max(1)), dtype) }
}

/// As [`uninit`], but zeros.
pub(super) fn zeros(device: &CudaDevice, len: usize, dtype: DType) -> Result<CudaStorage> {
    device.zeros_impl(&Shape::from(len.max(1)), dtype)
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

    /// The number of the tensor's elements.
    pub(super) fn size(&self) -> usize {
        self.layout.shape().elem_count()
    }
}

/// Whether every row of `width` elements of contiguous `tensors` begins at 16 bytes. Memory of the driver does.
pub(super) fn aligned<'a>(mut tensors: impl Iterator<Item = &'a Locked<'a>>, width: usize) -> bool {
    tensors.all(|tensor| {
        let bytes = tensor.storage().dtype().size_in_bytes();
        (tensor.start() * bytes).is_multiple_of(16) && (width * bytes).is_multiple_of(16)
    })
}

/// A contiguous copy of `tensor` that begins at 16 bytes, or `tensor` itself.
pub(super) fn vectors(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    match (tensor.layout().start_offset() * tensor.dtype().size_in_bytes()).is_multiple_of(16) {
        true => Ok(tensor),
        false => tensor.force_contiguous(), // `copy` would keep the start
    }
}
