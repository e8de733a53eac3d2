//! Matrix products with what comes before or after them inside: cuBLASLt, through the cudarc that Candle exports.
//!
//! Candle's `matmul` is the product alone. A bias, a residual and a GELU around it are passes over memory then, of which
//! GELU's gradient alone is ten. NVIDIA's library does them on the numbers that a product has in registers anyway. The
//! tensors here are bf16 matrices on a GPU, contiguous or a transpose of what is; sums run in f32.

use candle_core::cuda::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda::cudarc::cublaslt::sys::{
    self, cublasComputeType_t::CUBLAS_COMPUTE_32F, cublasLtEpilogue_t as Epilogue,
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

/// Scratch memory of the library; NVIDIA's advice for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// What all operands are aligned to: rows that tensor cores take.
const ALIGNMENT_BYTES: usize = 16;

/// Whether the products here are for tensors like `x`.
pub fn takes(x: &Tensor) -> bool {
    x.device().is_cuda() && x.dtype() == DType::BF16
}

/// x w + bias, and + `onto` if there is one: (m, k), (k, n), (n), (m, n) -> (m, n)
pub fn affine(x: &Tensor, w: &Tensor, bias: &Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
    product(x, w, onto, Around::Bias { bias })
}

/// h = x w + bias, and gelu(h): (m, k), (k, n), (n) -> two of (m, n)
pub fn affine_gelu(x: &Tensor, w: &Tensor, bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let h = uninitialised(x.dim(0)?, w.dim(1)?, x.device())?;
    let g = product(x, w, None, Around::BiasGelu { bias, h: &h })?;
    Ok((h, g))
}

/// (dy w) gelu'(h): (m, k), (k, n), (m, n) -> (m, n)
pub fn product_gelu_backward(dy: &Tensor, w: &Tensor, h: &Tensor) -> Result<Tensor> {
    product(dy, w, None, Around::GeluBackward { h })
}

enum Around<'a> {
    Bias {
        bias: &'a Tensor,
    },
    /// `h` is written: bias added, before GELU.
    BiasGelu {
        bias: &'a Tensor,
        h: &'a Tensor,
    },
    GeluBackward {
        h: &'a Tensor,
    },
}

impl Around<'_> {
    fn epilogue(&self) -> Epilogue {
        match self {
            Around::Bias { .. } => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            Around::BiasGelu { .. } => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Around::GeluBackward { .. } => Epilogue::CUBLASLT_EPILOGUE_DGELU,
        }
    }

    fn bias(&self) -> Option<&Tensor> {
        match self {
            Around::Bias { bias } | Around::BiasGelu { bias, .. } => Some(bias),
            Around::GeluBackward { .. } => None,
        }
    }

    fn h(&self) -> Option<&Tensor> {
        match self {
            Around::BiasGelu { h, .. } | Around::GeluBackward { h } => Some(h),
            Around::Bias { .. } => None,
        }
    }
}

/// Memory for (m, n), for a product to fill.
fn uninitialised(m: usize, n: usize, device: &Device) -> Result<Tensor> {
    let Device::Cuda(device) = device else { bail!("products with something around them are for a GPU") };
    // SAFETY: `product` writes all of it before anything reads it.
    let memory = unsafe { device.alloc::<bf16>(m * n)? };
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(memory, device.clone()));
    Ok(Tensor::from_storage(storage, (m, n), BackpropOp::none(), false))
}

