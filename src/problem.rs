//! Every check of shapes, strides, dtypes and devices. What comes after a [`Problem`] checks nothing again.

use candle_core::{DType, DeviceLocation, Layout, Tensor, D};

use crate::attention::Attention;
use crate::mask::{Mask, Visibility};
use crate::packed::CuSeqlens;
use crate::{Error, Result};

/// The largest supported size of a head.
pub const MAX_HEAD_DIM: usize = 512;

/// The element types that attention is computed on, as an error names them.
pub(crate) const FLOAT_DTYPES: &str = "F64, F32, F16, BF16";

/// Whether `dtype` is one of [`FLOAT_DTYPES`].
pub(crate) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// How the rows of one call are shared out over its sequences.
#[derive(Clone, Debug)]
pub enum Lengths {
    /// q is `(batch, seqlen_q, num_heads, head_dim)`: every sequence has the same length.
    Padded {
        /// Number of sequences.
        batch: usize,
        /// Queries per sequence.
        seqlen_q: usize,
        /// Keys per sequence.
        seqlen_k: usize,
    },
    /// q is `(total_q, num_heads, head_dim)`: sequences end to end.
    Packed {
        /// Where the queries of each sequence begin and end.
        cu_seqlens_q: CuSeqlens,
        /// Where the keys of each sequence begin and end.
        cu_seqlens_k: CuSeqlens,
    },
}

/// Where the elements of one tensor lie. All in elements; the last axis has stride 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// Distance from the start of the storage to the first element.
    pub offset: usize,
    /// From one sequence to the next; 0 for packed tensors, whose sequences differ by rows.
    pub batch: usize,
    /// From one token to the next.
    pub row: usize,
    /// From one head to the next.
    pub head: usize,
}

/// ALiBi slopes: one per head, or one per batch and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alibi {
    /// Shape `(num_heads)`.
    PerHead,
    /// Shape `(batch, num_heads)`.
    PerBatchAndHead,
}

/// One attention call with everything that decides what is computed, and nothing about how.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Element type of q, k, v and o.
    pub dtype: DType,
    /// Where q, k and v live.
    pub device: DeviceLocation,
    /// The sequences.
    pub lengths: Lengths,
    /// Heads of q.
    pub num_heads: usize,
    /// Heads of k and v; divides `num_heads`.
    pub num_heads_k: usize,
    /// Size of the last axis of q, k and v, `1..=MAX_HEAD_DIM`.
    pub head_dim: usize,
    /// Which keys each query sees.
    pub mask: Mask,
    /// Factor of the scores.
    pub softmax_scale: f64,
    /// Bound of the scaled scores, `softcap * tanh(score / softcap)`.
    pub softcap: Option<f64>,
    /// Whether slopes come along, and in which shape.
    pub alibi: Option<Alibi>,
    /// Whether the same inputs must give the same bits of dq.
    pub deterministic: bool,
    /// Strides of q.
    pub q: Strides,
    /// Strides of k.
    pub k: Strides,
    /// Strides of v.
    pub v: Strides,
}

/// q, k and v, views of `(.., num_heads + 2 * num_heads_k, head_dim)`.
pub(crate) fn split_qkv(qkv: &Tensor, num_heads_k: usize) -> Result<[Tensor; 3]> {
    let num_heads = qkv.dim(D::Minus2)? - 2 * num_heads_k;
    let heads = |start, len| qkv.narrow(D::Minus2, start, len);
    Ok([heads(0, num_heads)?, heads(num_heads, num_heads_k)?, heads(num_heads + num_heads_k, num_heads_k)?])
}

/// One sequence of a [`Problem`]: its lengths, and where its rows begin.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    /// Its index.
    pub batch: usize,
    /// Number of queries.
    pub seqlen_q: usize,
    /// Number of keys.
    pub seqlen_k: usize,
    /// Rows of q before its first one, 0 unless packed.
    pub first_q: usize,
    /// Rows of k and v before its first one, 0 unless packed.
    pub first_k: usize,
}

