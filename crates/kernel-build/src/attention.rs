//! The families of candle-fa2. Their templates are in cuda/.

use crate::family::{Arch, Dtype, Entry, Family, Grid, Template, Variant};
use crate::shared;

const F16: Dtype = Dtype { name: "f16", cuda: "fa2::f16", rust: "F16", bytes: 2, tf32: false };
const BF16: Dtype = Dtype { name: "bf16", cuda: "fa2::bf16", rust: "BF16", bytes: 2, tf32: false };
const F32: Dtype = Dtype { name: "f32", cuda: "float", rust: "F32", bytes: 4, tf32: false };
const TF32: Dtype = Dtype { name: "tf32", cuda: "fa2::tf32", rust: "F32", bytes: 4, tf32: true };
const HALVES: &[Dtype] = &[F16, BF16];
const ALL: &[Dtype] = &[F16, BF16, F32];

const SM80: Arch = Arch { sm: 80, exact: false };
const SM90: Arch = Arch { sm: 90, exact: true };

const PLAIN: Variant = Variant { suffix: "", argument: "fa2::NoScoreMod", score_mod: false };
const SCORE_MOD: Variant = Variant { suffix: "_score_mod", argument: "fa2::SoftcapAlibi", score_mod: true };

const FWD_SM80: Family = Family {
    pass: "fwd",
    arch: SM80,
    columns: &["head_dim", "block_m", "block_n", "warps", "min_blocks"],
    flags: &[],
    header: "sm80/fwd.cuh",
    template: Template::Traits("fa2::sm80::FwdTraits"),
    dtypes: HALVES,
    entries: &[Entry {
        symbol: "fwd_sm80_{dtype}_d{head_dim}_{block_m}x{block_n}",
        pass: "Forward",
        function: "fa2::sm80::forward",
        params: "FwdParams",
        grid: Grid::Tiles,
        variants: &[PLAIN, SCORE_MOD],
        shared_bytes: Some(shared::fwd_sm80),
        box_cols: None,
    }],
};

const BWD_SM80: Family = Family {
    pass: "bwd",
    arch: SM80,
    columns: &["head_dim", "block_m", "block_n", "warps", "min_blocks", "stages", "warps_m", "warps_n", "warps_q"],
    flags: &[],
    header: "sm80/bwd.cuh",
    template: Template::Traits("fa2::sm80::BwdTraits"),
    dtypes: HALVES,
    entries: &[Entry {
        symbol: "bwd_sm80_{dtype}_d{head_dim}_{block_m}x{block_n}_s{stages}",
        pass: "Backward",
        function: "fa2::sm80::backward",
        params: "BwdParams",
        grid: Grid::Tiles,
        variants: &[PLAIN, SCORE_MOD],
        shared_bytes: Some(shared::bwd_sm80),
        box_cols: None,
    }],
};

/// Every family that a line of cuda/instances.def may name. f32 has the templates of f16 and bf16, but tiles of its own, and so has plain
/// TF32. So their lines have passes of their own.
pub static FAMILIES: [Family; 10] = [
    FWD_SM80,
    Family {
        pass: "fwd",
        arch: SM90,
        columns: &["head_dim", "block_m", "block_n", "warps", "q_stages", "mid_wait", "late_rescale"],
        flags: &["mid_wait", "late_rescale"],
        header: "sm90/fwd.cuh",
        template: Template::Traits("fa2::sm90::FwdTraits"),
        dtypes: HALVES,
        entries: &[Entry {
            symbol: "fwd_sm90_{dtype}_d{head_dim}_{block_m}x{block_n}",
            pass: "Forward",
            function: "fa2::sm90::forward",
            params: "Sm90FwdParams",
            grid: Grid::Persistent { max_tiles: Some(512) },
            variants: &[PLAIN, SCORE_MOD],
            shared_bytes: Some(shared::fwd_sm90),
            box_cols: Some(shared::box_cols),
        }],
    },
    BWD_SM80,
    Family {
        pass: "bwd",
        arch: SM90,
        columns: &["head_dim", "block_m", "block_n", "warps", "cluster", "q_stages", "do_stages"],
        flags: &[],
        header: "sm90/bwd.cuh",
        template: Template::Traits("fa2::sm90::BwdTraits"),
        dtypes: HALVES,
        entries: &[Entry {
            symbol: "bwd_sm90_{dtype}_d{head_dim}_{block_m}x{block_n}",
            pass: "Backward",
            function: "fa2::sm90::backward",
            params: "Sm90BwdParams",
            grid: Grid::Persistent { max_tiles: None },
            variants: &[PLAIN, SCORE_MOD],
            shared_bytes: Some(shared::bwd_sm90),
            box_cols: Some(shared::box_cols),
        }],
    },
    Family { pass: "fwd_f32", dtypes: &[F32], ..FWD_SM80 },
    Family { pass: "bwd_f32", dtypes: &[F32], ..BWD_SM80 },
    Family { pass: "fwd_tf32", dtypes: &[TF32], ..FWD_SM80 },
    Family { pass: "bwd_tf32", dtypes: &[TF32], ..BWD_SM80 },
    Family {
        pass: "delta",
        arch: SM80,
        columns: &["warps"],
        flags: &[],
        header: "delta.cuh",
        template: Template::Dtype { threads: "fa2::kDeltaThreads" },
        dtypes: ALL,
        entries: &[Entry {
            symbol: "delta_{dtype}",
            pass: "Delta",
            function: "fa2::delta",
            params: "DeltaParams",
            grid: Grid::Tiles,
            variants: &[PLAIN],
            shared_bytes: None,
            box_cols: None,
        }],
    },
    Family {
        pass: "convert",
        arch: SM80,
        columns: &["warps"],
        flags: &[],
        header: "convert.cuh",
        template: Template::Dtype { threads: "fa2::kConvertThreads" },
        dtypes: ALL,
        entries: &[Entry {
            symbol: "convert_{dtype}",
            pass: "Convert",
            function: "fa2::convert",
            params: "ConvertParams",
            grid: Grid::Tiles,
            variants: &[PLAIN],
            shared_bytes: None,
            box_cols: None,
        }],
    },
];
