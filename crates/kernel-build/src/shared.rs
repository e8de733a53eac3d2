//! Dynamic shared memory of each family of candle-fa2, and the panels of its tiles. `Plan`, tune.py and the benches take the results of
//! these formulas from the table. Each unit asserts that the results equal the numbers of its traits.

use crate::table::Line;

/// The control block of the sm90 forward: barriers and work tiles.
const SM90_FWD_CONTROL_BYTES: usize = 3 * 1024;

/// The control block of the sm90 backward: barriers and work tiles.
const SM90_BWD_CONTROL_BYTES: usize = 512;

/// Pipeline stages of k, and of v, in the sm90 forward.
const SM90_KEY_STAGES: usize = 2;

/// The largest number of columns of o, dq, dk or dv of a thread block: `kMaxWidth` of cuda/params.h. The assertion on kSharedBytes fails
/// if they differ.
const MAX_WIDTH: usize = 256;

/// Bytes of one tile of q, and of one tile of k or v.
fn tile_bytes(line: &Line, element_bytes: usize) -> (usize, usize) {
    let row_bytes = line.get("head_dim") * element_bytes;
    (line.get("block_m") * row_bytes, line.get("block_n") * row_bytes)
}

/// Bytes of lse, or of delta, of a tile of queries.
fn row_values_bytes(line: &Line) -> usize {
    line.get("block_m") * size_of::<f32>()
}

/// q, k, and the part of the columns of v that a thread block reads.
pub fn fwd_sm80(line: &Line, element_bytes: usize) -> usize {
    let (q_bytes, k_bytes) = tile_bytes(line, element_bytes);
    q_bytes + k_bytes + k_bytes / line.get("head_dim").div_ceil(MAX_WIDTH)
}

/// `SM90_KEY_STAGES` stages of k and of v, `q_stages` of q, and the control block.
pub fn fwd_sm90(line: &Line, element_bytes: usize) -> usize {
    let (q_bytes, k_bytes) = tile_bytes(line, element_bytes);
    line.get("q_stages") * q_bytes + 2 * SM90_KEY_STAGES * k_bytes + SM90_FWD_CONTROL_BYTES
}

/// k and v, P, dS (twice if a team is one warp), and for each stage q, do, lse and delta. In f32 above `MAX_WIDTH` q and do share a tile.
pub fn bwd_sm80(line: &Line, element_bytes: usize) -> usize {
    let (q_bytes, k_bytes) = tile_bytes(line, element_bytes);
    let ds_stages = if line.get("warps_m") == 1 { 2 } else { 1 };
    let p_and_ds_bytes = (1 + ds_stages) * line.get("block_m") * line.get("block_n") * element_bytes;
    let tiles = if element_bytes == 4 && line.get("head_dim") > MAX_WIDTH { 1 } else { 2 };
    2 * k_bytes + p_and_ds_bytes + line.get("stages") * (tiles * q_bytes + 2 * row_values_bytes(line))
}

/// k and v, two tiles of dS, the stages of q and do, lse and delta, and the control block. A block without a cluster also has
/// a tile of dq in f32. A block of a cluster has the peer's dS, half of the columns of the peer's k, and a tile of P in f32.
pub fn bwd_sm90(line: &Line, element_bytes: usize) -> usize {
    let ((q_bytes, k_bytes), row_values_bytes) = (tile_bytes(line, element_bytes), row_values_bytes(line));
    let cluster = line.get("cluster");
    let ds_bytes = cluster * line.get("block_m") * line.get("block_n") * element_bytes;
    let (keys_bytes, dq_or_p_bytes) = if cluster == 1 {
        (2 * k_bytes, line.get("head_dim") * row_values_bytes)
    } else {
        (2 * k_bytes + k_bytes / cluster, line.get("block_n") * row_values_bytes)
    };
    let stage_bytes = (line.get("q_stages") + line.get("do_stages")) * (q_bytes + row_values_bytes);
    keys_bytes + 2 * ds_bytes + dq_or_p_bytes + stage_bytes + SM90_BWD_CONTROL_BYTES
}

/// Columns of a panel of the sm90 tiles, and so of a box of their tensor maps. Panels divide the columns that a block of a cluster owns.
pub fn box_cols(line: &Line) -> usize {
    let block_cols = line.get("head_dim") / line.get("cluster").max(1);
    if block_cols.is_multiple_of(64) {
        64
    } else {
        32
    }
}

#[cfg(test)]
mod tests {
    use crate::attention::FAMILIES;
    use crate::table::Table;

    /// The numbers of KiB are those in docs/kernels.md.
    #[test]
    fn formulas_give_the_recorded_bytes() {
        for (line, kib) in [
            ("KERNEL(fwd, sm80, 128, 128, 64, 4, 1)", 64.0),
            ("KERNEL(fwd, sm80, 192, 64, 96, 4, 1)", 96.0),
            ("KERNEL(fwd, sm80, 512, 64, 32, 4, 1)", 112.0),
            ("KERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 0)", 115.0),
            ("KERNEL(fwd, sm90, 128, 128, 128, 12, 2, 0, 0)", 195.0),
            ("KERNEL(fwd, sm90, 256, 128, 80, 12, 1, 0, 0)", 227.0),
            ("KERNEL(bwd, sm90, 64, 128, 128, 12, 1, 2, 2)", 194.5),
            ("KERNEL(bwd, sm90, 128, 64, 128, 12, 1, 2, 2)", 193.5),
            ("KERNEL(bwd, sm90, 256, 64, 64, 12, 2, 2, 1)", 225.25),
            ("KERNEL(bwd, sm80, 64, 32, 128, 4, 1, 2, 1, 4, 1)", 72.5), // two stages of dS
            ("KERNEL(bwd, sm80, 128, 64, 128, 8, 1, 2, 2, 4, 4)", 161.0),
            ("KERNEL(bwd, sm80, 128, 32, 128, 8, 1, 1, 2, 4, 2)", 96.25),
            ("KERNEL(fwd_f32, sm80, 128, 128, 64, 8, 1)", 128.0),
            ("KERNEL(bwd_f32, sm80, 128, 64, 64, 8, 1, 2, 4, 2, 2)", 225.0),
            ("KERNEL(bwd_f32, sm80, 512, 32, 32, 4, 1, 1, 2, 2, 2)", 200.25), // one tile for q and do
        ] {
            let table = Table::parse(line, "lines", &FAMILIES).expect("the line is right");
            let line = &table.lines[0];
            let formula = line.family.entries[0].shared_bytes.expect("the pass has shared memory");
            assert_eq!(formula(line, line.family.dtypes[0].bytes) as f64 / 1024.0, kib, "{}", line.family.form());
        }
    }
}
