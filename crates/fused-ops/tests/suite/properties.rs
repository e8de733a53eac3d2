//! What every operator promises besides its formula.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::linear;

use crate::operators;
use crate::run::{bits, random, Case, Outcome, DTYPES};

/// Enough elements for several tasks on several threads, and a ragged last task.
const LARGE: (usize, usize) = (389, 67);

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for operator in operators::all() {
        for dtype in DTYPES {
            let case = Case::new(operator, LARGE.0, LARGE.1, dtype)?;
            let run = |threads: usize| -> Result<_> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                let Outcome { results, gradients } = pool.install(|| case.fused())?;
                Ok((bits(&results)?, bits(&gradients)?))
            };
            let one = run(1)?;
            assert!(one == run(2)? && one == run(7)?, "the bits depend on the number of threads\ncase {case}");
        }
    }
    Ok(())
}

#[test]
fn a_second_backward_gives_the_same_gradients() -> Result<()> {
    operators::all().into_iter().try_for_each(|operator| second_backward(&Case::new(operator, 5, 33, DType::F32)?))
}

pub fn second_backward(case: &Case) -> Result<()> {
    let vars: Vec<Var> = case.inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let loss = case.loss(&(case.operator.fused)(&inputs)?)?;
    let gradients = || -> Result<_> {
        let grads = loss.backward()?;
        bits(&vars.iter().map(|var| grads.get(var).expect("a gradient").clone()).collect::<Vec<_>>())
    };
    assert!(gradients()? == gradients()?, "a second backward differs\ncase {case}");
    Ok(())
}

/// Views with gaps and offsets, and transposed ones.
#[test]
fn strided_inputs_give_the_same_bits() -> Result<()> {
    for operator in operators::all() {
        let case = Case::new(operator, 6, 9, DType::F32)?;
        let want = case.fused()?;
        let views: Vec<Tensor> = case.inputs.iter().map(view_of_more).collect::<Result<_>>()?;
        assert!(views.iter().any(|view| !view.is_contiguous()));
        let results = (operator.fused)(&views)?;
        assert_eq!(bits(&results)?, bits(&want.results)?, "case {case}");

        let vars: Vec<Var> =
            case.inputs.iter().map(|t| Var::from_tensor(&t.t_if_matrix()?)).collect::<Result<_, _>>()?;
        let inputs = vars.iter().map(|var| var.as_tensor().t_if_matrix()).collect::<candle_core::Result<Vec<_>>>()?;
        let grads = case.loss(&(operator.fused)(&inputs)?)?.backward()?;
        let gradients =
            vars.iter().map(|var| grads.get(var).expect("a gradient").t_if_matrix()).collect::<Result<Vec<_>, _>>()?;
        assert_eq!(bits(&gradients)?, bits(&want.gradients)?, "case {case}");
    }
    Ok(())
}

#[test]
fn each_input_may_be_the_only_tracked_one() -> Result<()> {
    operators::all().into_iter().try_for_each(|operator| only_tracked(&Case::new(operator, 4, 6, DType::F32)?))
}

/// A frozen input gets no gradient, and each other one keeps its own.
pub fn only_tracked(case: &Case) -> Result<()> {
    let fused = case.operator.fused;
    let want = case.fused()?.gradients;
    for index in 0..case.inputs.len() {
        let var = Var::from_tensor(&case.inputs[index])?;
        let mut inputs = case.inputs.clone();
        inputs[index] = var.as_tensor().clone();
        let grads = case.loss(&fused(&inputs)?)?.backward()?;
        let gradient = grads.get(&var).expect("a gradient").clone();
        assert_eq!(bits(&[gradient])?, bits(&want[index..=index])?, "input {index} of case {case}");
    }
    let results = fused(&case.inputs)?;
    assert!(results.iter().all(|result| !result.track_op()), "case {case}: nothing is tracked");
    Ok(())
}

/// A view of `tensor`'s numbers in a larger tensor.
fn view_of_more(tensor: &Tensor) -> Result<Tensor> {
    let last = tensor.rank() - 1;
    let more = tensor.pad_with_zeros(last, 2, 3)?;
    Ok(more.narrow(last, 2, tensor.dim(last)?)?)
}

trait Transposed: Sized {
    fn t_if_matrix(&self) -> candle_core::Result<Self>;
}

impl Transposed for Tensor {
    /// The transpose of a matrix, and a vector as it is.
    fn t_if_matrix(&self) -> candle_core::Result<Self> {
        match self.rank() {
            2 => self.t(),
            _ => Ok(self.clone()),
        }
    }
}

