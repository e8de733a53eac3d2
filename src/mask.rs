//! Which keys a query may see, and what that means for whole tiles.

use std::ops::Range;

/// Which keys each query sees.
///
/// Masks line up the last query with the last key. With `shift = seqlen_k - seqlen_q` (it may be negative), query `i`
/// is aligned with key `i + shift`. For `seqlen_q = 3` and `seqlen_k = 5`:
///
/// ```text
///       None              Causal           Window { left: Some(1), right: Some(0) }
///      k0 k1 k2 k3 k4     k0 k1 k2 k3 k4     k0 k1 k2 k3 k4
/// q0    x  x  x  x  x      x  x  x  .  .      .  x  x  .  .
/// q1    x  x  x  x  x      x  x  x  x  .      .  .  x  x  .
/// q2    x  x  x  x  x      x  x  x  x  x      .  .  .  x  x
/// ```
///
/// With more queries than keys the first rows may see nothing. Their output is 0, their gradients are 0, and their
/// log-sum-exp is minus infinity. For `seqlen_q = 4`, `seqlen_k = 2`, `Causal`:
///
/// ```text
///      k0 k1
/// q0    .  .
/// q1    .  .
/// q2    x  .
/// q3    x  x
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mask {
    /// Every query sees every key.
    #[default]
    None,
    /// Query `i` sees the keys up to `i + shift`. The same as `Window { left: None, right: Some(0) }`.
    Causal,
    /// Query `i` sees the keys from `i + shift - left` to `i + shift + right`, both included. `None` leaves that side
    /// open; `(Some(0), Some(0))` shows each query its aligned key alone.
    Window {
        /// How many keys before the aligned one are visible.
        left: Option<usize>,
        /// How many keys after the aligned one are visible.
        right: Option<usize>,
    },
}

impl Mask {
    /// Whether this mask can hide keys.
    pub(crate) fn hides_keys(self) -> bool {
        !matches!(self, Mask::None | Mask::Window { left: None, right: None })
    }

    /// The mask laid over one pair of sequences.
    pub(crate) fn over(self, seqlen_q: usize, seqlen_k: usize) -> Visibility {
        let (left, right) = match self {
            Mask::None => (None, None),
            Mask::Causal => (None, Some(0)),
            Mask::Window { left, right } => (left, right),
        };
        // Longer windows than both sequences together see no more: the clamp keeps the arithmetic in range.
        let limit = seqlen_q + seqlen_k;
        let clamp = |side: Option<usize>| side.map(|size| size.min(limit) as isize);
        Visibility {
            seqlen_q: seqlen_q as isize,
            seqlen_k: seqlen_k as isize,
            shift: seqlen_k as isize - seqlen_q as isize,
            left: clamp(left),
            right: clamp(right),
        }
    }
}

/// How much of a tile the mask shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// No pair in the tile is visible.
    Hidden,
    /// Some pairs are visible and some are not.
    Partial,
    /// Every pair is visible.
    Full,
}

/// A [`Mask`] over one pair of sequences: which rows see which columns.
///
/// Both bounds grow with the row, so the visible keys of a row, and the visible queries of a column, are one range.
#[derive(Clone, Copy, Debug)]
pub struct Visibility {
    seqlen_q: isize,
    seqlen_k: isize,
    shift: isize,
    left: Option<isize>,
    right: Option<isize>,
}

impl Visibility {
    /// `seqlen_k - seqlen_q`: query `row` is aligned with key `row + shift`.
    pub fn shift(&self) -> isize {
        self.shift
    }

    /// The keys that query `row` sees.
    pub fn keys(&self, row: usize) -> Range<usize> {
        let aligned = row as isize + self.shift;
        let start = self.left.map_or(0, |left| aligned - left);
        let end = self.right.map_or(self.seqlen_k, |right| aligned + right + 1);
        range_within(start, end, self.seqlen_k)
    }

    /// The queries that see key `col`.
    pub fn queries(&self, col: usize) -> Range<usize> {
        let aligned = col as isize - self.shift;
        let start = self.right.map_or(0, |right| aligned - right);
        let end = self.left.map_or(self.seqlen_q, |left| aligned + left + 1);
        range_within(start, end, self.seqlen_q)
    }

    /// The keys that at least one of `rows` sees; `rows` must not be empty.
    pub fn keys_of(&self, rows: &Range<usize>) -> Range<usize> {
        let start = self.keys(rows.start).start;
        let end = self.keys(rows.end - 1).end;
        start..end.max(start)
    }

    /// The queries that see at least one of `cols`; `cols` must not be empty.
    pub fn queries_of(&self, cols: &Range<usize>) -> Range<usize> {
        let start = self.queries(cols.start).start;
        let end = self.queries(cols.end - 1).end;
        start..end.max(start)
    }

    /// How much of the tile `rows` x `cols` is visible; neither range may be empty.
    pub fn coverage(&self, rows: &Range<usize>, cols: &Range<usize>) -> Coverage {
        let seen = self.keys_of(rows);
        if seen.end <= cols.start || cols.end <= seen.start {
            return Coverage::Hidden;
        }
        // The last row starts latest and the first row ends earliest: if those two see all columns, every row does.
        let full = self.keys(rows.end - 1).start <= cols.start && cols.end <= self.keys(rows.start).end;
        if full {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }
}

/// `start..end` cut to `0..len`; an empty range stays inside it.
fn range_within(start: isize, end: isize, len: isize) -> Range<usize> {
    let start = start.clamp(0, len);
    start as usize..end.clamp(start, len) as usize
}
