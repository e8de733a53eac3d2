//! A node of Candle's graph with a value that is already computed, and access to the numbers of tensors.
//!
//! Candle's `CustomOp` computes a value from the inputs alone, and its `bwd` receives nothing else that the forward knew. Here
//! an operator computes its value first. Then it makes a node with the value and a closure for the gradients. What the backward
//! needs besides the inputs, such as row statistics, the closure owns. So a second `backward()` finds it too, unless the first was
//! [`backward_once`], which drops the inputs and the closure of each node that it runs.
//!
//! Candle adds each gradient to a tensor of zeros, which costs four passes over memory. Between two nodes of this crate no such
//! sum is needed. So each node is two operators of Candle:
//!
//! ```text
//! inputs -> token -> result
//! ```
//!
//! The token has one element, and the closure is its backward. Another node of this crate that has `result` as an input depends
//! on the token instead. It leaves the gradient of `result` in [`WAITING`], and Candle only adds up tokens. If one of Candle's
//! operators has `result` as an input, the gradient comes through the second operator. The backward of an [`adding_node`] adds a
//! waiting gradient in its own pass over memory.
//!
//! A gradient that waits belongs to the backward that left it there, which may fail in an operator of Candle. So [`WAITING`] does not
//! own it. The owner is the first "gradient" of the token, which Candle keeps until it runs the token or drops all gradients.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, Weak};

use candle_core::backend::BackendDevice;
use candle_core::backprop::GradStore;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Error, InplaceOp1, Layout, MetalStorage,
    Result, Shape, Storage, StorageRef, Tensor, TensorId, WithDType,
};

use crate::profile;

/// Computes the gradient of each input from the inputs, the gradient of the result, and a gradient to add to that of the first input.
/// Both gradients are contiguous.
type Backward = Arc<dyn Fn(&[&Tensor], &Tensor, Option<&Tensor>) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// Puts a computed value into the graph: a result of `inputs`. Without a tracked input it is a plain tensor.
///
/// `backward` computes the gradient of each input from the inputs and the gradient of the result, which is contiguous. It may
/// return `None` for an input that is not tracked.
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
    let backward: Backward = Arc::new(move |inputs, dy, _| backward(inputs, dy));
    with_backward(name, inputs, value, shape.into(), backward, false)
}

/// As [`node`], with a backward that adds to the gradient of the first input what already waits there.
///
/// The waiting gradient has the shape and the type of the first input. It is contiguous, and others may hold it, so `backward` only
/// reads it.
pub(crate) fn adding_node<B>(
    name: &'static str,
    inputs: &[&Tensor],
    value: Storage,
    shape: impl Into<Shape>,
    backward: B,
) -> Result<Tensor>
where
    B: Fn(&[&Tensor], &Tensor, Option<&Tensor>) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    with_backward(name, inputs, value, shape.into(), Arc::new(backward), true)
}

