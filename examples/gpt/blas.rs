//! Matrix products with an epilogue (bias, residual, GELU): cuBLASLt, through the cudarc that Candle exports.
//!
//! Candle's `matmul` computes only the product. Bias, residual and GELU are then separate passes over memory. The gradient
//! of GELU alone is ten passes. cuBLASLt applies all of them while the product is in registers.
//!
//! All tensors here are bf16 matrices on a GPU, contiguous or the transpose of a contiguous tensor. Sums are in f32.

use candle_core::cuda::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda::cudarc::cublaslt::sys::{
    self, cublasComputeType_t::CUBLAS_COMPUTE_32F, cublasLtEpilogue_t as LtEpilogue,
    cublasLtMatmulDescAttributes_t as Describe, cublasLtMatmulPreferenceAttributes_t as Prefer,
    cudaDataType_t::CUDA_R_16BF, cudaDataType_t::CUDA_R_32F,
};
use candle_core::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use candle_core::cuda::{CudaDevice, CudaStorage, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{bail, DType, Device, Error, Result, Storage, Tensor};
use half::bf16;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;

/// Size of cuBLASLt's workspace. NVIDIA recommends this size for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Alignment of all operands. Tensor cores need it.
const ALIGNMENT_BYTES: usize = 16;

/// Whether this module can multiply `x`.
pub fn supports(x: &Tensor) -> bool {
    x.device().is_cuda() && x.dtype() == DType::BF16
}

/// x w + bias, plus `residual` if there is one: (m, k), (k, n), (n), (m, n) -> (m, n)
pub fn affine(x: &Tensor, w: &Tensor, bias: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
    product(x, w, residual, Epilogue::Bias { bias })
}

/// h = x w + bias, and gelu(h): (m, k), (k, n), (n) -> (m, n), (m, n)
pub fn affine_gelu(x: &Tensor, w: &Tensor, bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let h = uninitialised(x.dim(0)?, w.dim(1)?, x.device())?;
    let g = product(x, w, None, Epilogue::BiasGelu { bias, h: &h })?;
    Ok((h, g))
}

/// (dy w) gelu'(h): (m, k), (k, n), (m, n) -> (m, n)
pub fn product_gelu_backward(dy: &Tensor, w: &Tensor, h: &Tensor) -> Result<Tensor> {
    product(dy, w, None, Epilogue::GeluBackward { h })
}

/// The steps that cuBLASLt applies to a product before it is written.
enum Epilogue<'a> {
    Bias {
        bias: &'a Tensor,
    },
    /// Also writes `h`, the sum of product and bias, the input of GELU.
    BiasGelu {
        bias: &'a Tensor,
        h: &'a Tensor,
    },
    GeluBackward {
        h: &'a Tensor,
    },
}

impl Epilogue<'_> {
    fn code(&self) -> LtEpilogue {
        match self {
            Epilogue::Bias { .. } => LtEpilogue::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasGelu { .. } => LtEpilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Epilogue::GeluBackward { .. } => LtEpilogue::CUBLASLT_EPILOGUE_DGELU,
        }
    }

    fn bias(&self) -> Option<&Tensor> {
        match self {
            Epilogue::Bias { bias } | Epilogue::BiasGelu { bias, .. } => Some(bias),
            Epilogue::GeluBackward { .. } => None,
        }
    }

    fn h(&self) -> Option<&Tensor> {
        match self {
            Epilogue::BiasGelu { h, .. } | Epilogue::GeluBackward { h } => Some(h),
            Epilogue::Bias { .. } => None,
        }
    }
}

/// Uninitialised memory of shape (m, n). A product fills it.
fn uninitialised(m: usize, n: usize, device: &Device) -> Result<Tensor> {
    let Device::Cuda(device) = device else { bail!("products with an epilogue need tensors on a GPU") };
    // SAFETY: `product` writes all of it before anything reads it.
    let memory = unsafe { device.alloc::<bf16>(m * n)? };
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(memory, device.clone()));
    Ok(Tensor::from_storage(storage, (m, n), BackpropOp::none(), false))
}

