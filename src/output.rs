//! The result of the operator.

use candle_core::{Result, Tensor};

/// The kind of the operator's result, which is always one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// o in its layout, in the type of q.
    O,
    /// o, then lse, in one flat tensor of the accumulator's type, because a custom operator of Candle has only one result.
    OAndLse,
}

/// o in the accumulator's type, and lse, from the flat result of [`Output::OAndLse`]. Both are views in its graph.
pub(crate) fn o_and_lse(both: &Tensor, shape_o: Vec<usize>, shape_lse: Vec<usize>) -> Result<(Tensor, Tensor)> {
    let (o_len, lse_len) = (shape_o.iter().product(), shape_lse.iter().product());
    let o = both.narrow(0, 0, o_len)?.reshape(shape_o)?;
    let lse = both.narrow(0, o_len, lse_len)?.reshape(shape_lse)?;
    Ok((o, lse))
}