/// `adds`: whether `backward` adds the gradient that waits for the first input.
fn with_backward(
    name: &'static str,
    inputs: &[&Tensor],
    value: Storage,
    shape: Shape,
    backward: Backward,
    adds: bool,
) -> Result<Tensor> {
    profile::mark(name)?;
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(untracked(value, shape));
    }
    testing::record(&backward, inputs);
    let tokens: Vec<Option<Arc<Token>>> = inputs.iter().map(|input| Token::of(input)).collect();
    let edges: Vec<Tensor> = inputs
        .iter()
        .zip(&tokens)
        .map(|(input, token)| token.as_ref().map_or(*input, |token| &token.tensor).clone())
        .collect();
    let inputs = inputs.iter().map(|&input| input.clone()).collect();
    let held = Mutex::new(Some(Arc::new(Held { inputs, tokens, backward })));
    let gradients = move |token: TensorId| {
        let Some(dy) = take(token).into_iter().flatten().next() else {
            return Err(Error::Msg(format!("{name}: the backward of this node got no gradient")));
        };
        let held = {
            let mut held = held.lock().expect("no thread panics with this lock");
            if FREES.get() {
                held.take()
            } else {
                held.clone()
            }
        };
        let Some(held) = held else {
            return Err(Error::Msg(format!(
                "{name}: backward_once has freed what the backward of this node needs; call backward() for all but the last"
            )));
        };
        profile::mark_after(name)?;
        let inputs: Vec<&Tensor> = held.inputs.iter().collect();
        let other = held.tokens[0].as_ref().filter(|_| adds).and_then(|token| token.waiting());
        let other = other.map(|gradient| gradient.contiguous()).transpose()?;
        let mut gradients = (held.backward)(&inputs, &dy.contiguous()?, other.as_ref())?.into_iter();
        profile::mark_backward(name)?;
        inputs
            .iter()
            .zip(&held.tokens)
            .enumerate()
            .map(|(index, (input, token))| match (gradients.next().flatten().filter(|_| input.track_op()), token) {
                (Some(total), Some(token)) if index == 0 && other.is_some() => token.replace(total).map(Some),
                (Some(gradient), Some(token)) => token.deliver(&gradient).map(Some),
                (gradient, _) => Ok(gradient),
            })
            .collect()
    };
    let token = Arc::new(Token { tensor: token(name, &edges, Box::new(gradients))?, result: OnceLock::new() });
    let receiver = token.clone();
    let reveal = move |_: &Tensor, dy: &Tensor| Ok(vec![Some(receiver.deliver(dy)?)]);
    let result = token.tensor.apply_op1(Node { name, value: Mutex::new(Some((value, shape))), backward: reveal })?;
    token.result.set(result.id()).expect("a node has one result");
    TOKENS.lock().expect("no thread panics with this lock").insert(result.id(), Arc::downgrade(&token));
    Ok(result)
}

/// What the backward of a node needs.
struct Held {
    inputs: Vec<Tensor>,
    tokens: Vec<Option<Arc<Token>>>, // of the inputs
    backward: Backward,
}

thread_local! {
    /// Whether a node gives up its [`Held`] when its backward starts.
    static FREES: Cell<bool> = const { Cell::new(false) };
}

/// `loss.backward()` that frees memory while it runs: an operator of this crate drops its inputs, and what it kept for its backward,
/// as soon as its backward has run. So memory for activations falls while that for gradients grows. Operators of Candle keep theirs
/// until `loss` is dropped.
///
/// A second backward through a freed operator is an error, also after a backward that failed. A `backward()` that a custom operator
/// calls inside this one frees its graph too.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_fused_ops::{backward_once, gelu};
/// let x = Var::randn(0f32, 1f32, (2, 3), &Device::Cpu)?;
/// let loss = gelu(&x)?.sum_all()?;
/// assert!(backward_once(&loss)?.get(&x).is_some());
/// assert!(loss.backward().is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of the backward, and if an operator of the graph is freed already.
pub fn backward_once(loss: &Tensor) -> Result<GradStore> {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            FREES.set(self.0);
        }
    }
    let _restore = Restore(FREES.replace(true));
    loss.backward()
}

/// The token of a result of this crate.
struct Token {
    tensor: Tensor,
    result: OnceLock<TensorId>,
}

/// The tokens of all results that exist.
static TOKENS: LazyLock<Mutex<HashMap<TensorId, Weak<Token>>>> = LazyLock::new(Mutex::default);

thread_local! {
    /// Gradients that wait for the backward of a token: of its result, or those that it hands on.
    static WAITING: RefCell<HashMap<TensorId, Weak<Waiting>>> = RefCell::default();
}

struct Waiting {
    token: TensorId,
    gradients: Mutex<Vec<Option<Tensor>>>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Another thread may drop the gradients of a backward. Then the empty entry stays in the map of this one.
        let _ = WAITING.try_with(|waiting| {
            let mut waiting = waiting.borrow_mut();
            if waiting.get(&self.token).is_some_and(|gradients| gradients.strong_count() == 0) {
                waiting.remove(&self.token);
            }
        });
    }
}

impl Token {
    fn of(result: &Tensor) -> Option<Arc<Self>> {
        TOKENS.lock().expect("no thread panics with this lock").get(&result.id())?.upgrade()
    }

    /// Adds a gradient of the result to the others. Returns the gradient of the token, whose number nobody reads.
    fn deliver(&self, gradient: &Tensor) -> Result<Tensor> {
        match self.waiting() {
            Some(sum) => self.replace(added(&sum, gradient)?),
            None => leave(&self.tensor, vec![Some(gradient.clone())]),
        }
    }

