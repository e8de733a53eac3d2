//! Custom operators of other crates as nodes of this crate.

use std::sync::{Arc, OnceLock};

use candle_core::{CustomOp1, CustomOp3, Result, Shape, Storage, Tensor};

use crate::{check, node};

/// As [`Tensor::apply_op1`], as a node of this crate: between it and other nodes of this crate, Candle adds no gradient to zeros.
/// `bwd` gets a contiguous gradient.
///
/// # Errors
/// Those of `op`.
pub fn apply_op1<C: CustomOp1 + Send + Sync + 'static>(x: &Tensor, op: C) -> Result<Tensor> {
    let (value, shape) = {
        let (x, layout) = x.storage_and_layout();
        match &*x {
            Storage::Cpu(x) => op.cpu_fwd(x, layout).map(|(y, shape)| (Storage::Cpu(y), shape))?,
            Storage::Cuda(x) => op.cuda_fwd(x, layout).map(|(y, shape)| (Storage::Cuda(y), shape))?,
            Storage::Metal(x) => op.metal_fwd(x, layout).map(|(y, shape)| (Storage::Metal(y), shape))?,
        }
    };
    node_with_result(op.name(), &[x], (value, shape), move |inputs, y, dy| Ok(vec![op.bwd(inputs[0], y, dy)?]))
}

/// As [`Tensor::apply_op3`], in the way of [`apply_op1`].
///
/// # Errors
/// Those of `op`, and if the tensors are on different devices.
pub fn apply_op3<C: CustomOp3 + Send + Sync + 'static>(a: &Tensor, b: &Tensor, c: &Tensor, op: C) -> Result<Tensor> {
    check::same_device("b", b, "a", a.device())?;
    check::same_device("c", c, "a", a.device())?;
    let (value, shape) = {
        let ((a, of_a), (b, of_b), (c, of_c)) =
            (a.storage_and_layout(), b.storage_and_layout(), c.storage_and_layout());
        match (&*a, &*b, &*c) {
            (Storage::Cpu(a), Storage::Cpu(b), Storage::Cpu(c)) => {
                op.cpu_fwd(a, of_a, b, of_b, c, of_c).map(|(y, shape)| (Storage::Cpu(y), shape))?
            }
            (Storage::Cuda(a), Storage::Cuda(b), Storage::Cuda(c)) => {
                op.cuda_fwd(a, of_a, b, of_b, c, of_c).map(|(y, shape)| (Storage::Cuda(y), shape))?
            }
            (Storage::Metal(a), Storage::Metal(b), Storage::Metal(c)) => {
                op.metal_fwd(a, of_a, b, of_b, c, of_c).map(|(y, shape)| (Storage::Metal(y), shape))?
            }
            _ => unreachable!("check::same_device has compared the devices"),
        }
    };
    node_with_result(op.name(), &[a, b, c], (value, shape), move |inputs, y, dy| {
        let &[a, b, c] = inputs else { unreachable!("the node has three inputs") };
        let (da, db, dc) = op.bwd(a, b, c, y, dy)?;
        Ok(vec![da, db, dc])
    })
}

/// As [`node::node`], with a backward that also gets the result.
fn node_with_result<B>(
    name: &'static str,
    inputs: &[&Tensor],
    (value, shape): (Storage, Shape),
    backward: B,
) -> Result<Tensor>
where
    B: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    let result = Arc::new(OnceLock::<Tensor>::new());
    let kept = result.clone();
    let y = node::node(name, inputs, value, shape, move |inputs, dy| {
        backward(inputs, kept.get().expect("the result exists before its backward"), dy)
    })?;
    // The same memory without the graph: a graph that owned its own result would never be freed.
    result.set(y.detach()).expect("a node has one result");
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{CpuStorage, Device, Layout, Var};

    /// y = exp(x), with a backward that reads y.
    struct Exp {
        _alive: Arc<()>,
    }

    impl CustomOp1 for Exp {
        fn name(&self) -> &'static str {
            "exp"
        }
        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            let (start, end) = layout.contiguous_offsets().expect("a contiguous tensor");
            let y = x.as_slice::<f32>()?[start..end].iter().map(|x| x.exp()).collect();
            Ok((CpuStorage::F32(y), layout.shape().clone()))
        }
        fn bwd(&self, _: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            Ok(Some((y * dy)?))
        }
    }

    /// Between nodes of this crate and between operators of Candle, twice, and the graph is freed with its result.
    #[test]
    fn a_custom_operator_has_its_gradient_and_is_freed() -> Result<()> {
        let alive = Arc::new(());
        let x = Var::new(&[0.5f32, -1.0, 2.0], &Device::Cpu)?;
        type Apply = fn(&Tensor, Exp) -> Result<Tensor>;
        let loss = |apply: Apply| -> Result<Tensor> {
            let y = apply(&crate::gelu(&x)?, Exp { _alive: alive.clone() })?;
            (crate::gelu(&y)? + y.sqr()?)?.sum_all()
        };
        let gradient = |loss: &Tensor| loss.backward()?.get(&x).expect("a gradient").to_vec1::<f32>();
        let want = gradient(&loss(|x, op| x.apply_op1(op))?)?;
        let loss = loss(apply_op1)?;
        for _ in 0..2 {
            for (got, want) in gradient(&loss)?.iter().zip(&want) {
                assert!((got - want).abs() <= 1e-5 * want.abs(), "{got} and {want}");
            }
        }
        drop(loss);
        assert_eq!(Arc::strong_count(&alive), 1);
        Ok(())
    }
}
