//! Layers on a GPU: cuBLASLt, through the cudarc that Candle exports.
//!
//! Candle's `matmul` computes only the product. Bias, residual, GELU, and the sum of a bias gradient are then separate passes over
//! memory. cuBLASLt applies all of them while the product is in registers. If it has no algorithm for one of them, Candle's
//! operators follow the product.
//!
//! Sums are in f32. f32 products use TF32 only if Candle's `set_gemm_reduced_precision_f32` allows it.

use std::cell::RefCell;
use std::collections::hash_map::{Entry, HashMap};
use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::cuda::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda::cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtEpilogue_t as LtEpilogue, cublasLtMatmulDescAttributes_t as Describe,
    cublasLtMatmulPreferenceAttributes_t as Prefer, cudaDataType_t as DataType,
};
use candle_core::cuda::cudarc::driver::{
    sys::CUevent_flags, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError,
};
use candle_core::cuda::{gemm_reduced_precision_f32, CudaDevice, CudaStorageSlice, DeviceId};
use candle_core::{DType, Device, Result, Storage, Tensor};

use super::memory::uninit;
use super::{activation, device_with_kernels};
use crate::linear::{Layer, Products};
use crate::{check, node};

/// Size of cuBLASLt's workspace. NVIDIA recommends this size for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Alignment of all operands. Tensor cores need it.
const ALIGNMENT_BYTES: usize = 16;

/// Rows of 8 numbers are aligned in every type.
const ALIGNED_NUMBERS: usize = 8;

/// Number of algorithms that are measured. Not tuned yet.
const CANDIDATES: usize = 8;

/// Number of times that each algorithm runs for its measurement, after one time to warm up. Not tuned yet.
const REPEATS: usize = 3;

static MEASURES: AtomicBool = AtomicBool::new(true);

pub(crate) fn measure_products(measure: bool) {
    MEASURES.store(measure, Ordering::Relaxed);
}

/// Whether cuBLASLt can compute layers of `x` with these weights and biases.
pub(crate) fn supports(x: &Tensor, layers: &[(&Tensor, &Tensor)]) -> bool {
    let aligned = |(weight, bias): &(&Tensor, &Tensor)| {
        let outputs = bias.elem_count();
        outputs.is_multiple_of(ALIGNED_NUMBERS) && (weight.elem_count() / outputs).is_multiple_of(ALIGNED_NUMBERS)
    };
    device_with_kernels(x).is_some() && x.elem_count() > 0 && layers.iter().all(aligned)
}

pub(crate) struct CublasLt;

impl Products for CublasLt {
    fn affine(&self, layer: &Layer, residual: Option<&Tensor>) -> Result<Storage> {
        let Layer { x, weight, bias } = layer;
        let residual = match residual {
            Some(residual) => Some(residual.detach().contiguous()?.reshape((x.dim(0)?, bias.elem_count()))?),
            None => None,
        };
        let weight = weight.t()?;
        if let Some(y) = product(x, &weight, residual.as_ref(), Epilogue::Bias(bias))? {
            return Ok(y);
        }
        let y = plain_product(x, &weight)?.broadcast_add(bias)?;
        node::copied(&match residual {
            Some(residual) => (y + residual)?,
            None => y,
        })
    }

    fn affine_gelu(&self, layer: &Layer) -> Result<(Tensor, Storage)> {
        let Layer { x, weight, bias } = layer;
        let shape = (x.dim(0)?, bias.elem_count());
        let h = node::untracked(memory_like(x, shape.0 * shape.1)?, shape);
        if let Some(g) = product(x, &weight.t()?, None, Epilogue::BiasGelu { bias, h: &h })? {
            return Ok((h, g));
        }
        let h = node::untracked(self.affine(layer, None)?, h.shape());
        let g = node::copied(&crate::gelu(&h)?)?;
        Ok((h, g))
    }

    fn through_gelu(&self, dg: &Tensor, h: &Tensor) -> Result<Tensor> {
        let Device::Cuda(device) = h.device() else { unreachable!("`supports` has checked the device") };
        Ok(activation::backward(device, "gelu", h, None, dg)?.0)
    }