    /// The sum of the gradients of the result until now.
    fn waiting(&self) -> Option<Tensor> {
        let waiting = self.entry()?;
        let gradients = waiting.gradients.lock().expect("no thread panics with this lock");
        gradients.first()?.clone()
    }

    /// Lets `sum` wait instead of what waits now. Returns the gradient of the token.
    fn replace(&self, sum: Tensor) -> Result<Tensor> {
        let waiting = self.entry().expect("a gradient waits");
        *waiting.gradients.lock().expect("no thread panics with this lock") = vec![Some(sum)];
        Ok(self.tensor.detach())
    }

    fn entry(&self) -> Option<Arc<Waiting>> {
        WAITING.with_borrow(|waiting| waiting.get(&self.tensor.id())?.upgrade())
    }
}

/// The sum of two gradients of one tensor.
fn added(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::device_with_kernels(a) {
        return crate::cuda::sum::sum(device, a, b);
    }
    a + b
}

impl Drop for Token {
    fn drop(&mut self) {
        if let (Some(result), Ok(mut tokens)) = (self.result.get(), TOKENS.lock()) {
            tokens.remove(result);
        }
    }
}

/// Lets `gradients` wait for the backward of `token`. Returns the gradient of the token, which owns them.
fn leave(token: &Tensor, gradients: Vec<Option<Tensor>>) -> Result<Tensor> {
    let waiting = Arc::new(Waiting { token: token.id(), gradients: Mutex::new(gradients) });
    WAITING.with_borrow_mut(|all| all.insert(token.id(), Arc::downgrade(&waiting)));
    // Candle adds this tensor to zeros. The sum keeps the tensor as its input, and so its operator, because it is part of a graph.
    let owner = move |_: &Tensor, _: &Tensor| -> Result<Vec<Option<Tensor>>> {
        let _ = &waiting;
        unreachable!("no backward runs through a gradient")
    };
    token.apply_op1(Node {
        name: "gradients",
        value: Mutex::new(Some((unread(token.device())?, Shape::from(1)))),
        backward: owner,
    })
}

fn take(token: TensorId) -> Vec<Option<Tensor>> {
    let waiting = WAITING.with_borrow_mut(|waiting| waiting.remove(&token)).and_then(|waiting| waiting.upgrade());
    let gradients = |waiting: Arc<Waiting>| {
        std::mem::take(&mut *waiting.gradients.lock().expect("no thread panics with this lock"))
    };
    waiting.map(gradients).unwrap_or_default()
}

/// Computes the gradients of the edges of a token, from its id.
type Gradients = Box<dyn Fn(TensorId) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// A token that depends on `edges`.
///
/// Candle's operators have at most three inputs. So from the third of more than three on, the edges have a token of their own,
/// which hands their gradients on.
fn token(name: &'static str, edges: &[Tensor], gradients: Gradients) -> Result<Tensor> {
    if let [a, b, rest @ ..] = edges {
        if rest.len() > 1 {
            let rest = token(name, rest, Box::new(|token| Ok(take(token))))?;
            let edges = [a.clone(), b.clone(), rest.clone()];
            let all = move |token| {
                let mut direct = gradients(token)?;
                let indirect = direct.split_off(2);
                direct.push(if rest.track_op() { Some(leave(&rest, indirect)?) } else { None });
                Ok(direct)
            };
            return apply(name, &edges, Box::new(all));
        }
    }
    apply(name, edges, gradients)
}

fn apply(name: &'static str, edges: &[Tensor], gradients: Gradients) -> Result<Tensor> {
    let node = Node {
        name,
        value: Mutex::new(Some((unread(edges[0].device())?, Shape::from(1)))),
        backward: move |token: &Tensor, _: &Tensor| gradients(token.id()),
    };
    match edges {
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => unreachable!("`token` has split the edges"),
    }
}