impl Problem {
    /// Checks one call in the padded layout.
    pub fn padded(options: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        const AXES_Q: &str = "(batch, seqlen_q, num_heads, head_dim)";
        const AXES_K: &str = "(batch, seqlen_k, num_heads_k, head_dim)";
        for (tensor, x, axes) in [("q", q, AXES_Q), ("k", k, AXES_K), ("v", v, AXES_K)] {
            check_rank(tensor, x, 4, axes)?;
        }
        let (q_dims, k_dims, v_dims) = (q.dims(), k.dims(), v.dims());
        same_axis(("k", k_dims), "batch", 0, "q", q_dims[0])?;
        same_axis(("v", v_dims), "batch", 0, "q", q_dims[0])?;
        same_axis(("v", v_dims), "seqlen_k", 1, "k", k_dims[1])?;
        let lengths = Lengths::Padded { batch: q_dims[0], seqlen_q: q_dims[1], seqlen_k: k_dims[1] };
        Self::checked(options, lengths, q, k, v)
    }

    /// Checks one call in the padded layout with q, k and v in one tensor. Returns q beside it, a view.
    pub fn fused(options: &Attention, qkv: &Tensor, num_heads_k: usize) -> Result<(Self, Tensor)> {
        check_rank("qkv", qkv, 4, "(batch, seqlen, num_heads + 2 * num_heads_k, head_dim)")?;
        let heads = qkv.dims()[2];
        if num_heads_k > 0 && heads.div_ceil(2) <= num_heads_k {
            return Err(Error::FusedHeads { heads, num_heads_k, shape: qkv.dims().to_vec() });
        }
        // Before q, a view of it, is told off by a name that the caller does not know.
        Strides::of("qkv", qkv.layout())?;
        let [q, k, v] = split_qkv(qkv, num_heads_k)?;
        Ok((Self::padded(options, &q, &k, &v)?, q))
    }