    fn product_through_gelu(&self, dy: &Tensor, weight: &Tensor, h: &Tensor) -> Result<Tensor> {
        match product(dy, weight, None, Epilogue::GeluBackward { h })? {
            Some(dh) => Ok(node::untracked(dh, h.shape())),
            None => self.through_gelu(&plain_product(dy, weight)?, h),
        }
    }

    fn input_gradient(&self, dh: &Tensor, weight: &Tensor) -> Result<Tensor> {
        plain_product(dh, weight)
    }

    fn weight_gradients(&self, dh: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let outputs = dh.dim(1)?;
        let dbias = node::untracked(memory_like(dh, outputs)?, outputs);
        if let Some(dweight) = product(&dh.t()?, x, None, Epilogue::RowSums(&dbias))? {
            return Ok((node::untracked(dweight, (outputs, x.dim(1)?)), dbias));
        }
        // A product with a few rows of ones is faster than Candle's sum over the first axis.
        let ones = Tensor::ones((ALIGNED_NUMBERS, dh.dim(0)?), dh.dtype(), dh.device())?;
        Ok((plain_product(&dh.t()?, x)?, plain_product(&ones, dh)?.get(0)?))
    }
}

/// What cuBLASLt does with a product before it is written. The rows of the product are those of our `x`.
enum Epilogue<'a> {
    None,
    /// Adds (n) to each row.
    Bias(&'a Tensor),
    /// Adds `bias` (n) to each row, writes the sum to `h` (m, n), and applies GELU.
    BiasGelu {
        bias: &'a Tensor,
        h: &'a Tensor,
    },
    /// Multiplies by the slope of GELU at `h` (m, n).
    GeluBackward {
        h: &'a Tensor,
    },
    /// Writes the sum of each row of `x` to (m).
    RowSums(&'a Tensor),
}

impl Epilogue<'_> {
    fn code(&self) -> LtEpilogue {
        match self {
            Self::None => LtEpilogue::CUBLASLT_EPILOGUE_DEFAULT,
            Self::Bias(_) => LtEpilogue::CUBLASLT_EPILOGUE_BIAS,
            Self::BiasGelu { .. } => LtEpilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Self::GeluBackward { .. } => LtEpilogue::CUBLASLT_EPILOGUE_DGELU,
            Self::RowSums(_) => LtEpilogue::CUBLASLT_EPILOGUE_BGRADB,
        }
    }

    /// The vector that cuBLASLt calls the bias.
    fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Bias(bias) | Self::BiasGelu { bias, .. } | Self::RowSums(bias) => Some(bias),
            Self::None | Self::GeluBackward { .. } => None,
        }
    }

    fn h(&self) -> Option<&Tensor> {
        match self {
            Self::BiasGelu { h, .. } | Self::GeluBackward { h } => Some(h),
            Self::None | Self::Bias(_) | Self::RowSums(_) => None,
        }
    }
}

/// x w: (m, k), (k, n) -> (m, n)
fn plain_product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    match product(x, w, None, Epilogue::None)? {
        Some(y) => Ok(node::untracked(y, (x.dim(0)?, w.dim(1)?))),
        None => x.matmul(w),
    }
}