/// (m, n, k), if all operands are bf16 on the GPU of `x`, and of shapes that fit.
fn check(x: &Tensor, w: &Tensor, onto: Option<&Tensor>, around: &Around) -> Result<(usize, usize, usize)> {
    let ((m, k), (rows, n)) = (x.dims2()?, w.dims2()?);
    if rows != k {
        bail!("w: rows must be {k} as the columns of x in shape {:?}, got shape {:?}", x.shape(), w.shape());
    }
    let others = [("onto", onto, &[m, n][..]), ("bias", around.bias(), &[n]), ("h", around.h(), &[m, n])];
    for (name, tensor, dims) in others {
        let Some(tensor) = tensor else { continue };
        if tensor.dims() != dims || !tensor.is_contiguous() {
            bail!(
                "{name}: expected shape {dims:?}, contiguous, beside x {:?} and w {:?}, got shape {:?} with strides {:?}",
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

/// The library sees each matrix by columns, and so the transpose of what Candle sees by rows. It computes
/// `y^T = w^T x^T`: its `a` is w, its `b` is x, and a bias for each of its rows is one for each of our columns.
fn product(x: &Tensor, w: &Tensor, onto: Option<&Tensor>, around: Around) -> Result<Tensor> {
    let (m, n, k) = check(x, w, onto, &around)?;
    let Device::Cuda(device) = x.device() else { bail!("products with something around them are for a GPU") };
    let y = uninitialised(m, n, x.device())?;
    let (a, b) = (Operand::of("w", w)?, Operand::of("x", x)?);
    let kind = Kind {
        m,
        n,
        k,
        w_transposed: a.transposed,
        x_transposed: b.transposed,
        onto: onto.is_some(),
        epilogue: around.epilogue(),
    };
    let address_of = |name, tensor: Option<&Tensor>| tensor.map(|tensor| address(name, tensor)).transpose();
    let beside = Beside {
        y: address("y", &y)?,
        onto: address_of("onto", onto)?,
        bias: address_of("bias", around.bias())?,
        h: address_of("h", around.h())?,
    };
    LIBRARY.with_borrow_mut(|library| {
        let library = match library {
            Some(library) if library.device == device.id() => library,
            other => other.insert(Library::open(device)?),
        };
        // SAFETY: the shapes fit (`check`, `Operand::of`), all addresses are of tensors that this call holds, y and with GELU h
        // are of this call alone, and everything is queued on the one stream that orders their other uses.
        let done = unsafe { library.run(device, kind, (&a, &b), &beside) };
        done.map_err(|error| Error::Msg(format!("cuBLASLt: {error} in {kind}")))
    })?;
    Ok(y)
}

/// A matrix as the library sees it: by columns, so (columns, rows) of ours, or transposed.
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
                "{name}: must be contiguous or the transpose of what is, got shape {:?} with strides {stride:?}",
                tensor.shape()
            ),
        }
    }

    fn layout(&self) -> LibraryResult<Layout> {
        Layout::new(self.rows, self.columns)
    }
}

/// The address of the first number of a bf16 tensor on a GPU.
fn address(name: &str, tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("products with something around them are for a GPU") };
    let memory = storage.as_cuda_slice::<bf16>()?;
    let (start, _) = memory.device_ptr(memory.stream());
    let address = start + (layout.start_offset() * size_of::<bf16>()) as u64;
    if !address.is_multiple_of(ALIGNMENT_BYTES as u64) {
        bail!("{name}: must begin at a multiple of {ALIGNMENT_BYTES} bytes, got address {address:#x}");
    }
    Ok(address)
}

thread_local! {
    /// One per thread, as Candle's stream is.
    static LIBRARY: RefCell<Option<Library>> = const { RefCell::new(None) };
}

type LibraryResult<T> = std::result::Result<T, CublasError>;

/// What tells one choice of an algorithm from another, and one product from another in an error.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    m: usize,
    n: usize,
    k: usize,
    w_transposed: bool,
    x_transposed: bool,
    onto: bool,
    epilogue: Epilogue,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { m, n, k, w_transposed, x_transposed, onto, epilogue } = self;
        let transposed = |yes: &bool| if *yes { ", a transpose," } else { "" };
        write!(f, "x ({m}, {k}){} times w ({k}, {n}){}", transposed(x_transposed), transposed(w_transposed))?;
        write!(f, " {} a residual, with {epilogue:?}", if *onto { "onto" } else { "without" })
    }
}

