//! All parameters in two tensors. So the optimizer runs a few large kernels instead of thousands of small ones.

use anyhow::{anyhow, bail, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tensors by the name of their parameter.
pub type Named = BTreeMap<String, Tensor>;

/// The place of a parameter in the two tensors.
#[derive(Debug)]
struct Place {
    group: usize,
    start: usize,
    shape: Vec<usize>,
}

/// One value for each element of each parameter: the parameters, their gradient, or a moment of the gradient.
///
/// One tensor holds all matrices, the other all vectors, both sorted by name. AdamW treats the two differently. There is at
/// least one matrix and one vector.
#[derive(Clone)]
pub struct Flat {
    places: Arc<BTreeMap<String, Place>>,
    groups: [Tensor; 2], // (elements of all matrices), (elements of all vectors)
}

/// Tensors with one axis are vectors: biases, and the weights of norms.
fn group_of(shape: &[usize]) -> usize {
    usize::from(shape.len() < 2)
}

impl Flat {
    /// Copies `tensors`. They have one type and are on one device.
    pub fn new(tensors: &Named) -> Result<Self> {
        let mut places = BTreeMap::new();
        let mut parts = [Vec::new(), Vec::new()];
        let mut ends = [0, 0];
        for (name, tensor) in tensors {
            let group = group_of(tensor.dims());
            places.insert(name.clone(), Place { group, start: ends[group], shape: tensor.dims().to_vec() });
            ends[group] += tensor.elem_count();
            parts[group].push(tensor.flatten_all()?);
        }
        let [matrices, vectors] = &parts;
        Ok(Self { places: Arc::new(places), groups: [concatenated(matrices)?, concatenated(vectors)?] })
    }

    /// Applies `f` to both tensors. `f` keeps their shape.
    pub fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let [matrices, vectors] = &self.groups;
        Ok(Self { places: self.places.clone(), groups: [f(matrices)?, f(vectors)?] })
    }

    pub fn zeros_like(&self) -> Result<Self> {
        self.map(Tensor::zeros_like)
    }

    /// Converts to `dtype`, without a copy if it already has that type.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.map(|group| group.to_dtype(dtype))
    }

    /// A view of each parameter, in its shape.
    pub fn named(&self) -> Result<Named> {
        self.places
            .iter()
            .map(|(name, Place { group, start, shape })| {
                let view = self.groups[*group].narrow(0, *start, shape.iter().product())?;
                Ok((name.clone(), view.reshape(shape.as_slice())?))
            })
            .collect()
    }

    /// The tensor of all matrices and the tensor of all vectors.
    pub fn groups(&self) -> [&Tensor; 2] {
        self.groups.each_ref()
    }

    pub fn set_groups(&mut self, groups: [Tensor; 2]) {
        self.groups = groups;
    }

    /// Number of elements of all parameters.
    pub fn count(&self) -> usize {
        self.groups.iter().map(Tensor::elem_count).sum()
    }

    /// Copies the gradients `tensors`, one for each parameter, to the places of `self`.
    pub fn gradient(&self, mut tensors: Named) -> Result<Self> {
        let mut parts = [Vec::new(), Vec::new()];
        for (name, place) in self.places.iter() {
            let gradient = tensors.remove(name).ok_or_else(|| anyhow!("parameter {name} received no gradient"))?;
            if gradient.dims() != place.shape {
                bail!("gradient of parameter {name}: shape must be {:?}, got {:?}", place.shape, gradient.dims());
            }
            parts[place.group].push(gradient.flatten_all()?);
        }
        let [matrices, vectors] = &parts;
        Ok(Self { places: self.places.clone(), groups: [concatenated(matrices)?, concatenated(vectors)?] })
    }
}

/// Copies `parts` into one tensor.
fn concatenated(parts: &[Tensor]) -> Result<Tensor> {
    match parts {
        [one] => Ok(one.copy()?),
        parts => Ok(Tensor::cat(parts, 0)?),
    }
}