    /// Checks one call in the packed layout.
    pub fn packed(
        options: &Attention,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<Self> {
        const AXES_Q: &str = "(total_q, num_heads, head_dim)";
        const AXES_K: &str = "(total_k, num_heads_k, head_dim)";
        for (tensor, x, axes) in [("q", q, AXES_Q), ("k", k, AXES_K), ("v", v, AXES_K)] {
            check_rank(tensor, x, 3, axes)?;
        }
        if cu_seqlens_q.batch() != cu_seqlens_k.batch() {
            return Err(Error::PackedBatch { batch_q: cu_seqlens_q.batch(), batch_k: cu_seqlens_k.batch() });
        }
        let sides = [
            ("q", q, "cu_seqlens_q", cu_seqlens_q),
            ("k", k, "cu_seqlens_k", cu_seqlens_k),
            ("v", v, "cu_seqlens_k", cu_seqlens_k),
        ];
        for (tensor, x, cu_seqlens, lengths) in sides {
            if lengths.total() != x.dims()[0] {
                let (end, rows, shape) = (lengths.total(), x.dims()[0], x.dims().to_vec());
                return Err(Error::PackedRows { cu_seqlens, end, tensor, rows, shape });
            }
            let (got, expected) = (lengths.tensor().device().location(), q.device().location());
            if got != expected {
                return Err(Error::Device { tensor: cu_seqlens, got, expected });
            }
        }
        let lengths = Lengths::Packed { cu_seqlens_q: cu_seqlens_q.clone(), cu_seqlens_k: cu_seqlens_k.clone() };
        Self::checked(options, lengths, q, k, v)
    }

    /// The checks that both layouts share: from the second last axis on, their tensors look the same.
    fn checked(options: &Attention, lengths: Lengths, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let (dtype, device) = (q.dtype(), q.device().location());
        if !is_float(dtype) {
            return Err(Error::DType { tensor: "q", got: dtype, supported: FLOAT_DTYPES });
        }
        for (tensor, x) in [("k", k), ("v", v)] {
            if x.dtype() != dtype {
                return Err(Error::DTypeMismatch { tensor, got: x.dtype(), expected: dtype });
            }
            if x.device().location() != device {
                return Err(Error::Device { tensor, got: x.device().location(), expected: device });
            }
        }
        let heads_axis = q.rank() - 2;
        let (num_heads, head_dim) = (q.dims()[heads_axis], q.dims()[heads_axis + 1]);
        let num_heads_k = k.dims()[heads_axis];
        same_axis(("v", v.dims()), "num_heads_k", heads_axis, "k", num_heads_k)?;
        same_axis(("k", k.dims()), "head_dim", heads_axis + 1, "q", head_dim)?;
        same_axis(("v", v.dims()), "head_dim", heads_axis + 1, "q", head_dim)?;
        if !(1..=MAX_HEAD_DIM).contains(&head_dim) {
            return Err(Error::HeadDim { head_dim, max: MAX_HEAD_DIM });
        }
        let no_heads = num_heads == 0 && num_heads_k == 0;
        if !no_heads && (num_heads_k == 0 || num_heads % num_heads_k != 0) {
            return Err(Error::HeadGroups { num_heads, num_heads_k });
        }
        for (tensor, x) in [("q", q), ("k", k), ("v", v)] {
            // Broadcast tensors may have any shape; their gradients and o are of that size.
            let elements = x.dims().iter().try_fold(1usize, |elements, &size| elements.checked_mul(size));
            if elements.is_none_or(|elements| elements > isize::MAX as usize / size_of::<f64>()) {
                return Err(Error::TooLarge { tensor, shape: x.dims().to_vec() });
            }
        }
        let softmax_scale = options.softmax_scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        check_scale(softmax_scale, options.softcap, dtype)?;
        let batch = match &lengths {
            Lengths::Padded { batch, .. } => *batch,
            Lengths::Packed { cu_seqlens_q, .. } => cu_seqlens_q.batch(),
        };
        Ok(Self {
            dtype,
            device,
            lengths,
            num_heads,
            num_heads_k,
            head_dim,
            mask: options.mask,
            softmax_scale,
            softcap: options.softcap,
            deterministic: options.deterministic,
            alibi: check_alibi(options.alibi_slopes.as_ref(), batch, num_heads, device)?,
            q: Strides::of("q", q.layout())?,
            k: Strides::of("k", k.layout())?,
            v: Strides::of("v", v.layout())?,
        })
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        match &self.lengths {
            Lengths::Padded { batch, .. } => *batch,
            Lengths::Packed { cu_seqlens_q, .. } => cu_seqlens_q.batch(),
        }
    }

    /// Sequence `batch`.
    pub fn sequence(&self, batch: usize) -> Sequence {
        match &self.lengths {
            &Lengths::Padded { seqlen_q, seqlen_k, .. } => {
                Sequence { batch, seqlen_q, seqlen_k, first_q: 0, first_k: 0 }
            }
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
                let span = |offsets: &[u32]| (offsets[batch] as usize, (offsets[batch + 1] - offsets[batch]) as usize);
                let (first_q, seqlen_q) = span(cu_seqlens_q.offsets());
                let (first_k, seqlen_k) = span(cu_seqlens_k.offsets());
                Sequence { batch, seqlen_q, seqlen_k, first_q, first_k }
            }
        }
    }

