//! The log-sum-exp of each row, in two parts.

/// The log-sum-exp of each row, in two parts. Each part is a vector, slice, storage or tensor. The backward reads both.
///
/// A single number would be rounded. With large scores the rounding error is large, and `exp(score - lse)` would inherit it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lse<T> {
    /// Largest score, in the log2 domain. Minus infinity if the row sees no key.
    pub(crate) row_max_log2: T,
    /// log2 of the sum of `exp2(score - row_max_log2)`.
    pub(crate) row_sum_log2: T,
}

impl<T> Lse<T> {
    /// Applies `f` to both parts.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Lse<U> {
        Lse { row_max_log2: f(self.row_max_log2), row_sum_log2: f(self.row_sum_log2) }
    }

    /// As [`Self::map`], but stops at the first error.
    pub(super) fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Lse<U>, E> {
        Ok(Lse { row_max_log2: f(self.row_max_log2)?, row_sum_log2: f(self.row_sum_log2)? })
    }

    /// References to both parts.
    pub(super) fn as_ref(&self) -> Lse<&T> {
        Lse { row_max_log2: &self.row_max_log2, row_sum_log2: &self.row_sum_log2 }
    }
}