/// Checks that all operands are bf16 on the GPU of `x` and that their shapes fit. Returns (m, n, k).
fn check(x: &Tensor, w: &Tensor, residual: Option<&Tensor>, epilogue: &Epilogue) -> Result<(usize, usize, usize)> {
    let ((m, k), (rows, n)) = (x.dims2()?, w.dims2()?);
    if rows != k {
        bail!("w: rows must be {k} as the columns of x in shape {:?}, got shape {:?}", x.shape(), w.shape());
    }
    let others = [("residual", residual, &[m, n][..]), ("bias", epilogue.bias(), &[n]), ("h", epilogue.h(), &[m, n])];
    for (name, tensor, dims) in others {
        let Some(tensor) = tensor else { continue };
        if tensor.dims() != dims || !tensor.is_contiguous() {
            bail!(
                "{name}: must be contiguous with shape {dims:?} for x {:?} and w {:?}, got shape {:?} with strides {:?}",
                x.shape(),
                w.shape(),
                tensor.shape(),
                tensor.stride()
            );
        }
    }
    for (name, tensor) in
        [("x", Some(x)), ("w", Some(w))].into_iter().chain(others.map(|(name, tensor, _)| (name, tensor)))
    {
        let Some(tensor) = tensor else { continue };
        if tensor.dtype() != DType::BF16 {
            bail!("{name}: dtype {:?} is not supported (supported: BF16)", tensor.dtype());
        }
        if !tensor.device().same_device(x.device()) {
            let [got, expected] = [tensor, x].map(|tensor| tensor.device().location());
            bail!("{name}: on device {got:?}, but x is on {expected:?}");
        }
    }
    Ok((m, n, k))
}

/// cuBLASLt stores matrices by columns and Candle by rows, so cuBLASLt sees the transpose of each matrix. Therefore it
/// computes `y^T = w^T x^T`: its `a` is w, its `b` is x, and its bias per row is our bias per column.
fn product(x: &Tensor, w: &Tensor, residual: Option<&Tensor>, epilogue: Epilogue) -> Result<Tensor> {
    let (m, n, k) = check(x, w, residual, &epilogue)?;
    let Device::Cuda(device) = x.device() else { bail!("products with an epilogue need tensors on a GPU") };
    let y = uninitialised(m, n, x.device())?;
    let (a, b) = (Operand::of("w", w)?, Operand::of("x", x)?);
    let key = ProductKey {
        m,
        n,
        k,
        w_transposed: a.transposed,
        x_transposed: b.transposed,
        residual: residual.is_some(),
        epilogue: epilogue.code(),
    };
    let address_of = |name, tensor: Option<&Tensor>| tensor.map(|tensor| address(name, tensor)).transpose();
    let addresses = Addresses {
        y: address("y", &y)?,
        residual: address_of("residual", residual)?,
        bias: address_of("bias", epilogue.bias())?,
        h: address_of("h", epilogue.h())?,
    };
    LIBRARY.with_borrow_mut(|library| {
        let library = match library {
            Some(library) if library.device == device.id() => library,
            other => other.insert(Library::open(device)?),
        };
        // SAFETY: `check` and `Operand::of` have checked the shapes. This call holds the tensors of all addresses. It created y
        // and, with GELU, the caller created h for it, so nobody else uses them. All uses are queued on one stream, in order.
        let done = unsafe { library.run(device, key, (&a, &b), &addresses) };
        done.map_err(|error| Error::Msg(format!("cuBLASLt: {error} in {key}")))
    })?;
    Ok(y)
}

/// A matrix as cuBLASLt sees it, stored by columns. So it is the transpose of Candle's matrix, unless `transposed` is set.
struct Operand {
    address: u64,
    transposed: bool,
    rows: usize,
    columns: usize,
}

impl Operand {
    fn of(name: &str, tensor: &Tensor) -> Result<Self> {
        let ((rows, columns), stride) = (tensor.dims2()?, tensor.stride());
        let address = address(name, tensor)?;
        match stride {
            [row, 1] if *row == columns => Ok(Self { address, transposed: false, rows: columns, columns: rows }),
            [1, column] if *column == rows => Ok(Self { address, transposed: true, rows, columns }),
            _ => bail!(
                "{name}: must be contiguous or the transpose of a contiguous tensor, got shape {:?} with strides {stride:?}",
                tensor.shape()
            ),
        }
    }

    fn layout(&self) -> LibraryResult<Layout> {
        Layout::new(self.rows, self.columns)
    }
}

/// The address of the first element of a bf16 tensor on a GPU.
fn address(name: &str, tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("products with an epilogue need tensors on a GPU") };
    let memory = storage.as_cuda_slice::<bf16>()?;
    let (start, _) = memory.device_ptr(memory.stream());
    let address = start + (layout.start_offset() * size_of::<bf16>()) as u64;
    if !address.is_multiple_of(ALIGNMENT_BYTES as u64) {
        bail!("{name}: must begin at a multiple of {ALIGNMENT_BYTES} bytes, got address {address:#x}");
    }
    Ok(address)
}

thread_local! {
    /// One per thread, because Candle has one stream per thread.
    static LIBRARY: RefCell<Option<Library>> = const { RefCell::new(None) };
}

type LibraryResult<T> = std::result::Result<T, CublasError>;

/// The shapes and options of a product. It is the key of the chosen algorithms, and errors print it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct ProductKey {
    m: usize,
    n: usize,
    k: usize,
    w_transposed: bool,
    x_transposed: bool,
    residual: bool,
    epilogue: LtEpilogue,
}

