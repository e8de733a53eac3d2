//! The images of the kernels. Each is loaded once per device, on first use.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use candle_core::cuda::cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use candle_core::Result;

use crate::check;

// IMAGES: pairs of a file's name and its machine code.
include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The modules and kernels that a device has loaded. The modules keep its context alive, so no other context can get the same address.
#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: HashMap<String, CudaFunction>,
}

/// By the address of the driver context.
static LOADED: LazyLock<RwLock<HashMap<usize, Loaded>>> = LazyLock::new(RwLock::default);

/// The kernel `name` of the file `file` in `context`.
///
/// # Errors
/// If its image cannot be loaded.
pub(super) fn function(context: &Arc<CudaContext>, file: &'static str, name: &str) -> Result<CudaFunction> {
    let address = context.cu_ctx() as usize;
    let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = loaded.get(&address).and_then(|device| device.functions.get(name)) {
        return Ok(function.clone());
    }
    drop(loaded);
    let mut loaded = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    let device = loaded.entry(address).or_default();
    let function = device
        .load(context, file, name)
        .map_err(|error| check::error(format!("load {name} failed: {}; image {file}.fatbin", error_name(error))))?;
    device.functions.insert(name.to_string(), function.clone());
    Ok(function)
}

impl Loaded {
    fn load(
        &mut self,
        context: &Arc<CudaContext>,
        file: &'static str,
        name: &str,
    ) -> std::result::Result<CudaFunction, DriverError> {
        let module = match self.modules.get(file) {
            Some(module) => module.clone(),
            None => {
                let (_, image) = IMAGES.iter().find(|(of, _)| *of == file).expect("build.rs lists every file");
                let module = context.load_module(Ptx::from_binary(image.to_vec()))?;
                self.modules.insert(file, module.clone());
                module
            }
        };
        context.bind_to_thread()?;
        module.load_function(name)
    }
}

/// The driver's name of an error, for example `CUDA_ERROR_INVALID_VALUE`.
pub(super) fn error_name(error: DriverError) -> String {
    match error.error_name() {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    }
}
