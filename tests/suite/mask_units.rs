//! Compares the mask of rows, columns and tiles with a count of visible pairs.

use crate::common::cases::window;
use crate::common::reference;
use candle_fa2::testing;
use candle_fa2::testing::Coverage;
use candle_fa2::Mask;
use std::ops::Range;

fn masks() -> Vec<Mask> {
    let sides = [None, Some(0), Some(1), Some(3), Some(50), Some(usize::MAX)];
    let windows = sides.into_iter().flat_map(|left| sides.map(|right| window(left, right)));
    [Mask::None, Mask::Causal].into_iter().chain(windows).collect()
}

/// Whether a pair is visible, from the formula of the mask.
fn visible(mask: Mask, lengths: (usize, usize), row: usize, col: usize) -> bool {
    let sides = match mask {
        Mask::None => (None, None),
        Mask::Causal => (None, Some(0)),
        Mask::Window { left, right } => (left, right),
    };
    reference::attention::visible(lengths, sides, row, col)
}

fn each(check: impl Fn(Mask, usize, usize)) {
    for mask in masks() {
        for seqlen_q in [1, 2, 5, 9] {
            for seqlen_k in [0, 1, 4, 5, 12] {
                check(mask, seqlen_q, seqlen_k);
            }
        }
    }
}

/// Non-empty ranges within `0..len`.
fn ranges(len: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..len).flat_map(move |start| (start + 1..=len).map(move |end| start..end))
}

#[test]
fn keys_of_a_query_and_queries_of_a_key_are_the_visible_pairs() {
    each(|mask, seqlen_q, seqlen_k| {
        let over = testing::visibility(mask, seqlen_q, seqlen_k);
        for row in 0..seqlen_q {
            for col in 0..seqlen_k {
                let want = visible(mask, (seqlen_q, seqlen_k), row, col);
                assert_eq!(over.keys(row).contains(&col), want, "{mask:?} {seqlen_q}/{seqlen_k}: keys({row}), {col}");
                assert_eq!(
                    over.queries(col).contains(&row),
                    want,
                    "{mask:?} {seqlen_q}/{seqlen_k}: queries({col}), {row}"
                );
            }
            assert!(over.keys(row).end <= seqlen_k, "{mask:?} {seqlen_q}/{seqlen_k}: keys({row}) past the end");
        }
        for col in 0..seqlen_k {
            assert!(over.queries(col).end <= seqlen_q, "{mask:?} {seqlen_q}/{seqlen_k}: queries({col}) past the end");
        }
    });
}

/// The range of keys of a tile's rows contains every visible pair, and its ends are visible pairs. The same holds for the
/// range of queries of its columns.
#[test]
fn ranges_of_tiles_are_tight() {
    each(|mask, seqlen_q, seqlen_k| {
        let over = testing::visibility(mask, seqlen_q, seqlen_k);
        let lengths = (seqlen_q, seqlen_k);
        for rows in ranges(seqlen_q) {
            let seen: Vec<usize> =
                (0..seqlen_k).filter(|&col| rows.clone().any(|row| visible(mask, lengths, row, col))).collect();
            let got = over.keys_of(&rows);
            let want = seen.first().map_or(0..0, |&first| first..seen[seen.len() - 1] + 1);
            assert!(
                got == want || got.is_empty() && want.is_empty(),
                "{mask:?} {lengths:?}: keys_of({rows:?}) {got:?}"
            );
        }
        for cols in ranges(seqlen_k) {
            let seen: Vec<usize> =
                (0..seqlen_q).filter(|&row| cols.clone().any(|col| visible(mask, lengths, row, col))).collect();
            let got = over.queries_of(&cols);
            let want = seen.first().map_or(0..0, |&first| first..seen[seen.len() - 1] + 1);
            assert!(
                got == want || got.is_empty() && want.is_empty(),
                "{mask:?} {lengths:?}: queries_of({cols:?}) {got:?}"
            );
        }
    });
}

/// A tile is skipped if it has no visible pair, and runs without a mask if all its pairs are visible. The counts agree.
#[test]
fn coverage_counts_the_pairs() {
    each(|mask, seqlen_q, seqlen_k| {
        let over = testing::visibility(mask, seqlen_q, seqlen_k);
        for rows in ranges(seqlen_q) {
            for cols in ranges(seqlen_k) {
                let pairs = rows.clone().flat_map(|row| cols.clone().map(move |col| (row, col)));
                let seen = pairs.clone().filter(|&(row, col)| visible(mask, (seqlen_q, seqlen_k), row, col)).count();
                let want = match seen {
                    0 => Coverage::Hidden,
                    seen if seen == pairs.count() => Coverage::Full,
                    _ => Coverage::Partial,
                };
                let got = over.coverage(&rows, &cols);
                assert_eq!(got, want, "{mask:?} {seqlen_q}/{seqlen_k}: {rows:?} x {cols:?}");
            }
        }
    });
}

/// A window of any size causes no overflow.
#[test]
fn windows_wider_than_memory_hide_nothing() {
    let over = testing::visibility(window(usize::MAX, usize::MAX), 3, 7);
    assert_eq!(over.keys(0), 0..7);
    assert_eq!(over.coverage(&(0..3), &(0..7)), Coverage::Full);
}