impl fmt::Display for ProductKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { m, n, k, w_transposed, x_transposed, residual, epilogue } = self;
        let transposed = |yes: &bool| if *yes { " transposed" } else { "" };
        write!(f, "x ({m}, {k}){} times w ({k}, {n}){}", transposed(x_transposed), transposed(w_transposed))?;
        write!(f, ", {} a residual, {epilogue:?}", if *residual { "with" } else { "without" })
    }
}

/// Addresses of the result and of the operands of the epilogue.
struct Addresses {
    y: u64,                // (m, n)
    residual: Option<u64>, // (m, n)
    bias: Option<u64>,     // (n)
    h: Option<u64>,        // (m, n)
}

struct Library {
    device: DeviceId,
    handle: sys::cublasLtHandle_t,
    /// Never freed, because a thread may end after the driver has shut down.
    workspace: &'static mut CudaSlice<u8>,
    algorithms: HashMap<ProductKey, sys::cublasLtMatmulAlgo_t>,
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Self> {
        // SAFETY: only cuBLASLt uses this memory, and it writes before it reads.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE_BYTES)? };
        let handle = result::create_handle().map_err(|error| Error::Msg(format!("cuBLASLt does not open: {error}")))?;
        Ok(Self { device: device.id(), handle, workspace: Box::leak(Box::new(workspace)), algorithms: HashMap::new() })
    }

    /// # Safety
    /// - The operands have the shapes of `key`, and `addresses` has the operands of its epilogue.
    /// - Each address is valid for all elements of its shape.
    /// - Until the product has run, other uses of the written memory, and other writes to the read memory, are only queued
    ///   on the device's stream.
    unsafe fn run(
        &mut self,
        device: &CudaDevice,
        key: ProductKey,
        (a, b): (&Operand, &Operand),
        addresses: &Addresses,
    ) -> LibraryResult<()> {
        let ProductKey { m, n, epilogue, .. } = key;
        let description = Description::new()?;
        for (attribute, operand) in
            [(Describe::CUBLASLT_MATMUL_DESC_TRANSA, a), (Describe::CUBLASLT_MATMUL_DESC_TRANSB, b)]
        {
            description.set(attribute, &i32::from(operand.transposed))?;
        }
        description.set(Describe::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if let Some(bias) = &addresses.bias {
            description.set(Describe::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        if let Some(h) = &addresses.h {
            description.set(Describe::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, h)?;
            description.set(Describe::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(n as i64))?;
        }
        let (layout_a, layout_b, layout_y) = (a.layout()?, b.layout()?, Layout::new(n, m)?);

        let algorithm = match self.algorithms.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                let preference = Preference::new()?;
                let found = result::get_matmul_algo_heuristic(
                    self.handle,
                    description.0,
                    layout_a.0,
                    layout_b.0,
                    layout_y.0,
                    layout_y.0,
                    preference.0,
                );
                let algorithm = found?.algo;
                self.algorithms.insert(key, algorithm);
                algorithm
            }
        };

        let stream = device.cuda_stream();
        let (workspace, _order) = self.workspace.device_ptr_mut(&stream);
        let (one, add) = (1f32, if key.residual { 1f32 } else { 0.0 });
        result::matmul(
            self.handle,
            description.0,
            (&raw const one).cast(),
            (&raw const add).cast(),
            a.address as *const c_void,
            layout_a.0,
            b.address as *const c_void,
            layout_b.0,
            addresses.residual.unwrap_or(addresses.y) as *const c_void,
            layout_y.0,
            addresses.y as *mut c_void,
            layout_y.0,
            &raw const algorithm,
            workspace as *mut c_void,
            WORKSPACE_BYTES,
            stream.cu_stream().cast(),
        )
    }
}

/// The layout of a bf16 matrix stored by columns, without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(rows: usize, columns: usize) -> LibraryResult<Self> {
        result::create_matrix_layout(CUDA_R_16BF, rows as u64, columns as u64, rows as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: `new` created it, and it is freed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> LibraryResult<Self> {
        result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F).map(Self)
    }

    /// # Safety
    /// `value` has the type that cuBLASLt documents for `attribute`. An address in it points to what cuBLASLt documents.
    unsafe fn set<T>(&self, attribute: Describe, value: &T) -> LibraryResult<()> {
        result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: `new` created it, and it is freed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// The size of the workspace and the alignment of the operands. cuBLASLt chooses an algorithm by them.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> LibraryResult<Self> {
        let preference = result::create_matmul_pref().map(Self)?;
        // SAFETY: cuBLASLt documents usize for the workspace and u32 for the alignments.
        unsafe {
            preference.set(Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
            for matrix in [
                Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                preference.set(matrix, &(ALIGNMENT_BYTES as u32))?;
            }
        }
        Ok(preference)
    }

    /// # Safety
    /// `value` has the type that cuBLASLt documents for `attribute`.
    unsafe fn set<T>(&self, attribute: Prefer, value: &T) -> LibraryResult<()> {
        result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: `new` created it, and it is freed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