/// x w, plus `residual` if there is one, then the epilogue: (m, k), (k, n), (m, n) -> (m, n). `None` if cuBLASLt has no algorithm.
///
/// x and w are contiguous or the transposes of contiguous matrices; the others are contiguous.
///
/// cuBLASLt stores matrices by columns and Candle by rows, so cuBLASLt sees the transpose of each matrix. Therefore it computes
/// `y^T = w^T x^T`: its `a` is w, its `b` is x, and its bias per row is our bias per column.
fn product(x: &Tensor, w: &Tensor, residual: Option<&Tensor>, epilogue: Epilogue) -> Result<Option<Storage>> {
    let ((m, k), (_, n)) = (x.dims2()?, w.dims2()?);
    let Device::Cuda(device) = x.device() else { unreachable!("`supports` has checked the device") };
    let (x, w) = (aligned(x)?, aligned(w)?);
    let [residual, bias, h] = [residual, epilogue.bias(), epilogue.h()].map(|tensor| tensor.map(aligned).transpose());
    let (residual, bias, h) = (residual?, bias?, h?);
    let (a, b) = (Operand::of(&w)?, Operand::of(&x)?);
    let key = Key {
        m,
        n,
        k,
        dtype: x.dtype(),
        tf32: gemm_reduced_precision_f32(),
        w_transposed: a.transposed,
        x_transposed: b.transposed,
        residual: residual.is_some(),
        epilogue: epilogue.code(),
    };
    let y = memory_like(&x, m * n)?;
    let address_of = |tensor: &Option<Tensor>| tensor.as_ref().map(address);
    let addresses = Addresses {
        y: storage_address(&y, 0),
        residual: address_of(&residual),
        bias: address_of(&bias),
        h: address_of(&h),
    };
    let done = LIBRARIES.with_borrow_mut(|libraries| {
        let library = match libraries.entry(device.id()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Library::open(device)?),
        };
        // SAFETY: the operands have these shapes, and this call holds the tensors of all addresses. Nobody else uses y, which it
        // has created, nor what the epilogue writes. All uses are queued on one stream, in order.
        unsafe { library.run(device, key, (&a, &b), &addresses) }
            .map_err(|Failed(text)| check::error(format!("cuBLASLt: {text} in {key}")))
    })?;
    Ok(done.then_some(y))
}

/// Memory for `len` elements of a result, on the device and in the type of `like`.
fn memory_like(like: &Tensor, len: usize) -> Result<Storage> {
    let Device::Cuda(device) = like.device() else { unreachable!("`supports` has checked the device") };
    Ok(Storage::Cuda(uninit(device, len, like.dtype())?))
}

/// `tensor`, or a copy if it does not begin at a multiple of `ALIGNMENT_BYTES`. Memory from this module always does.
fn aligned(tensor: &Tensor) -> Result<Tensor> {
    match address(tensor).is_multiple_of(ALIGNMENT_BYTES as u64) {
        true => Ok(tensor.clone()),
        false => tensor.force_contiguous(),
    }
}

/// The address of the first element.
fn address(tensor: &Tensor) -> u64 {
    let (storage, layout) = tensor.storage_and_layout();
    storage_address(&storage, layout.start_offset() * tensor.dtype().size_in_bytes())
}

fn storage_address(storage: &Storage, offset_bytes: usize) -> u64 {
    let Storage::Cuda(storage) = storage else { unreachable!("`supports` has checked the device") };
    fn start<T>(memory: &CudaSlice<T>) -> u64 {
        memory.device_ptr(memory.stream()).0
    }
    let start = match &storage.slice {
        CudaStorageSlice::F32(memory) => start(memory),
        CudaStorageSlice::F16(memory) => start(memory),
        CudaStorageSlice::BF16(memory) => start(memory),
        _ => unreachable!("`supports` has checked the type"),
    };
    start + offset_bytes as u64
}

/// A matrix as cuBLASLt sees it, stored by columns. So it is the transpose of Candle's matrix, unless `transposed` is set.
struct Operand {
    address: u64,
    transposed: bool,
    rows: usize,
    columns: usize,
}

impl Operand {
    fn of(tensor: &Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let address = address(tensor);
        Ok(match tensor.is_contiguous() {
            true => Self { address, transposed: false, rows: columns, columns: rows },
            false => Self { address, transposed: true, rows, columns },
        })
    }

    fn layout(&self, dtype: DType) -> LibraryResult<Layout> {
        Layout::new(dtype, self.rows, self.columns)
    }
}

/// The shapes and options of a product. It is the key of the chosen algorithms, and errors print it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    m: usize,
    n: usize,
    k: usize,
    dtype: DType,
    tf32: bool,
    w_transposed: bool,
    x_transposed: bool,
    residual: bool,
    epilogue: LtEpilogue,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { m, n, k, dtype, w_transposed, x_transposed, residual, epilogue, .. } = self;
        let transposed = |yes: &bool| if *yes { " transposed" } else { "" };
        write!(
            f,
            "{dtype:?}, x ({m}, {k}){} times w ({k}, {n}){}",
            transposed(x_transposed),
            transposed(w_transposed)
        )?;
        write!(f, ", {} a residual, {epilogue:?}", if *residual { "with" } else { "without" })
    }
}

