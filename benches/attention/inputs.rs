//! Random inputs of a case.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::cases::Case;

/// q, k, v and the gradient of o: standard normal, rounded to the case's type.
///
/// Padded `(batch, seqlen, heads, head_dim)`, packed `(rows, heads, head_dim)`: either way row after row in memory.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub do_: Tensor,
}

impl Inputs {
    /// The same values for the same case, whenever and wherever it runs.
    pub fn draw(case: &Case, device: &Device) -> Result<Self> {
        let mut seed = [0u8; 32];
        case.name.bytes().zip((0..seed.len()).cycle()).for_each(|(byte, at)| seed[at] ^= byte);
        let mut rng = ChaCha8Rng::from_seed(seed);
        let (seqlen_q, seqlen_k) = case.seqlens();
        let mut draw = |seqlen: usize, heads: usize| {
            let shape = match case.lengths.as_slice() {
                [] => vec![case.batch, seqlen, heads, case.head_dim],
                lengths => vec![lengths.iter().sum(), heads, case.head_dim],
            };
            let values = StandardNormal.sample_iter(&mut rng).take(shape.iter().product()).collect::<Vec<f32>>();
            Tensor::from_vec(values, shape, device)?.to_dtype(case.dtype)
        };
        let (num_heads, num_heads_k) = (case.num_heads, case.num_heads_k());
        let q = draw(seqlen_q, num_heads)?;
        let (k, v) = (draw(seqlen_k, num_heads_k)?, draw(seqlen_k, num_heads_k)?);
        Ok(Self { q, k, v, do_: draw(seqlen_q, num_heads)? })
    }
}

/// The elements of a tensor in order, exactly.
pub fn values(tensor: &Tensor) -> candle_core::Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}