    /// All sequences.
    pub fn sequences(&self) -> impl Iterator<Item = Sequence> + '_ {
        (0..self.batch()).map(|batch| self.sequence(batch))
    }

    /// Which keys each query of `sequence` sees.
    pub fn visibility(&self, sequence: &Sequence) -> Visibility {
        self.mask.over(sequence.seqlen_q, sequence.seqlen_k)
    }

    /// Query heads per key head.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_heads_k.max(1)
    }

    /// Rows of q over all sequences.
    pub fn rows_q(&self) -> usize {
        match &self.lengths {
            Lengths::Padded { batch, seqlen_q, .. } => batch * seqlen_q,
            Lengths::Packed { cu_seqlens_q, .. } => cu_seqlens_q.total(),
        }
    }

    /// Rows of k and v over all sequences.
    pub fn rows_k(&self) -> usize {
        match &self.lengths {
            Lengths::Padded { batch, seqlen_k, .. } => batch * seqlen_k,
            Lengths::Packed { cu_seqlens_k, .. } => cu_seqlens_k.total(),
        }
    }

    /// Queries of the longest sequence.
    pub fn max_seqlen_q(&self) -> usize {
        match &self.lengths {
            Lengths::Padded { seqlen_q, .. } => *seqlen_q,
            Lengths::Packed { cu_seqlens_q, .. } => cu_seqlens_q.max_seqlen(),
        }
    }

    /// Keys of the longest sequence.
    pub fn max_seqlen_k(&self) -> usize {
        match &self.lengths {
            Lengths::Padded { seqlen_k, .. } => *seqlen_k,
            Lengths::Packed { cu_seqlens_k, .. } => cu_seqlens_k.max_seqlen(),
        }
    }

    /// Shape of q and o.
    pub fn shape_q(&self) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => vec![batch, seqlen_q, self.num_heads, self.head_dim],
            Lengths::Packed { cu_seqlens_q, .. } => vec![cu_seqlens_q.total(), self.num_heads, self.head_dim],
        }
    }

    /// Shape of k and v.
    pub fn shape_k(&self) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_k, .. } => vec![batch, seqlen_k, self.num_heads_k, self.head_dim],
            Lengths::Packed { cu_seqlens_k, .. } => vec![cu_seqlens_k.total(), self.num_heads_k, self.head_dim],
        }
    }

    /// Shape of lse: `(batch, num_heads, seqlen_q)`, packed `(num_heads, total_q)`.
    pub fn shape_lse(&self) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => vec![batch, self.num_heads, seqlen_q],
            Lengths::Packed { cu_seqlens_q, .. } => vec![self.num_heads, cu_seqlens_q.total()],
        }
    }

    /// Strides of a contiguous tensor of shape [`Self::shape_q`]: o, dq and do.
    pub fn contiguous_q(&self) -> Strides {
        self.contiguous(self.num_heads, |sequence| sequence.seqlen_q)
    }

    /// Strides of a contiguous tensor of shape [`Self::shape_k`]: dk and dv.
    pub fn contiguous_k(&self) -> Strides {
        self.contiguous(self.num_heads_k, |sequence| sequence.seqlen_k)
    }

    /// Strides of q, k and v, or of their gradients, in one contiguous tensor, side by side along its axis of heads.
    pub fn contiguous_qkv(&self) -> [Strides; 3] {
        let all = self.contiguous(self.num_heads + 2 * self.num_heads_k, |sequence| sequence.seqlen_q);
        [0, self.num_heads, self.num_heads + self.num_heads_k]
            .map(|heads| Strides { offset: heads * self.head_dim, ..all })
    }

    /// Index of the first lse of `sequence` and `head`; its rows follow one after the other.
    pub fn lse_start(&self, sequence: &Sequence, head: usize) -> usize {
        match &self.lengths {
            &Lengths::Padded { seqlen_q, .. } => (sequence.batch * self.num_heads + head) * seqlen_q,
            Lengths::Packed { cu_seqlens_q, .. } => head * cu_seqlens_q.total() + sequence.first_q,
        }
    }

    fn contiguous(&self, num_heads: usize, seqlen: impl Fn(&Sequence) -> usize) -> Strides {
        let row = num_heads * self.head_dim;
        let batch = match self.lengths {
            Lengths::Padded { batch: 0, .. } | Lengths::Packed { .. } => 0,
            Lengths::Padded { .. } => seqlen(&self.sequence(0)) * row,
        };
        Strides { offset: 0, batch, row, head: self.head_dim }
    }
}