/// No rows are no error.
#[test]
fn empty_batches_work() -> Result<()> {
    let x = Var::zeros((0, 4), DType::F32, &Device::Cpu)?;
    let weight = Var::ones(4, DType::F32, &Device::Cpu)?;
    let y = candle_fused_ops::rms_norm(&x, &weight, 1e-6)?;
    assert_eq!(y.dims(), [0, 4]);
    let grads = y.sum_all()?.backward()?;
    assert_eq!(grads.get(&weight).expect("a gradient").to_vec1::<f32>()?, [0.0; 4]);

    let (matrix, bias) = (Var::ones((3, 4), DType::F32, &Device::Cpu)?, Var::ones(3, DType::F32, &Device::Cpu)?);
    let y = candle_fused_ops::linear_gelu(&x, &matrix, &bias)?;
    assert_eq!(y.dims(), [0, 3]);
    let grads = y.sum_all()?.backward()?;
    assert_eq!(grads.get(&bias).expect("a gradient").to_vec1::<f32>()?, [0.0; 3]);
    assert_eq!(grads.get(&matrix).expect("a gradient").to_vec2::<f32>()?, [[0.0; 4]; 3]);
    let no_ids = Tensor::zeros(0, DType::U32, &Device::Cpu)?;
    assert_eq!(candle_fused_ops::embedding(&no_ids, &matrix)?.dims(), [0, 4]);
    Ok(())
}

/// All axes but the last are rows.
#[test]
fn linear_layers_take_any_number_of_axes() -> Result<()> {
    let (x, weight) = (random("x", &[6, 4], DType::F32)?, random("w", &[3, 4], DType::F32)?);
    let bias = random("b", &[3], DType::F32)?;
    let want = linear(&x, &weight, &bias)?;
    let wide = linear(&x.reshape((2, 1, 3, 4))?, &weight, &bias)?;
    assert_eq!(wide.dims(), [2, 1, 3, 3]);
    assert_eq!(bits(&[wide])?, bits(std::slice::from_ref(&want))?);
    let one = linear(&x.get(0)?, &weight, &bias)?;
    assert_eq!((one.dims(), bits(std::slice::from_ref(&one))?), (&[3usize][..], bits(&[want.get(0)?])?));
    Ok(())
}

/// The packed layout has no batch. A head without a rest, and a table without pairs.
#[test]
fn rotary_takes_packed_heads_and_empty_tables() -> Result<()> {
    use candle_fused_ops::{rotary, RotaryOrder::Interleaved};
    let x = random("x", &[5, 2, 4], DType::F32)?;
    let angles = random("angles", &[5, 2], DType::F32)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let batch = rotary(&x.unsqueeze(0)?, &cos, &sin, Interleaved)?;
    assert_eq!(bits(&[rotary(&x, &cos, &sin, Interleaved)?])?, bits(&[batch])?);
    let none = Tensor::zeros((5, 0), DType::F32, &Device::Cpu)?;
    assert_eq!(bits(&[rotary(&x, &none, &none, Interleaved)?])?, bits(&[x])?);
    Ok(())
}

/// Gradients take another way between two operators of this crate than between one of them and one of Candle's. A result that
/// goes to both kinds, and to one of them twice, gets the sum of all.
#[test]
fn a_result_may_go_to_several_operators() -> Result<()> {
    use candle_fused_ops::{composed, gelu, rms_norm, swiglu};
    type Unary = fn(&Tensor) -> candle_core::Result<Tensor>;
    let weight = random("weight", &[7], DType::F64)?;
    let gradient =
        |gelu: Unary, swiglu: fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>, fused: bool| -> Result<_> {
            let x = Var::from_tensor(&random("x", &[5, 7], DType::F64)?)?;
            let y = gelu(&x)?;
            let norm = if fused { rms_norm(&y, &weight, 1e-5)? } else { composed::rms_norm(&y, &weight, 1e-5)? };
            let z = ((swiglu(&y, &y)? + norm.sin()?)? + y.sqr()?)?;
            let loss = (gelu(&z)? * z.reshape((7, 5))?.reshape((5, 7))?)?.sum_all()?;
            loss.backward()?; // the second one is compared
            Ok(loss.backward()?.remove(&x).expect("a gradient"))
        };
    let (fused, candles) = (gradient(gelu, swiglu, true)?, gradient(composed::gelu, composed::swiglu, false)?);
    let differ = (&fused - &candles)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(differ < 1e-12 * candles.abs()?.max_all()?.to_scalar::<f64>()?, "{fused} {candles}");
    Ok(())
}

