//! What the operator returns.

use candle_core::{Result, Tensor};

/// The one tensor that the operator returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// o in its layout, in the type of q.
    O,
    /// o and then lse, flat, both in the accumulator's type. A custom operator of Candle has one result.
    OAndLse,
}

/// o in the accumulator's type, and lse, cut from the flat result of [`Output::OAndLse`]. Both are views that stay in its
/// graph.
pub(crate) fn o_and_lse(both: &Tensor, shape_o: Vec<usize>, shape_lse: Vec<usize>) -> Result<(Tensor, Tensor)> {
    let (o_len, lse_len) = (shape_o.iter().product(), shape_lse.iter().product());
    let o = both.narrow(0, 0, o_len)?.reshape(shape_o)?;
    let lse = both.narrow(0, o_len, lse_len)?.reshape(shape_lse)?;
    Ok((o, lse))
}
