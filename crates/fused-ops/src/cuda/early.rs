//! Kernels that start while the kernel before them ends.

use std::ffi::c_void;
use std::ptr::null_mut;

use candle_core::cuda::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION;
use candle_core::cuda::cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
};
use candle_core::cuda::cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig};

/// The first architecture with programmatic dependent launch, as CUDA numbers them.
const FIRST: i32 = 90;

/// Queues a kernel with one argument. From Hopper on, it may start before the kernel before it in the stream has ended. This hides its
/// launch: it saved 3 us of a norm's forward (H200). On older GPUs it starts after that kernel. So does a kernel that was compiled for
/// older GPUs, because it has no instruction to wait.
///
/// # Errors
/// Those of cuLaunchKernelEx.
///
/// # Safety
/// - The kernel takes one argument, laid out as `P`, and its addresses are valid until the kernel has ended.
/// - If it was compiled for Hopper or later, the kernel executes `griddepcontrol.wait` before it reads or writes global memory, as
///   `KERNEL` of cuda/core.cuh does.
pub(super) unsafe fn launch_early<P: DeviceRepr>(
    stream: &CudaStream,
    kernel: &CudaFunction,
    config: LaunchConfig,
    params: &P,
) -> Result<(), DriverError> {
    let context = stream.context();
    context.bind_to_thread()?;
    let (grid, block) = (config.grid_dim, config.block_dim);
    let mut early = CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = CUlaunchConfig {
        gridDimX: grid.0,
        gridDimY: grid.1,
        gridDimZ: grid.2,
        blockDimX: block.0,
        blockDimY: block.1,
        blockDimZ: block.2,
        sharedMemBytes: config.shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut early,
        numAttrs: u32::from(kernel.get_attribute(CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= FIRST),
    };
    let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
    // SAFETY: as the caller promises. The driver copies the argument before it returns.
    unsafe { sys::cuLaunchKernelEx(&raw const config, kernel.cu_function(), arguments.as_mut_ptr(), null_mut()) }
        .result()
}
