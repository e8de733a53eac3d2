//! Random inputs of a case.

use anyhow::Result;
use attention_reference::draw;
use candle_core::{DType, Device, Tensor};
#[cfg(feature = "cuda")]
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::cases::Case;

/// q, k, v and the gradient of o: standard normal, rounded to the case's type.
///
/// Padded `(batch, seqlen, heads, head_dim)`, packed `(rows, heads, head_dim)`: either way row after row in memory. The last
/// axis of v and of the gradient of o is `head_dim_v`.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub do_: Tensor,
}

impl Inputs {
    /// The same values for the same case, whenever and wherever it runs.
    pub fn draw(case: &Case, device: &Device) -> Result<Self> {
        let mut rng = rng(case);
        Self::fill(case, |shape| {
            let values = draw::normal(&mut rng, case.precision(), shape.iter().product());
            Tensor::from_vec(values, shape, device)?.to_dtype(case.dtype)
        })
    }

    /// As [`Self::draw`], but the device's own generator draws: the host would take seconds for the large cases. The
    /// values are the same for the same case on the same kind of device.
    #[cfg(feature = "cuda")]
    pub fn draw_on_device(case: &Case, device: &Device) -> Result<Self> {
        device.set_seed(rng(case).random())?;
        Self::fill(case, |shape| Tensor::randn(0f32, 1f32, shape, device)?.to_dtype(case.dtype))
    }

    fn fill(case: &Case, mut draw: impl FnMut(Vec<usize>) -> candle_core::Result<Tensor>) -> Result<Self> {
        let (seqlen_q, seqlen_k) = case.seqlens();
        let (num_heads, num_heads_k) = (case.num_heads, case.num_heads_k());
        let (head_dim, head_dim_v) = (case.head_dim, case.head_dim_v());
        let mut tensor = |seqlen: usize, heads: usize, head_dim: usize| match case.lengths.as_slice() {
            [] => draw(vec![case.batch, seqlen, heads, head_dim]),
            lengths => draw(vec![lengths.iter().sum(), heads, head_dim]),
        };
        Ok(Self {
            q: tensor(seqlen_q, num_heads, head_dim)?,
            k: tensor(seqlen_k, num_heads_k, head_dim)?,
            v: tensor(seqlen_k, num_heads_k, head_dim_v)?,
            do_: tensor(seqlen_q, num_heads, head_dim_v)?,
        })
    }
}

/// The generator of a case. Its name is the seed.
pub fn rng(case: &Case) -> ChaCha8Rng {
    draw::generator(&case.name)
}

/// The elements of a tensor in order, exactly.
pub fn values(tensor: &Tensor) -> candle_core::Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}