#[test]
fn a_backward_may_run_on_another_thread() -> Result<()> {
    use candle_fused_ops::{gelu, swiglu};
    let x = Var::from_tensor(&random("x", &[5, 7], DType::F32)?)?;
    let y = gelu(&x)?;
    let loss = (swiglu(&y, &y)? * &y)?.sum_all()?;
    let gradient = |loss: &Tensor| bits(&[loss.backward()?.remove(&x).expect("a gradient")]);
    let there = std::thread::scope(|scope| scope.spawn(|| gradient(&loss)).join().expect("no panic"))?;
    assert_eq!(there, gradient(&loss)?);
    Ok(())
}

/// The inputs and outputs of a layer may be several axes.
#[test]
fn layers_split_and_join_axes() -> Result<()> {
    use candle_fused_ops::linear_add;
    let x = Var::from_tensor(&random("x", &[2, 5, 6], DType::F32)?)?;
    let (weight, bias) = (random("w", &[12, 6], DType::F32)?, random("b", &[12], DType::F32)?);
    let heads = linear(&x, &weight.reshape((3, 4, 6))?, &bias.reshape((3, 4))?)?;
    assert_eq!(heads.dims(), [2, 5, 3, 4]);
    let whole = linear(&x, &weight, &bias)?;
    assert_eq!(bits(&[heads.reshape((2, 5, 12))?])?, bits(std::slice::from_ref(&whole))?);

    let (back, bias) = (random("back", &[6, 12], DType::F32)?, random("b2", &[6], DType::F32)?);
    let joined = linear_add(&heads, &back.reshape((6, 3, 4))?, &bias, &x)?;
    let plain = linear_add(&whole, &back, &bias, &x)?;
    assert_eq!(bits(std::slice::from_ref(&joined))?, bits(std::slice::from_ref(&plain))?);
    let gradient = |y: &Tensor| -> Result<_> { bits(&[y.sum_all()?.backward()?.remove(&x).expect("a gradient")]) };
    assert_eq!(gradient(&joined)?, gradient(&plain)?);
    Ok(())
}

/// A checkpointed part has the same results and gradients. A weight that it does not know as an input is an error.
#[test]
fn checkpointing_changes_no_bit() -> Result<()> {
    use candle_fused_ops::{checkpoint, gelu, mlp_add};
    let names = [("x", vec![5, 6]), ("fc", vec![8, 6]), ("bf", vec![8]), ("proj", vec![6, 8]), ("bp", vec![6])];
    let vars = names.map(|(name, shape)| Var::from_tensor(&random(name, &shape, DType::F32).expect("a draw")));
    let vars = vars.into_iter().collect::<candle_core::Result<Vec<Var>>>()?;
    let inputs: Vec<&Tensor> = vars.iter().map(|var| var.as_tensor()).collect();
    let part = |t: &[Tensor]| mlp_add(&gelu(&t[0])?, [&t[1], &t[2]], [&t[3], &t[4]], &t[0]);
    let outcome = |y: Tensor| -> Result<_> {
        let grads = (y.sqr()? + &y)?.sum_all()?.backward()?;
        let gradients = inputs.iter().map(|input| grads.get(input).expect("a gradient").clone());
        bits(&[y].into_iter().chain(gradients).collect::<Vec<_>>())
    };
    let plain = part(&inputs.iter().map(|&input| input.clone()).collect::<Vec<_>>())?;
    assert_eq!(outcome(checkpoint(&inputs, part)?)?, outcome(plain)?);

    let last_rows = |t: &[Tensor]| t[0].narrow(0, 3, 2)?.t(); // a view
    let view = checkpoint(&inputs[..1], last_rows)?;
    assert_eq!(bits(&[view])?, bits(&[last_rows(&[inputs[0].clone()])?])?);

    let square = checkpoint(&[inputs[0], inputs[0]], |t| &t[0] * &t[1])?; // one variable twice
    let gradient = square.sum_all()?.backward()?.remove(inputs[0]).expect("a gradient");
    assert_eq!(bits(&[gradient])?, bits(&[(inputs[0] * 2.0)?])?);

    let hidden = vars[1].as_tensor().clone();
    let error = checkpoint(&inputs[..1], move |t| t[0].matmul(&hidden.t()?)).unwrap_err().to_string();
    assert!(error.starts_with("checkpoint: the function uses a tracked tensor that is not in inputs"), "{error}");
    Ok(())
}
