//! Named tensors of a call. The fields of each struct are tensors, storages, slices, addresses or strides.

use candle_core::Tensor;

/// q, k and v.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs<T> {
    pub(crate) q: T,
    pub(crate) k: T,
    pub(crate) v: T,
}

impl<T> Inputs<T> {
    /// Applies `f` to q, k and v in this order.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Inputs<U> {
        Inputs { q: f(self.q), k: f(self.k), v: f(self.v) }
    }

    /// As [`Self::map`], but stops at the first error.
    pub(crate) fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Inputs<U>, E> {
        Ok(Inputs { q: f(self.q)?, k: f(self.k)?, v: f(self.v)? })
    }

    /// References to q, k and v.
    pub(crate) fn as_ref(&self) -> Inputs<&T> {
        Inputs { q: &self.q, k: &self.k, v: &self.v }
    }
}

/// The gradients of q, k and v.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gradients<T> {
    pub(crate) dq: T,
    pub(crate) dk: T,
    pub(crate) dv: T,
}

impl<T> Gradients<T> {
    /// Applies `f` to dq, dk and dv in this order.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Gradients<U> {
        Gradients { dq: f(self.dq), dk: f(self.dk), dv: f(self.dv) }
    }
}

/// Everything that a backward reads.
pub(crate) struct BackwardInputs<'a, Lse> {
    pub(crate) inputs: Inputs<&'a Tensor>,
    /// The result of the forward: o, or o and lse in one flat tensor.
    pub(crate) result: &'a Tensor,
    /// The gradient of the result.
    pub(crate) grad: &'a Tensor,
    /// The log-sum-exp of each row, in the form of the device.
    pub(crate) lse: &'a Lse,
}
