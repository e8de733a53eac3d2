//! Masks: the keys that each query sees, and the tiles that hold visible pairs.

use std::ops::Range;

/// Which keys each query sees.
///
/// Masks align the last query with the last key. With `shift = seqlen_k - seqlen_q`, which may be negative, query `i` is
/// aligned with key `i + shift`. For `seqlen_q = 3` and `seqlen_k = 5`:
///
/// ```text
///       None              Causal           Window { left: Some(1), right: Some(0) }
///      k0 k1 k2 k3 k4     k0 k1 k2 k3 k4     k0 k1 k2 k3 k4
/// q0    x  x  x  x  x      x  x  x  .  .      .  x  x  .  .
/// q1    x  x  x  x  x      x  x  x  x  .      .  .  x  x  .
/// q2    x  x  x  x  x      x  x  x  x  x      .  .  .  x  x
/// ```
///
/// If there are more queries than keys, the first rows may see no key. Then their output is 0, their gradients are 0, and
/// their log-sum-exp is minus infinity. For `seqlen_q = 4`, `seqlen_k = 2` and `Causal`:
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
    /// Query `i` sees the keys up to `i + shift`. This is the same as `Window { left: None, right: Some(0) }`.
    Causal,
    /// Query `i` sees the keys from `i + shift - left` to `i + shift + right`, both included.
    ///
    /// `None` sets no limit on that side. With `left` and `right` of `Some(0)`, each query sees only its aligned key.
    Window {
        /// Number of visible keys before the aligned one.
        left: Option<usize>,
        /// Number of visible keys after the aligned one.
        right: Option<usize>,
    },
}

impl Mask {
    /// Whether this mask can hide keys.
    pub(crate) fn hides_keys(self) -> bool {
        !matches!(self, Mask::None | Mask::Window { left: None, right: None })
    }

    /// The mask for one sequence of queries and one of keys.
    pub(crate) fn over(self, seqlen_q: usize, seqlen_k: usize) -> Visibility {
        let (left, right) = match self {
            Mask::None => (None, None),
            Mask::Causal => (None, Some(0)),
            Mask::Window { left, right } => (left, right),
        };
        // A window as long as both sequences together already shows every key. So cut it there; this prevents an overflow.
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

/// Which part of a tile the mask shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// No pair in the tile is visible.
    Hidden,
    /// Some pairs are visible and some are not.
    Partial,
    /// Every pair is visible.
    Full,
}

/// A [`Mask`] for one sequence of queries and one of keys: which rows see which columns.
///
/// Both bounds of a row grow with the row. So the visible keys of a row are one range, and so are the queries that see a key.
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

    /// Which part of the tile `rows` x `cols` is visible; neither range may be empty.
    pub fn coverage(&self, rows: &Range<usize>, cols: &Range<usize>) -> Coverage {
        let visible = self.keys_of(rows);
        if visible.end <= cols.start || cols.end <= visible.start {
            return Coverage::Hidden;
        }
        // The range of the last row starts latest, and the range of the first row ends earliest. If both contain all
        // columns, the ranges of all rows do.
        let full = self.keys(rows.end - 1).start <= cols.start && cols.end <= self.keys(rows.start).end;
        if full {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }
}

/// `start..end` limited to `0..len`. An empty result also lies inside `0..len`.
fn range_within(start: isize, end: isize, len: isize) -> Range<usize> {
    let start = start.clamp(0, len);
    start as usize..end.clamp(start, len) as usize
}