/// The addresses of what is around a product.
struct Beside {
    y: u64,            // (m, n)
    onto: Option<u64>, // (m, n)
    bias: Option<u64>, // (n)
    h: Option<u64>,    // (m, n)
}

struct Library {
    device: DeviceId,
    handle: sys::cublasLtHandle_t,
    /// Never freed: a thread may end after the driver.
    workspace: &'static mut CudaSlice<u8>,
    algorithms: HashMap<Kind, sys::cublasLtMatmulAlgo_t>,
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Self> {
        // SAFETY: scratch memory, written before it is read by the library alone.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE_BYTES)? };
        let handle = result::create_handle().map_err(|error| Error::Msg(format!("cuBLASLt does not open: {error}")))?;
        Ok(Self { device: device.id(), handle, workspace: Box::leak(Box::new(workspace)), algorithms: HashMap::new() })
    }

    /// # Safety
    /// The operands are of the shapes of `kind`, `beside` has what its epilogue needs, and the addresses are of memory of as
    /// many numbers, which nothing writes or, for what is written, uses elsewhere than on the device's stream.
    unsafe fn run(
        &mut self,
        device: &CudaDevice,
        kind: Kind,
        (a, b): (&Operand, &Operand),
        beside: &Beside,
    ) -> LibraryResult<()> {
        let Kind { m, n, epilogue, .. } = kind;
        let description = Description::new()?;
        for (attribute, operand) in
            [(Describe::CUBLASLT_MATMUL_DESC_TRANSA, a), (Describe::CUBLASLT_MATMUL_DESC_TRANSB, b)]
        {
            description.set(attribute, &i32::from(operand.transposed))?;
        }
        description.set(Describe::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if let Some(bias) = &beside.bias {
            description.set(Describe::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        if let Some(h) = &beside.h {
            description.set(Describe::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, h)?;
            description.set(Describe::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(n as i64))?;
        }
        let (layout_a, layout_b, layout_y) = (a.layout()?, b.layout()?, Layout::new(n, m)?);

        let algorithm = match self.algorithms.get(&kind) {
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
                self.algorithms.insert(kind, algorithm);
                algorithm
            }
        };

        let stream = device.cuda_stream();
        let (workspace, _order) = self.workspace.device_ptr_mut(&stream);
        let (one, add) = (1f32, if kind.onto { 1f32 } else { 0.0 });
        result::matmul(
            self.handle,
            description.0,
            (&raw const one).cast(),
            (&raw const add).cast(),
            a.address as *const c_void,
            layout_a.0,
            b.address as *const c_void,
            layout_b.0,
            beside.onto.unwrap_or(beside.y) as *const c_void,
            layout_y.0,
            beside.y as *mut c_void,
            layout_y.0,
            &raw const algorithm,
            workspace as *mut c_void,
            WORKSPACE_BYTES,
            stream.cu_stream().cast(),
        )
    }
}

/// A matrix of bf16 by columns, without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(rows: usize, columns: usize) -> LibraryResult<Self> {
        result::create_matrix_layout(CUDA_R_16BF, rows as u64, columns as u64, rows as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and freed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> LibraryResult<Self> {
        result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F).map(Self)
    }

    /// # Safety
    /// `value` is of the type that the library documents for `attribute`; addresses in it are of what it documents.
    unsafe fn set<T>(&self, attribute: Describe, value: &T) -> LibraryResult<()> {
        result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and freed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// The workspace there is, and the alignment of what is multiplied.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> LibraryResult<Self> {
        let preference = result::create_matmul_pref().map(Self)?;
        // SAFETY: the library documents usize for the one and u32 for the others.
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
    /// `value` is of the type that the library documents for `attribute`.
    unsafe fn set<T>(&self, attribute: Prefer, value: &T) -> LibraryResult<()> {
        result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and freed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