/// Addresses of the result and of the operands of the epilogue.
struct Addresses {
    y: u64,                // (m, n)
    residual: Option<u64>, // (m, n)
    bias: Option<u64>,     // (n), or (m) of row sums
    h: Option<u64>,        // (m, n)
}

thread_local! {
    /// One for each device that this thread uses, because Candle has one stream per thread.
    static LIBRARIES: RefCell<HashMap<DeviceId, Library>> = RefCell::default();
}

/// The text of an error of cuBLASLt or of the driver.
struct Failed(String);

type LibraryResult<T> = std::result::Result<T, Failed>;

impl From<CublasError> for Failed {
    fn from(error: CublasError) -> Self {
        Self(error.to_string())
    }
}

impl From<DriverError> for Failed {
    fn from(error: DriverError) -> Self {
        Self(error.to_string())
    }
}

struct Library {
    handle: sys::cublasLtHandle_t,
    /// Never freed, because a thread may end after the driver has shut down.
    workspace: &'static mut CudaSlice<u8>,
    /// `None` if there is no algorithm.
    algorithms: HashMap<Key, Option<sys::cublasLtMatmulAlgo_t>>,
}

/// All that a launch needs besides its algorithm.
struct Launch<'a> {
    handle: sys::cublasLtHandle_t,
    description: Description,
    a: (&'a Operand, Layout),
    b: (&'a Operand, Layout),
    y: (&'a Addresses, Layout),
    workspace: u64,
    stream: &'a CudaStream,
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Self> {
        // SAFETY: only cuBLASLt uses this memory, and it writes before it reads.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE_BYTES)? };
        let handle = result::create_handle()
            .map_err(|error| check::error(format!("cuBLASLt does not open: {error}; use the CPU instead")))?;
        Ok(Self { handle, workspace: Box::leak(Box::new(workspace)), algorithms: HashMap::new() })
    }

    /// Queues a product. Returns false if cuBLASLt has no algorithm for it.
    ///
    /// # Safety
    /// - The operands have the shapes of `key`, and `addresses` has the operands of its epilogue.
    /// - Each address is valid for all elements of its shape.
    /// - Until the product has run, other uses of the written memory, and other writes to the read memory, are only queued
    ///   on the device's stream.
    unsafe fn run(
        &mut self,
        device: &CudaDevice,
        key: Key,
        (a, b): (&Operand, &Operand),
        addresses: &Addresses,
    ) -> LibraryResult<bool> {
        let Key { m, n, dtype, tf32, epilogue, .. } = key;
        let description = Description::new(dtype == DType::F32 && tf32)?;
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
        let stream = device.cuda_stream();
        let (workspace, _order) = self.workspace.device_ptr_mut(&stream);
        let launch = Launch {
            handle: self.handle,
            description,
            a: (a, a.layout(dtype)?),
            b: (b, b.layout(dtype)?),
            y: (addresses, Layout::new(dtype, n, m)?),
            workspace,
            stream: &stream,
        };
        let algorithm = match self.algorithms.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                let algorithm = launch.choose()?;
                self.algorithms.insert(key, algorithm);
                algorithm
            }
        };
        match algorithm {
            Some(algorithm) => launch.queue(&algorithm).map(|()| true),
            None => Ok(false),
        }
    }
}

