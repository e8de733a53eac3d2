//! All checks of shapes, strides, dtypes and devices. Code that gets a [`Problem`] checks none of this again.

use candle_core::{DType, DeviceLocation, Layout, Tensor};

use crate::error::{Error, Result};
use crate::layout::TensorLayout;
use crate::mask::{Mask, Visibility};
use crate::options::Options;
use crate::packed::CuSeqlens;
use crate::padding::KeyLengths;

/// The largest supported head_dim. The CPU keeps a strip of rows of this size on the stack (src/cpu/forward.rs).
pub const MAX_HEAD_DIM: usize = 512;

/// The supported element types, as text for errors.
pub(crate) const FLOAT_DTYPES: &str = "F64, F32, F16, BF16";

/// Whether `dtype` is one of [`FLOAT_DTYPES`].
pub(crate) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// How the rows of one call are divided into sequences.
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
        /// Number of valid keys per sequence; `None`: all.
        key_lengths: Option<KeyLengths>,
    },
    /// q is `(total_q, num_heads, head_dim)`: sequences end to end.
    Packed {
        /// Where the queries of each sequence begin and end.
        cu_seqlens_q: CuSeqlens,
        /// Where the keys of each sequence begin and end.
        cu_seqlens_k: CuSeqlens,
    },
}

/// Offset and strides of one tensor, in elements. The last axis has stride 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// Index of the first element in the storage.
    pub offset: usize,
    /// Stride from one sequence to the next. 0 for packed tensors, whose sequences differ only in their rows.
    pub batch: usize,
    /// Stride from one token to the next.
    pub row: usize,
    /// Stride from one head to the next.
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

/// One checked attention call: everything that defines the result. The plan defines how it is computed.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Element type of q, k and v. o has it too, unless the call returns lse: then o has the type of lse.
    pub dtype: DType,
    /// The device of q, k and v.
    pub device: DeviceLocation,
    /// The sequences.
    pub lengths: Lengths,
    /// Heads of q.
    pub num_heads: usize,
    /// Heads of k and v; divides `num_heads`.
    pub num_heads_k: usize,
    /// Size of the last axis of q and k, `1..=MAX_HEAD_DIM`.
    pub head_dim: usize,
    /// Size of the last axis of v and o, `1..=MAX_HEAD_DIM`.
    pub head_dim_v: usize,
    /// Which keys each query sees.
    pub mask: Mask,
    /// Factor of the scores.
    pub softmax_scale: f64,
    /// Bound of the scaled scores, `softcap * tanh(score / softcap)`.
    pub softcap: Option<f64>,
    /// The shape of the ALiBi slopes; `None` without ALiBi.
    pub alibi: Option<Alibi>,
    /// Whether the same inputs must always give the same bits of dq.
    pub deterministic: bool,
    /// Whether products of f32 may be one product of TF32 each.
    pub tf32: bool,
    /// Name of the first input that is tracked for gradients; `None` if none is.
    pub tracked: Option<&'static str>,
    /// Whether q, k and v are views of one tensor, `qkv`.
    pub fused: bool,
    /// Axis order of q, k, v and of their gradients.
    pub layout: TensorLayout,
    /// Axis order of o and of its gradient.
    pub output_layout: TensorLayout,
    /// Strides of q.
    pub q: Strides,
    /// Strides of k.
    pub k: Strides,
    /// Strides of v.
    pub v: Strides,
}

/// Views of q, k and v in one tensor. The heads of q come first, then k, then v, along the head axis of `layout`.
pub(crate) fn split_qkv(qkv: &Tensor, num_heads_k: usize, layout: TensorLayout) -> Result<[Tensor; 3]> {
    let (_, axis) = layout.axes(qkv.rank());
    let num_heads = qkv.dims()[axis] - 2 * num_heads_k;
    let heads = |start, len| qkv.narrow(axis, start, len);
    Ok([heads(0, num_heads)?, heads(num_heads, num_heads_k)?, heads(num_heads + num_heads_k, num_heads_k)?])
}

/// One sequence of a [`Problem`]: its lengths and its first rows.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    /// Its index.
    pub batch: usize,
    /// Number of queries.
    pub seqlen_q: usize,
    /// Number of valid keys.
    pub seqlen_k: usize,
    /// Its first row in q; 0 unless packed.
    pub first_q: usize,
    /// Its first valid row in k and v; 0 unless packed or padded on the left.
    pub first_k: usize,
}

