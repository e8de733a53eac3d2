//! The log-sum-exp of each row, kept for the backward in two parts.

/// Two numbers per row, in vectors, slices, storages or tensors. One number would be rounded at its own size, and
/// `exp(score - lse)` of a large score would be off by as much.
#[derive(Clone, Copy)]
pub(crate) struct Lse<T> {
    /// Largest score, times log2 e; minus infinity for a row that sees no key.
    pub(crate) row_max: T,
    /// log2 of the sum of `exp(score - row_max)`.
    pub(crate) log2_sum: T,
}

impl<T> Lse<T> {
    /// Applies `f` to both parts.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Lse<U> {
        Lse { row_max: f(self.row_max), log2_sum: f(self.log2_sum) }
    }

    /// As [`Self::map`]; the first error ends it.
    pub(super) fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Lse<U>, E> {
        Ok(Lse { row_max: f(self.row_max)?, log2_sum: f(self.log2_sum)? })
    }

    /// References to both parts.
    pub(super) fn as_ref(&self) -> Lse<&T> {
        Lse { row_max: &self.row_max, log2_sum: &self.log2_sum }
    }
}
