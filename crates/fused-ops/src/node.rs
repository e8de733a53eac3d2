//! A node of Candle's graph with a value that is already computed, and access to the numbers of tensors.
//!
//! Candle's `CustomOp` computes a value from the inputs alone, and its `bwd` receives nothing else that the forward knew. Here
//! an operator computes its value first. Then it makes a node with the value and a closure for the gradients. What the backward
//! needs besides the inputs, such as row statistics, the closure owns. So a second `backward()` finds it too.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, InplaceOp1, Layout, Result, Shape, Storage,
    StorageRef, Tensor, WithDType,
};

/// Computes the gradient of each input from the inputs and the gradient of the result, which is contiguous.
type Backward = Arc<dyn Fn(&[&Tensor], &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

struct Node {
    name: &'static str,
    /// The graph takes it out once, when the node is made.
    value: Mutex<Option<(Storage, Shape)>>,
    backward: Backward,
}

/// Puts a computed value into the graph: a result of one to three `inputs`. Without a tracked input it is a plain tensor.
///
/// `backward` returns one gradient for each input. It may return `None` for an input that is not tracked.
pub(crate) fn node<B>(
    name: &'static str,
    inputs: &[&Tensor],
    value: Storage,
    shape: impl Into<Shape>,
    backward: B,
) -> Result<Tensor>
where
    B: Fn(&[&Tensor], &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    let shape = shape.into();
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(untracked(value, shape));
    }
    let node = Node { name, value: Mutex::new(Some((value, shape))), backward: Arc::new(backward) };
    testing::record(&node.backward, inputs);
    match inputs {
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => unreachable!("Candle has operators with one to three inputs"),
    }
}

impl Node {
    fn take(&self) -> Result<(Storage, Shape)> {
        let value = self.value.lock().expect("no thread panics with this lock").take();
        value.ok_or_else(|| Error::Msg(format!("{}: the forward of this node has already run", self.name)))
    }

    fn take_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => unreachable!("check::same_device has compared the devices"),
        }
    }

    fn take_cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => unreachable!("check::same_device has compared the devices"),
        }
    }

    /// The gradients of the tracked inputs.
    fn gradients<const N: usize>(&self, inputs: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let mut gradients = (self.backward)(&inputs, &grad.contiguous()?)?.into_iter();
        Ok(inputs.map(|input| gradients.next().flatten().filter(|_| input.track_op())))
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(&self, a: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [da] = self.gradients([a], grad)?;
        Ok(da)
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], grad)?;
        Ok((da, db))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], grad)?;
        Ok((da, db, dc))
    }
}

/// What the bench needs to time a backward alone. Not a stable interface.
pub mod testing {
    use std::cell::RefCell;

    use candle_core::{Result, Tensor};

    /// The backward of one node.
    pub struct Recorded {
        backward: super::Backward,
        inputs: Vec<Tensor>,
    }

    impl Recorded {
        /// The gradients of the inputs. `dy` is contiguous.
        ///
        /// # Errors
        /// Those of the operator.
        pub fn run(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
            (self.backward)(&self.inputs.iter().collect::<Vec<_>>(), dy)
        }
    }

    thread_local! {
        static RECORDING: RefCell<Option<Vec<Recorded>>> = const { RefCell::new(None) };
    }

    /// The result of `call`, and the nodes that this thread made in it.
    pub fn recorded<R>(call: impl FnOnce() -> R) -> (R, Vec<Recorded>) {
        RECORDING.set(Some(Vec::new()));
        let result = call();
        (result, RECORDING.take().unwrap_or_default())
    }

    pub(super) fn record(backward: &super::Backward, inputs: &[&Tensor]) {
        RECORDING.with_borrow_mut(|recording| {
            let Some(nodes) = recording else { return };
            let inputs = inputs.iter().map(|&input| input.clone()).collect();
            nodes.push(Recorded { backward: backward.clone(), inputs });
        });
    }
}

/// A tensor that no gradient flows through.
pub(crate) fn untracked(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// The storage of numbers on the CPU.
pub(crate) fn storage<T: WithDType>(numbers: Vec<T>) -> Storage {
    Storage::Cpu(T::to_cpu_storage_owned(numbers))
}

/// Numbers on the CPU as a tensor that no gradient flows through.
pub(crate) fn tensor<T: WithDType>(numbers: Vec<T>, shape: impl Into<Shape>) -> Tensor {
    untracked(storage(numbers), shape)
}

/// The numbers of a contiguous tensor on the CPU. Nobody writes to them while this exists.
pub(crate) struct Numbers<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Numbers<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        debug_assert!(tensor.is_contiguous());
        let (storage, layout) = tensor.storage_and_layout();
        let start = layout.start_offset();
        Self { storage, range: start..start + layout.shape().elem_count() }
    }

    pub(crate) fn as_slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&T::cpu_storage_as_slice(storage)?[self.range.clone()]),
            _ => unreachable!("other devices run the composed operators"),
        }
    }
}

/// The type that a tensor of `dtype` is summed in.
pub(crate) fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// A copy of the storage of `tensor`, for a node whose value Candle's operators have computed.
pub(crate) fn copied(tensor: &Tensor) -> Result<Storage> {
    let (storage, layout) = tensor.storage_and_layout();
    storage.try_clone(layout)
}

/// Changes the numbers of a tensor on the CPU in place. The tensor is no view. `change` may also take the vector out, if nobody
/// reads the tensor again.
pub(crate) fn update<T: WithDType, R>(tensor: &Tensor, change: impl FnOnce(&mut Vec<T>) -> R) -> Result<R> {
    let op = Update { change: Cell::new(Some(change)), result: Cell::new(None), numbers: PhantomData };
    tensor.inplace_op1(&op)?;
    Ok(op.result.into_inner().expect("Candle has run the operator"))
}

struct Update<T, F, R> {
    change: Cell<Option<F>>,
    result: Cell<Option<R>>,
    numbers: PhantomData<T>,
}

impl<T: WithDType, R, F: FnOnce(&mut Vec<T>) -> R> InplaceOp1 for Update<T, F, R> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let change = self.change.take().expect("Candle runs an operator once");
        // Candle lends storage as a typed slice only to read. So take the vector out, and put it back.
        let mut numbers = T::cpu_storage_data(std::mem::replace(storage, CpuStorage::U8(Vec::new())))?;
        debug_assert!(layout.start_offset() == 0 && layout.shape().elem_count() == numbers.len());
        self.result.set(Some(change(&mut numbers)));
        *storage = T::to_cpu_storage_owned(numbers);
        Ok(())
    }
}