impl Problem {
    /// Checks one padded call.
    pub fn padded(options: &Options, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        check_ranks(options.layout, &PADDED, q, k, v)?;
        let (q_dims, k_dims, v_dims) = (q.dims(), k.dims(), v.dims());
        check_sizes(options.layout, &PADDED, |layout| {
            let (seqlen_axis, _) = layout.axes(4);
            same_axis(("k", k_dims), "batch", 0, "q", q_dims[0])?;
            same_axis(("v", v_dims), "batch", 0, "q", q_dims[0])?;
            same_axis(("v", v_dims), "seqlen_k", seqlen_axis, "k", k_dims[seqlen_axis])?;
            check_heads(layout, q_dims, k_dims, v_dims)
        })?;
        let (seqlen_axis, _) = options.layout.axes(4);
        let (batch, seqlen_q, seqlen_k) = (q_dims[0], q_dims[seqlen_axis], k_dims[seqlen_axis]);
        let key_lengths = options.key_lengths.clone();
        if let Some(lengths) = &key_lengths {
            lengths.check(batch, seqlen_k)?;
            let positions_matter = options.mask.hides_keys() || options.alibi_slopes.is_some();
            if positions_matter {
                lengths.check_alignment(seqlen_q)?;
            }
            check_device("key_lengths", lengths.tensor(), q)?;
        }
        let lengths = Lengths::Padded { batch, seqlen_q, seqlen_k, key_lengths };
        Self::checked(options, lengths, q, k, v)
    }

    /// Checks one padded call with q, k and v in one tensor. Also returns the view of q.
    pub fn fused(options: &Options, qkv: &Tensor, num_heads_k: usize) -> Result<(Self, Tensor)> {
        let axes = match options.layout {
            TensorLayout::Bshd => "(batch, seqlen, num_heads + 2 * num_heads_k, head_dim)",
            TensorLayout::Bhsd => "(batch, num_heads + 2 * num_heads_k, seqlen, head_dim)",
        };
        check_rank("qkv", qkv, 4, axes)?;
        let (_, heads_axis) = options.layout.axes(4);
        let heads = qkv.dims()[heads_axis];
        if num_heads_k > 0 && heads.div_ceil(2) <= num_heads_k {
            return Err(Error::FusedHeads { heads, num_heads_k, shape: qkv.dims().to_vec() });
        }
        // Check `qkv` first, so that an error names the tensor that the caller passed.
        Strides::of("qkv", qkv.layout(), options.layout)?;
        let [q, k, v] = split_qkv(qkv, num_heads_k, options.layout)?;
        let problem = Self::padded(options, &q, &k, &v).map_err(|error| match error {
            // Do not suggest the other layout, because the views were split along the head axis of this layout.
            Error::SwappedAxes { error, .. } => *error,
            error => error,
        })?;
        Ok((Self { tracked: problem.tracked.map(|_| "qkv"), fused: true, ..problem }, q))
    }

