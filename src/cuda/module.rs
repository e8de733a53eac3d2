//! The images of the kernels. Each is loaded once per device, on first use.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use candle_core::cuda::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda::cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use candle_core::cuda::cudarc::nvrtc::Ptx;

use super::driver::error_name;
use crate::error::{Error, Result};
use crate::instances::Kernel;

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Loaded modules and functions, by the address of their driver context. An entry keeps its context alive, so no other context
/// can get the same address.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, usize), Arc<CudaModule>>,
    functions: HashMap<(usize, &'static str), CudaFunction>,
}

static LOADED: LazyLock<RwLock<Loaded>> = LazyLock::new(RwLock::default);

/// The function of `kernel` in `context`, with its shared memory enabled.
///
/// # Errors
/// [`Error::Driver`] if its image cannot be loaded.
pub fn function(context: &Arc<CudaContext>, kernel: &'static Kernel) -> Result<CudaFunction> {
    let address = context.cu_ctx() as usize;
    let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = loaded.functions.get(&(address, kernel.name)) {
        return Ok(function.clone());
    }
    drop(loaded);
    let failed = |cause: String| Error::Driver {
        action: "load",
        kernel: kernel.name,
        cause,
        detail: format!("image {} of {} bytes", kernel.image, IMAGES[kernel.image].len()),
    };
    if IMAGES[kernel.image].is_empty() {
        return Err(failed("built without a CUDA compiler".to_string()));
    }
    let mut loaded = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    let function = loaded.load(context, address, kernel).map_err(|error| failed(error_name(error)))?;
    loaded.functions.insert((address, kernel.name), function.clone());
    Ok(function)
}

impl Loaded {
    fn load(
        &mut self,
        context: &Arc<CudaContext>,
        address: usize,
        kernel: &'static Kernel,
    ) -> std::result::Result<CudaFunction, DriverError> {
        let module = match self.modules.get(&(address, kernel.image)) {
            Some(module) => module.clone(),
            None => {
                let module = context.load_module(Ptx::from_binary(IMAGES[kernel.image].to_vec()))?;
                self.modules.insert((address, kernel.image), module.clone());
                module
            }
        };
        context.bind_to_thread()?;
        let function = module.load_function(kernel.name)?;
        // More than 48 KB of shared memory must be enabled per function.
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared_bytes as i32)?;
        Ok(function)
    }
}