/// The storage of one f32 that nobody looks at. Candle only adds such numbers up.
pub(crate) fn unread(device: &Device) -> Result<Storage> {
    let (one, dtype) = (Shape::from(1), DType::F32);
    Ok(match device {
        Device::Cpu => Storage::Cpu(CpuStorage::F32(vec![0.0])),
        // SAFETY: every pattern of bits is an f32.
        Device::Cuda(device) => Storage::Cuda(unsafe { device.alloc_uninit(&one, dtype)? }),
        // SAFETY: as above.
        Device::Metal(device) => Storage::Metal(unsafe { device.alloc_uninit(&one, dtype)? }),
    })
}

/// An operator of Candle with a value that the graph takes out once, and a function from it and its gradient to those of the inputs.
struct Node<B> {
    name: &'static str,
    value: Mutex<Option<(Storage, Shape)>>,
    backward: B,
}

impl<B: Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>> Node<B> {
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

    fn take_metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            _ => unreachable!("check::same_device has compared the devices"),
        }
    }

    fn gradients<const N: usize>(&self, value: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let gradients = (self.backward)(value, grad)?;
        Ok(gradients.try_into().unwrap_or_else(|_| unreachable!("one gradient for each input")))
    }
}

impl<B> CustomOp1 for Node<B>
where
    B: Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.take_metal()
    }

    fn bwd(&self, _: &Tensor, value: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [da] = self.gradients(value, grad)?;
        Ok(da)
    }
}

impl<B> CustomOp2 for Node<B>
where
    B: Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.take_metal()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, value: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients(value, grad)?;
        Ok((da, db))
    }
}