    /// Checks one packed call.
    pub fn packed(
        options: &Options,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<Self> {
        check_ranks(options.layout, &PACKED, q, k, v)?;
        if options.key_lengths.is_some() {
            return Err(Error::KeyLengthsPacked);
        }
        if cu_seqlens_q.batch() != cu_seqlens_k.batch() {
            return Err(Error::PackedBatch { batch_q: cu_seqlens_q.batch(), batch_k: cu_seqlens_k.batch() });
        }
        let sides = [
            ("q", q, "cu_seqlens_q", cu_seqlens_q),
            ("k", k, "cu_seqlens_k", cu_seqlens_k),
            ("v", v, "cu_seqlens_k", cu_seqlens_k),
        ];
        check_sizes(options.layout, &PACKED, |layout| {
            let (total_axis, _) = layout.axes(3);
            for (tensor, x, cu_seqlens, lengths) in sides {
                let (end, rows) = (lengths.total(), x.dims()[total_axis]);
                if rows != end {
                    return Err(Error::PackedRows { cu_seqlens, end, tensor, rows, shape: x.dims().to_vec() });
                }
            }
            check_heads(layout, q.dims(), k.dims(), v.dims())
        })?;
        for (_, _, cu_seqlens, lengths) in sides {
            check_device(cu_seqlens, lengths.tensor(), q)?;
        }
        let lengths = Lengths::Packed { cu_seqlens_q: cu_seqlens_q.clone(), cu_seqlens_k: cu_seqlens_k.clone() };
        Self::checked(options, lengths, q, k, v)
    }

    /// The checks that padded and packed calls share. The caller has checked the heads.
    fn checked(options: &Options, lengths: Lengths, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let (dtype, device) = (q.dtype(), q.device().location());
        if !is_float(dtype) {
            return Err(Error::DType { tensor: "q", got: dtype, supported: FLOAT_DTYPES });
        }
        for (tensor, x) in [("k", k), ("v", v)] {
            if x.dtype() != dtype {
                return Err(Error::DTypeMismatch { tensor, got: x.dtype(), expected: dtype });
            }
            check_device(tensor, x, q)?;
        }
        if options.tf32 && dtype != DType::F32 {
            return Err(Error::Tf32(dtype));
        }
        let (_, heads_axis) = options.layout.axes(q.rank());
        let (num_heads, num_heads_k) = (q.dims()[heads_axis], k.dims()[heads_axis]);
        let last = q.rank() - 1;
        let (head_dim, head_dim_v) = (q.dims()[last], v.dims()[last]);
        for (name, head_dim) in [("head_dim", head_dim), ("head_dim_v", head_dim_v)] {
            if !(1..=MAX_HEAD_DIM).contains(&head_dim) {
                return Err(Error::HeadDim { name, head_dim, max: MAX_HEAD_DIM });
            }
        }
        let mut shape_o = q.dims().to_vec();
        shape_o[last] = head_dim_v;
        for (tensor, shape) in [("q", q.dims()), ("k", k.dims()), ("v", v.dims()), ("o", &shape_o)] {
            // A broadcast tensor may have any shape without using memory, but its gradient and o need memory of that size.
            let elements = shape.iter().try_fold(1usize, |elements, &size| elements.checked_mul(size));
            if elements.is_none_or(|elements| elements > isize::MAX as usize / size_of::<f64>()) {
                return Err(Error::TooLarge { tensor, shape: shape.to_vec() });
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
            head_dim_v,
            mask: options.mask,
            softmax_scale,
            softcap: options.softcap,
            deterministic: options.deterministic,
            tf32: options.tf32,
            tracked: [("q", q), ("k", k), ("v", v)].into_iter().find(|(_, x)| x.track_op()).map(|(name, _)| name),
            fused: false,
            layout: options.layout,
            output_layout: options.layout_of_result(),
            alibi: check_alibi(options.alibi_slopes.as_ref(), batch, num_heads, device)?,
            q: Strides::of("q", q.layout(), options.layout)?,
            k: Strides::of("k", k.layout(), options.layout)?,
            v: Strides::of("v", v.layout(), options.layout)?,
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
            &Lengths::Padded { seqlen_q, seqlen_k, ref key_lengths, .. } => {
                let all = (0, seqlen_k);
                let (first_k, seqlen_k) = key_lengths.as_ref().map_or(all, |lengths| lengths.keys(batch, seqlen_k));
                Sequence { batch, seqlen_q, seqlen_k, first_q: 0, first_k }
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

    /// Shape of o in its layout.
    pub fn shape_of_result(&self) -> Vec<usize> {
        self.output_layout.order(self.shape_o())
    }

    /// Sizes of q in the order of [`TensorLayout::Bshd`].
    pub fn shape_q(&self) -> Vec<usize> {
        self.shape_of_queries(self.head_dim)
    }

    /// Sizes of k in the order of [`TensorLayout::Bshd`].
    pub fn shape_k(&self) -> Vec<usize> {
        self.shape_of_keys(self.head_dim)
    }

    /// Sizes of v in the order of [`TensorLayout::Bshd`].
    pub fn shape_v(&self) -> Vec<usize> {
        self.shape_of_keys(self.head_dim_v)
    }

    /// Sizes of o in the order of [`TensorLayout::Bshd`].
    pub fn shape_o(&self) -> Vec<usize> {
        self.shape_of_queries(self.head_dim_v)
    }

    /// Sizes of a tensor with `width` elements for each query and head.
    fn shape_of_queries(&self, width: usize) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => vec![batch, seqlen_q, self.num_heads, width],
            Lengths::Packed { cu_seqlens_q, .. } => vec![cu_seqlens_q.total(), self.num_heads, width],
        }
    }

    /// Sizes of a tensor with `width` elements for each key and key head.
    fn shape_of_keys(&self, width: usize) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_k, .. } => vec![batch, seqlen_k, self.num_heads_k, width],
            Lengths::Packed { cu_seqlens_k, .. } => vec![cu_seqlens_k.total(), self.num_heads_k, width],
        }
    }