impl Launch<'_> {
    /// The fastest algorithm of those that cuBLASLt suggests, or its first suggestion if nothing is measured.
    ///
    /// # Safety
    /// As [`Library::run`]: each algorithm runs several times, and always writes the same.
    unsafe fn choose(&self) -> LibraryResult<Option<sys::cublasLtMatmulAlgo_t>> {
        let measures = MEASURES.load(Ordering::Relaxed);
        let candidates = self.candidates(if measures { CANDIDATES } else { 1 })?;
        if candidates.len() < 2 {
            return Ok(candidates.first().copied());
        }
        let mut fastest = None;
        for algorithm in &candidates {
            // The library may refuse what it has suggested.
            let Ok(time) = self.measure(algorithm) else { continue };
            if fastest.is_none_or(|(shortest, _)| time < shortest) {
                fastest = Some((time, *algorithm));
            }
        }
        Ok(fastest.map(|(_, algorithm)| algorithm))
    }

    /// At most `count` algorithms, best guess first.
    fn candidates(&self, count: usize) -> LibraryResult<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = Preference::new()?;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(count);
        let mut len: c_int = 0;
        // SAFETY: all handles are open as long as `self` and `preference`, and `found` has room for `count` results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                self.description.0,
                self.a.1 .0,
                self.b.1 .0,
                self.y.1 .0,
                self.y.1 .0,
                preference.0,
                count as c_int,
                found.as_mut_ptr(),
                &raw mut len,
            )
        };
        match status {
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => return Ok(Vec::new()),
            status => status.result()?,
        }
        // SAFETY: cuBLASLt has written `len` results.
        unsafe { found.set_len(len as usize) };
        Ok(found.into_iter().filter(|found| found.state.result().is_ok()).map(|found| found.algo).collect())
    }

    /// Milliseconds of `REPEATS` runs.
    ///
    /// # Safety
    /// As [`Self::queue`].
    unsafe fn measure(&self, algorithm: &sys::cublasLtMatmulAlgo_t) -> LibraryResult<f32> {
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        self.queue(algorithm)?;
        let start = event()?;
        for _ in 0..REPEATS {
            self.queue(algorithm)?;
        }
        Ok(start.elapsed_ms(&event()?)?)
    }

    /// Queues the product.
    ///
    /// # Safety
    /// As [`Library::run`], and `algorithm` is one of [`Self::candidates`].
    unsafe fn queue(&self, algorithm: &sys::cublasLtMatmulAlgo_t) -> LibraryResult<()> {
        let addresses = self.y.0;
        let (one, add) = (1f32, if addresses.residual.is_some() { 1f32 } else { 0.0 });
        result::matmul(
            self.handle,
            self.description.0,
            (&raw const one).cast(),
            (&raw const add).cast(),
            self.a.0.address as *const c_void,
            self.a.1 .0,
            self.b.0.address as *const c_void,
            self.b.1 .0,
            addresses.residual.unwrap_or(addresses.y) as *const c_void,
            self.y.1 .0,
            addresses.y as *mut c_void,
            self.y.1 .0,
            &raw const *algorithm,
            self.workspace as *mut c_void,
            WORKSPACE_BYTES,
            self.stream.cu_stream().cast(),
        )?;
        Ok(())
    }
}

/// The layout of a matrix stored by columns, without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, rows: usize, columns: usize) -> LibraryResult<Self> {
        let dtype = match dtype {
            DType::F32 => DataType::CUDA_R_32F,
            DType::F16 => DataType::CUDA_R_16F,
            DType::BF16 => DataType::CUDA_R_16BF,
            other => unreachable!("`supports` accepts no {other:?}"),
        };
        Ok(Self(result::create_matrix_layout(dtype, rows as u64, columns as u64, rows as i64)?))
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
    fn new(tf32: bool) -> LibraryResult<Self> {
        let compute = if tf32 { Compute::CUBLAS_COMPUTE_32F_FAST_TF32 } else { Compute::CUBLAS_COMPUTE_32F };
        Ok(Self(result::create_matmul_desc(compute, DataType::CUDA_R_32F)?))
    }

    /// # Safety
    /// `value` has the type that cuBLASLt documents for `attribute`. An address in it points to what cuBLASLt documents.
    unsafe fn set<T>(&self, attribute: Describe, value: &T) -> LibraryResult<()> {
        Ok(result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())?)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: `new` created it, and it is freed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// The size of the workspace and the alignment of the operands. cuBLASLt suggests algorithms by them.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> LibraryResult<Self> {
        let preference = Self(result::create_matmul_pref()?);
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
        Ok(result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())?)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: `new` created it, and it is freed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