impl<B> CustomOp3 for Node<B>
where
    B: Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync,
{
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

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.take_metal()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        value: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients(value, grad)?;
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
            (self.backward)(&self.inputs.iter().collect::<Vec<_>>(), dy, None)
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

/// A copy of the numbers of `tensor`, for a node whose value Candle's operators have computed.
pub(crate) fn copied(tensor: &Tensor) -> Result<Storage> {
    if !tensor.is_contiguous() || tensor.layout().start_offset() > 0 {
        return copied(&tensor.force_contiguous()?);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn waiting() -> usize {
        WAITING.with_borrow(HashMap::len)
    }

    /// Tokens live as long as their results, and no gradient waits after a backward, also after one that fails.
    #[test]
    fn nothing_is_left_behind() -> Result<()> {
        let x = Var::new(&[1f32, -2.0], &Device::Cpu)?;
        let y = crate::gelu(&x)?;
        let id = y.id();
        assert!(Token::of(&y).is_some());
        let good = crate::gelu(&y)?;
        good.sum_all()?.backward()?;
        assert_eq!(waiting(), 0);

        let bad = node("bad", &[&y], storage(vec![0f32; 2]), 2, |_, _| Err(Error::Msg("it fails".to_string())))?;
        assert!((&good + &bad)?.sum_all()?.backward().is_err());
        assert!((bad + good)?.sum_all()?.backward().is_err());
        assert_eq!(waiting(), 0);

        drop(y);
        assert!(!TOKENS.lock().expect("no thread panics with this lock").contains_key(&id));
        Ok(())
    }

    /// A backward that fails in an operator of Candle, or panics there, adds nothing to the next one through the same node.
    #[test]
    fn a_failed_backward_does_not_count() -> Result<()> {
        struct Fails(bool);
        impl CustomOp1 for Fails {
            fn name(&self) -> &'static str {
                "fails"
            }
            fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
                Ok((CpuStorage::F32(vec![0.0; layout.shape().elem_count()]), layout.shape().clone()))
            }
            fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
                assert!(!self.0, "as asked for");
                Err(Error::Msg("it fails".to_string()))
            }
        }
        let x = Var::new(&[1f32, -2.0], &Device::Cpu)?;
        let y = crate::gelu(&x)?;
        let good = crate::gelu(&y)?.sum_all()?;
        let gradient = || good.backward()?.remove(&x).expect("a gradient").to_vec1::<f32>();
        let want = gradient()?;
        for panics in [false, true] {
            let fails = y.apply_op1(Fails(panics))?.sum_all()?;
            // Of the two orders of a sum, one runs the good part first.
            for loss in [(&good + &fails)?, (&fails + &good)?] {
                let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| loss.backward().is_err()));
                assert!(failed.unwrap_or(true));
                assert_eq!((gradient()?, waiting()), (want.clone(), 0));
            }
        }
        Ok(())
    }

    /// An [`adding_node`] gets what waits, in one of the two orders of the sum at least, and its total replaces that.
    #[test]
    fn a_node_adds_the_gradient_that_waits() -> Result<()> {
        let x = Var::new(&[1f32, -2.0], &Device::Cpu)?;
        let y = crate::gelu(&x)?;
        let seen = Arc::new(Mutex::new(0));
        let count = seen.clone();
        let double = || storage(y.to_vec1::<f32>().expect("a vector").iter().map(|y| 2.0 * y).collect());
        let plain = node("plain", &[&y], double(), 2, |_, dy| Ok(vec![Some((dy * 2.0)?)]))?;
        let adding = adding_node("adding", &[&y], double(), 2, move |_, dy, other| {
            let dx = (dy * 2.0)?;
            let Some(other) = other else { return Ok(vec![Some(dx)]) };
            *count.lock().expect("no thread panics with this lock") += 1;
            Ok(vec![Some((dx + other)?)])
        })?;
        let gelu = crate::gelu(&y)?;
        for first in [true, false] {
            let loss = |node: &Tensor| if first { node + &gelu } else { &gelu + node }?.sum_all();
            let gradient = |loss: &Tensor| loss.backward()?.remove(&x).expect("a gradient").to_vec1::<f32>();
            let (loss, want) = (loss(&adding)?, gradient(&loss(&plain)?)?);
            for _ in 0..2 {
                assert_eq!((gradient(&loss)?, waiting()), (want.clone(), 0));
            }
        }
        assert!(*seen.lock().expect("no thread panics with this lock") > 0);
        Ok(())
    }

    /// y = x. Its backward counts how many operators like it the graph still holds.
    struct Counts {
        alive: Arc<AtomicUsize>,
        seen: Arc<AtomicUsize>,
    }

    impl Drop for Counts {
        fn drop(&mut self) {
            self.alive.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl CustomOp1 for Counts {
        fn name(&self) -> &'static str {
            "counts"
        }
        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), layout.shape().clone()))
        }
        fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            self.seen.store(self.alive.load(Ordering::Relaxed), Ordering::Relaxed);
            Ok(Some(dy.clone()))
        }
    }

    #[test]
    fn a_backward_once_frees_each_operator_that_has_run() -> Result<()> {
        const LAYERS: usize = 5;
        let x = Var::new(&[1f32, -2.0], &Device::Cpu)?;
        let [alive, seen] = [0, 0].map(|count| Arc::new(AtomicUsize::new(count)));
        let mut y = x.as_tensor().clone();
        for _ in 0..LAYERS {
            alive.fetch_add(1, Ordering::Relaxed);
            y = crate::apply_op1(&y, Counts { alive: alive.clone(), seen: seen.clone() })?;
        }
        let loss = y.sqr()?.sum_all()?;
        drop(y);
        // What the backward of the first layer, the last to run, sees.
        for (frees, left) in [(false, LAYERS), (false, LAYERS), (true, 1)] {
            let gradients = if frees { backward_once(&loss)? } else { loss.backward()? };
            assert_eq!(gradients.get(&x).expect("a gradient").to_vec1::<f32>()?, [2.0, -4.0]);
            assert_eq!(seen.load(Ordering::Relaxed), left);
        }
        for again in [loss.backward(), backward_once(&loss)] {
            let error = again.expect_err("the graph is freed").to_string();
            assert!(error.contains("counts: backward_once has freed"), "{error}");
        }
        Ok(())
    }

    /// If no backward takes a waiting gradient, as after an operator without a derivative, it is freed when the caller drops the other
    /// gradients.
    #[test]
    fn a_gradient_that_leads_nowhere_is_dropped() -> Result<()> {
        let (x, other) = (Var::new(&[1f32, -2.0], &Device::Cpu)?, Var::new(&[3f32, 4.0], &Device::Cpu)?);
        let y = crate::swiglu(&crate::gelu(&x.sign()?)?, &other)?;
        for _ in 0..2 {
            assert!(y.sum_all()?.backward()?.get(&other).is_some());
            assert_eq!(waiting(), 0);
        }
        Ok(())
    }
}