    /// Shape of lse: `(batch, num_heads, seqlen_q)`, packed `(num_heads, total_q)`.
    pub fn shape_lse(&self) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => vec![batch, self.num_heads, seqlen_q],
            Lengths::Packed { cu_seqlens_q, .. } => vec![self.num_heads, cu_seqlens_q.total()],
        }
    }

    /// Strides of o, contiguous in its layout.
    pub fn contiguous_o(&self) -> Strides {
        self.contiguous(self.output_layout, self.shape_o())
    }

    /// Strides of dq, contiguous in the layout of q.
    pub fn contiguous_q(&self) -> Strides {
        self.contiguous(self.layout, self.shape_q())
    }

    /// Strides of dk, contiguous in the layout of k.
    pub fn contiguous_k(&self) -> Strides {
        self.contiguous(self.layout, self.shape_k())
    }

    /// Strides of dv, contiguous in the layout of v.
    pub fn contiguous_v(&self) -> Strides {
        self.contiguous(self.layout, self.shape_v())
    }

    /// This problem with other head_dims, and with contiguous copies of the inputs named in `copied`. softmax_scale stays.
    /// If the inputs are fused, `copied` names all or none of them, and the copies are views of one copy of qkv.
    pub(crate) fn with_copies(mut self, copied: &[&str], head_dim: usize, head_dim_v: usize) -> Self {
        (self.head_dim, self.head_dim_v) = (head_dim, head_dim_v);
        if copied.is_empty() {
            return self;
        }
        let [q, k, v] = match self.fused {
            true => self.contiguous_qkv(),
            false => [self.contiguous_q(), self.contiguous_k(), self.contiguous_v()],
        };
        for (name, strides, copy) in [("q", &mut self.q, q), ("k", &mut self.k, k), ("v", &mut self.v, v)] {
            if copied.contains(&name) {
                *strides = copy;
            }
        }
        self
    }

    /// Strides of q, k and v, or of their gradients, in one contiguous tensor, one after another along its head axis. All three have
    /// the same head_dim, because they come from one tensor.
    pub fn contiguous_qkv(&self) -> [Strides; 3] {
        let mut shape = self.shape_q();
        let heads_axis = shape.len() - 2;
        shape[heads_axis] = self.num_heads + 2 * self.num_heads_k;
        let all = self.contiguous(self.layout, shape);
        [0, self.num_heads, self.num_heads + self.num_heads_k].map(|heads| Strides { offset: heads * all.head, ..all })
    }

    /// Index of the first lse of `sequence` and `head`. Its rows are contiguous.
    pub fn lse_start(&self, sequence: &Sequence, head: usize) -> usize {
        match &self.lengths {
            &Lengths::Padded { seqlen_q, .. } => (sequence.batch * self.num_heads + head) * seqlen_q,
            Lengths::Packed { cu_seqlens_q, .. } => head * cu_seqlens_q.total() + sequence.first_q,
        }
    }

    /// Strides of a contiguous tensor in `layout`; `shape` is in the order of [`TensorLayout::Bshd`].
    fn contiguous(&self, layout: TensorLayout, shape: Vec<usize>) -> Strides {
        Strides::in_order(&Layout::contiguous(layout.order(shape)), layout)
    }
}

impl Strides {
    /// Strides of a padded tensor (4 axes) or a packed one (3 axes).
    ///
    /// # Errors
    /// [`Error::LastAxis`] if the last axis is not contiguous.
    pub fn of(tensor: &'static str, layout: &Layout, order: TensorLayout) -> Result<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let last = dims.len() - 1;
        // If the axis has at most one element, or the tensor is empty, the stride is never used.
        if strides[last] != 1 && dims[last] > 1 && layout.shape().elem_count() > 0 {
            return Err(Error::LastAxis { tensor, shape: dims.to_vec(), strides: strides.to_vec() });
        }
        Ok(Self::in_order(layout, order))
    }

    /// The strides of `layout`, whose axes are in `order`.
    fn in_order(layout: &Layout, order: TensorLayout) -> Self {
        let strides = layout.stride();
        let (row_axis, head_axis) = order.axes(strides.len());
        let batch = if strides.len() == 4 { strides[0] } else { 0 };
        Self { offset: layout.start_offset(), batch, row: strides[row_axis], head: strides[head_axis] }
    }