impl Strides {
    /// Strides of a tensor in the padded (4 axes) or packed (3 axes) layout.
    ///
    /// # Errors
    /// [`Error::LastAxis`] if the last axis is not contiguous.
    pub fn of(tensor: &'static str, layout: &Layout) -> Result<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let last = dims.len() - 1;
        // With one element or none along the axis, or none at all, its stride is never used.
        if strides[last] != 1 && dims[last] > 1 && layout.shape().elem_count() > 0 {
            return Err(Error::LastAxis { tensor, shape: dims.to_vec(), strides: strides.to_vec() });
        }
        let batch = if dims.len() == 4 { strides[0] } else { 0 };
        Ok(Self { offset: layout.start_offset(), batch, row: strides[last - 2], head: strides[last - 1] })
    }

    /// Index of element 0 of row `first_row` of one head of one sequence.
    pub fn start(&self, batch: usize, first_row: usize, head: usize) -> usize {
        self.offset + batch * self.batch + first_row * self.row + head * self.head
    }
}

fn check_rank(tensor: &'static str, x: &Tensor, rank: usize, axes: &'static str) -> Result<()> {
    if x.rank() == rank {
        Ok(())
    } else {
        Err(Error::Rank { tensor, axes, shape: x.dims().to_vec() })
    }
}

/// Checks that axis `index` of a tensor has the size that `other` has.
fn same_axis(
    (tensor, dims): (&'static str, &[usize]),
    axis: &'static str,
    index: usize,
    other: &'static str,
    expected: usize,
) -> Result<()> {
    let got = dims[index];
    if got == expected {
        Ok(())
    } else {
        Err(Error::Axis { tensor, axis, got, other, expected, shape: dims.to_vec() })
    }
}

/// Whether the factors of the scores are numbers of the type that scores are computed in.
fn check_scale(softmax_scale: f64, softcap: Option<f64>, dtype: DType) -> Result<()> {
    if !softmax_scale.is_finite() {
        return Err(Error::SoftmaxScale(softmax_scale));
    }
    if let Some(softcap) = softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return Err(Error::Softcap(softcap));
    }
    let fits = |factor: f64| match dtype {
        DType::F64 => factor.is_finite(),
        _ => (factor as f32).is_finite(),
    };
    let log2_e = std::f64::consts::LOG2_E;
    if let Some(value) = softcap.filter(|softcap| !fits(softcap * log2_e) || !fits(softmax_scale / softcap)) {
        return Err(Error::ScaleRange { name: "softcap", value, dtype, default: "no cap" });
    }
    if !fits(softmax_scale * log2_e) {
        let (name, default) = ("softmax_scale", "1/sqrt(head_dim)");
        return Err(Error::ScaleRange { name, value: softmax_scale, dtype, default });
    }
    Ok(())
}

fn check_alibi(
    slopes: Option<&Tensor>,
    batch: usize,
    num_heads: usize,
    device: DeviceLocation,
) -> Result<Option<Alibi>> {
    let Some(slopes) = slopes else { return Ok(None) };
    let tensor = "alibi_slopes";
    if slopes.dtype() != DType::F32 {
        return Err(Error::DType { tensor, got: slopes.dtype(), supported: "F32" });
    }
    if slopes.device().location() != device {
        return Err(Error::Device { tensor, got: slopes.device().location(), expected: device });
    }
    if slopes.track_op() {
        return Err(Error::Tracked { tensor, operation: "attention" });
    }
    let alibi = match slopes.dims() {
        &[heads] if heads == num_heads => Alibi::PerHead,
        &[sequences, heads] if (sequences, heads) == (batch, num_heads) => Alibi::PerBatchAndHead,
        shape => return Err(Error::AlibiShape { num_heads, batch, shape: shape.to_vec() }),
    };
    // Elsewhere than on the host a look at the values would stop the device's queue.
    if slopes.device().is_cpu() {
        let values: Vec<f32> = slopes.flatten_all()?.to_vec1()?;
        if let Some(index) = values.iter().position(|slope| !slope.is_finite()) {
            return Err(Error::AlibiValue { value: values[index], index });
        }
    }
    Ok(Some(alibi))
}
