//! Runs an operator on random inputs, forward and backward.

use anyhow::Result;
use attention_reference::draw;
use attention_reference::Precision;
use candle_core::{DType, Device, Tensor, Var};

use crate::operators::Operator;

pub const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

pub fn precision(dtype: DType) -> Precision {
    match dtype {
        DType::F64 => Precision::F64,
        DType::F32 => Precision::F32,
        DType::F16 => Precision::F16,
        DType::BF16 => Precision::Bf16,
        other => panic!("the operators have no {other:?}"),
    }
}

pub fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Normal numbers of `dtype`, the same for the same name.
pub fn random(name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let numbers = draw::normal(&mut draw::generator(name), precision(dtype), shape.iter().product());
    Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

/// One call of an operator on (rows, width), with a random gradient for each result.
pub struct Case {
    pub operator: Operator,
    pub rows: usize,
    pub width: usize,
    pub dtype: DType,
    pub device: Device,
    pub inputs: Vec<Tensor>,
}

/// Results, and the gradient of each input.
pub struct Outcome {
    pub results: Vec<Tensor>,
    pub gradients: Vec<Tensor>,
}

impl Case {
    /// On the CPU.
    pub fn new(operator: Operator, rows: usize, width: usize, dtype: DType) -> Result<Self> {
        let name = format!("{} {rows} x {width}", operator.name);
        let inputs = (operator.shapes)(rows, width)
            .iter()
            .enumerate()
            .map(|(index, shape)| random(&format!("{name}, input {index}"), shape, dtype))
            .collect::<Result<_>>()?;
        Ok(Self { operator, rows, width, dtype, device: Device::Cpu, inputs })
    }

    /// The same case with its inputs on `device`.
    #[cfg(feature = "cuda")]
    pub fn on(self, device: &Device) -> Result<Self> {
        let inputs = self.inputs.iter().map(|input| input.to_device(device)).collect::<candle_core::Result<_>>()?;
        Ok(Self { inputs, device: device.clone(), ..self })
    }

    /// The gradient of result `index`.
    pub fn upstream(&self, index: usize, result: &Tensor) -> Result<Tensor> {
        let name = format!("{} {} x {}, gradient {index}", self.operator.name, self.rows, self.width);
        // Drawn in the narrow type, so that all types get the same kind of numbers.
        Ok(random(&name, result.dims(), self.dtype)?.to_dtype(result.dtype())?.to_device(&self.device)?)
    }

    /// The sum of all results, weighed by their gradients: its gradients are those of the case.
    pub fn loss(&self, results: &[Tensor]) -> Result<Tensor> {
        let mut loss = Tensor::zeros((), DType::F64, &self.device)?;
        for (index, result) in results.iter().enumerate() {
            loss = (loss + (result * self.upstream(index, result)?)?.to_dtype(DType::F64)?.sum_all()?)?;
        }
        Ok(loss)
    }

    pub fn fused(&self) -> Result<Outcome> {
        self.outcome(self.operator.fused, &self.inputs)
    }

    pub fn composed(&self) -> Result<Outcome> {
        self.outcome(self.operator.composed, &self.inputs)
    }

    pub fn outcome(&self, call: crate::operators::Call, inputs: &[Tensor]) -> Result<Outcome> {
        let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
        let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let results = call(&inputs)?;
        let grads = self.loss(&results)?.backward()?;
        let gradients = vars.iter().map(|var| grads.get(var).expect("every input has a gradient").clone()).collect();
        Ok(Outcome { results, gradients })
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { operator, rows, width, dtype, device, .. } = self;
        write!(f, "{} {dtype:?}, {rows} rows of {width} on {:?}", operator.name, device.location())
    }
}

/// The bits of all tensors.
pub fn bits(tensors: &[Tensor]) -> Result<Vec<Vec<u64>>> {
    tensors.iter().map(|tensor| Ok(numbers(tensor)?.into_iter().map(f64::to_bits).collect())).collect()
}