    /// Index of the first element of row `first_row` of one head of one sequence.
    pub fn start(&self, batch: usize, first_row: usize, head: usize) -> usize {
        self.offset + batch * self.batch + first_row * self.row + head * self.head
    }
}

/// Names of the axes of q, k and v, in [`TensorLayout::Bshd`] and in [`TensorLayout::Bhsd`].
struct Axes {
    q: [&'static str; 2],
    k: [&'static str; 2],
    v: [&'static str; 2],
}

const PADDED: Axes = Axes {
    q: ["(batch, seqlen_q, num_heads, head_dim)", "(batch, num_heads, seqlen_q, head_dim)"],
    k: ["(batch, seqlen_k, num_heads_k, head_dim)", "(batch, num_heads_k, seqlen_k, head_dim)"],
    v: ["(batch, seqlen_k, num_heads_k, head_dim_v)", "(batch, num_heads_k, seqlen_k, head_dim_v)"],
};

const PACKED: Axes = Axes {
    q: ["(total_q, num_heads, head_dim)", "(num_heads, total_q, head_dim)"],
    k: ["(total_k, num_heads_k, head_dim)", "(num_heads_k, total_k, head_dim)"],
    v: ["(total_k, num_heads_k, head_dim_v)", "(num_heads_k, total_k, head_dim_v)"],
};

/// Checks the ranks of q, k and v.
fn check_ranks(layout: TensorLayout, axes: &Axes, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    for (tensor, x, axes) in [("q", q, axes.q), ("k", k, axes.k), ("v", v, axes.v)] {
        let axes = axes[layout as usize];
        check_rank(tensor, x, axes.split(',').count(), axes)?;
    }
    Ok(())
}

/// Checks the sizes in `layout`. If they fit only the other layout, the error is [`Error::SwappedAxes`].
fn check_sizes(layout: TensorLayout, axes: &Axes, sizes: impl Fn(TensorLayout) -> Result<()>) -> Result<()> {
    sizes(layout).map_err(|error| match sizes(layout.other()) {
        Ok(()) => {
            let layout = layout.other();
            Error::SwappedAxes { error: Box::new(error), axes: axes.q[layout as usize], layout }
        }
        Err(_) => error,
    })
}

fn check_rank(tensor: &'static str, x: &Tensor, rank: usize, axes: &'static str) -> Result<()> {
    if x.rank() == rank {
        Ok(())
    } else {
        Err(Error::Rank { tensor, axes, shape: x.dims().to_vec() })
    }
}

/// Returns an error unless a tensor is on the device of q.
fn check_device(tensor: &'static str, x: &Tensor, q: &Tensor) -> Result<()> {
    let (got, expected) = (x.device().location(), q.device().location());
    if got == expected {
        Ok(())
    } else {
        Err(Error::Device { tensor, got, expected })
    }
}

/// Returns an error unless axis `index` of a tensor has the size of the same axis of `other`.
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

/// Returns an error unless the heads of q, k and v agree, and the head_dim of q and k. v may have another head_dim.
fn check_heads(layout: TensorLayout, q: &[usize], k: &[usize], v: &[usize]) -> Result<()> {
    let (last, (_, heads_axis)) = (q.len() - 1, layout.axes(q.len()));
    let (num_heads, num_heads_k) = (q[heads_axis], k[heads_axis]);
    same_axis(("v", v), "num_heads_k", heads_axis, "k", num_heads_k)?;
    same_axis(("k", k), "head_dim", last, "q", q[last])?;
    let no_heads = num_heads == 0 && num_heads_k == 0;
    if !no_heads && (num_heads_k == 0 || !num_heads.is_multiple_of(num_heads_k)) {
        return Err(Error::HeadGroups { num_heads, num_heads_k });
    }
    Ok(())
}

/// Returns an error unless `softmax_scale` and `softcap` are finite in the type of the scores.
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
    // Only slopes on the CPU are checked, because reading values from a GPU would wait for it.
    if slopes.device().is_cpu() {
        let values: Vec<f32> = slopes.flatten_all()?.to_vec1()?;
        if let Some(index) = values.iter().position(|slope| !slope.is_finite()) {
            return Err(Error::AlibiValue { value: values[index], index });
        }
    }
    Ok(Some(alibi))
}
