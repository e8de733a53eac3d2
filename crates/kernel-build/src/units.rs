//! Generates a CUDA source for each line of the table, and the table as Rust.

use std::fmt::Write as _;

use crate::family::{Dtype, Entry, Family, Grid, Template, Variant};
use crate::params::Structs;
use crate::table::{Line, Table};

/// `kWarpSize` of cuda/params.h. The assertion on kThreads fails if they differ.
const WARP_SIZE: usize = 32;

/// One source file with the kernels of a line. Units are compiled separately.
#[derive(Debug)]
pub struct Unit {
    /// The name of its file, without the extension.
    pub name: String,
    /// The family of its line.
    pub family: &'static Family,
    /// Its kernels.
    pub kernels: Vec<Kernel>,
}

/// One kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Its symbol.
    pub name: String,
    /// The symbol without the element type, as in LOCAL lines.
    pub label: String,
    /// Its entry in the family.
    pub entry: &'static Entry,
    /// Its element type.
    pub dtype: &'static Dtype,
    /// Its variant.
    pub variant: &'static Variant,
    /// Its line.
    pub line: Line,
    /// Dynamic shared memory of a thread block.
    pub shared_bytes: usize,
}

/// The units of a table, in the order of its lines.
pub fn units(table: &Table) -> Vec<Unit> {
    table.lines.iter().map(Unit::of).collect()
}

impl Unit {
    fn of(line: &Line) -> Self {
        let family = line.family;
        let mut kernels = Vec::new();
        for dtype in family.dtypes {
            for entry in family.entries {
                for variant in entry.variants {
                    kernels.push(Kernel {
                        name: line.symbol(entry, dtype, variant),
                        label: line.label(entry, variant),
                        entry,
                        dtype,
                        variant,
                        line: line.clone(),
                        shared_bytes: entry.shared_bytes.map_or(0, |formula| formula(line, dtype.bytes)),
                    });
                }
            }
        }
        // The first entry is the main kernel of the line, so it gives the unit its name.
        let name = line.label(&family.entries[0], &family.entries[0].variants[0]);
        Self { name, family, kernels }
    }

    /// Its CUDA source. The source asserts the numbers that the table and the host rely on: threads, shared memory, work tiles of a
    /// block, boxes of tensor maps, and the layout of the parameters.
    pub fn source(&self, structs: &Structs) -> String {
        let mut text = format!("#include <cstddef>\n\n#include \"{}\"\n\n{SAME}", self.family.header);
        let params = self.kernels.iter().map(|kernel| kernel.entry.params);
        text += &structs.cuda_asserts(params);
        for kernel in &self.kernels {
            text += &kernel.source(&structs.namespace);
        }
        text
    }
}

impl Kernel {
    /// Threads of a thread block.
    pub fn threads(&self) -> usize {
        self.line.get("warps") * WARP_SIZE
    }

    /// Thread blocks of a cluster.
    pub fn cluster(&self) -> usize {
        self.line.get("cluster").max(1)
    }

    /// Columns of a box of its tensor maps. `None` if it has none.
    pub fn box_cols(&self) -> Option<usize> {
        self.entry.box_cols.map(|formula| formula(&self.line))
    }

    fn source(&self, namespace: &str) -> String {
        let Self { name, entry, dtype, variant, shared_bytes, .. } = self;
        let threads = self.threads();
        let mut text = String::from("\n");
        let (kernel_threads, bounds, arguments) = match self.line.family.template {
            Template::Dtype { threads: constant } => {
                (constant.to_string(), threads.to_string(), dtype.cuda.to_string())
            }
            Template::Traits(template) => {
                let numbers: String = self.line.values().iter().map(|number| format!("{number}, ")).collect();
                let _ =
                    writeln!(text, "using {name}_traits = {template}<{}, {numbers}{}>;", dtype.cuda, variant.argument);
                // Template arguments go by position. So assert that each column arrives under its own name.
                for (column, number) in self.line.family.columns.iter().zip(self.line.values()) {
                    let constant = constant_of(column);
                    let _ = writeln!(text, "static_assert(Same<{name}_traits::{constant}, {number}>::kHere);");
                }
                if entry.shared_bytes.is_some() {
                    let _ = writeln!(text, "static_assert(Same<{name}_traits::kSharedBytes, {shared_bytes}>::kHere);");
                }
                if let Grid::Persistent { max_tiles: Some(max_tiles) } = entry.grid {
                    let _ = writeln!(text, "static_assert(Same<{name}_traits::kMaxTiles, {max_tiles}>::kHere);");
                }
                if let Some(cols) = self.box_cols() {
                    for tile in ["TileQ", "TileK"] {
                        let _ = writeln!(text, "static_assert(Same<{name}_traits::{tile}::kPanel, {cols}>::kHere);");
                    }
                }
                (
                    format!("{name}_traits::kThreads"),
                    format!("{threads}, {name}_traits::kMinBlocks"),
                    format!("{name}_traits"),
                )
            }
        };
        let _ = writeln!(text, "static_assert(Same<{kernel_threads}, {threads}>::kHere);");
        let cluster = match self.cluster() {
            1 => String::new(),
            blocks => format!("__cluster_dims__({blocks}, 1, 1) "),
        };
        let _ = write!(
            text,
            "extern \"C\" __global__ void {cluster}__launch_bounds__({bounds})\n\
             {name}(const __grid_constant__ {namespace}::{} params) {{\n    {}<{arguments}>(params);\n}}\n",
            entry.params, entry.function
        );
        text
    }
}

/// The constant of the traits that holds a column: `kWarpsN` for `warps_n`.
fn constant_of(column: &str) -> String {
    let capitalized = column.split('_').map(|word| word[..1].to_uppercase() + &word[1..]);
    format!("k{}", capitalized.collect::<String>())
}

/// Asserts that two numbers are equal. If they differ, the compiler shows both, as template arguments.
const SAME: &str = "\
template <int kInTemplates, int kInTable>
struct Same {
    static_assert(kInTemplates == kInTable, \"the templates and the generated table differ\");
    static constexpr bool kHere = true;
};
";

/// The table as Rust: `KERNELS`, with one row for each kernel. `image` is the index of the unit.
pub fn rust_table(units: &[Unit]) -> String {
    let kernels = units.iter().enumerate().flat_map(|(image, unit)| unit.kernels.iter().map(move |k| (image, k)));
    let rows: Vec<String> = kernels.map(|(image, kernel)| rust_row(image, kernel)).collect();
    format!("/// All kernels.\npub static KERNELS: [Kernel; {}] = [\n{}];\n", rows.len(), rows.concat())
}

fn rust_row(image: usize, kernel: &Kernel) -> String {
    let Kernel { name, entry, dtype, variant, line, shared_bytes, .. } = kernel;
    let Entry { pass, params, grid, .. } = entry;
    let params = params.strip_suffix("Params").unwrap_or(params);
    let columns = ["head_dim", "block_m", "block_n", "warps"].map(|column| format!("{column}: {}", line.get(column)));
    format!(
        "    Kernel {{ name: {name:?}, image: {image}, pass: Pass::{pass}, arch: Arch::Sm{}, dtype: DType::{}, tf32: {}, {}, cluster: {}, \
         score_mod: {}, \
         params: Parameters::{params}, grid: Grid::{grid:?}, shared_bytes: {shared_bytes}, box_cols: {} }},\n",
        line.family.arch.sm,
        dtype.rust,
        dtype.tf32,
        columns.join(", "),
        kernel.cluster(),
        variant.score_mod,
        kernel.box_cols().unwrap_or(0),
    )
}

/// The images as Rust: `IMAGES`, in the order of the units. It includes the files in the folder of the generated code.
pub fn rust_images(units: &[Unit]) -> String {
    let images: String = units.iter().map(|unit| format!("    include_bytes!(\"{}.fatbin\"),\n", unit.name)).collect();
    format!("pub(super) static IMAGES: [&[u8]; {}] = [\n{images}];\n", units.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::FAMILIES;

    fn unit(line: &str) -> Unit {
        let table = Table::parse(line, "lines", &FAMILIES).expect("the line is right");
        units(&table).remove(0)
    }

    fn structs() -> Structs {
        let fields = "float* lse;  // as given\n";
        let names = ["FwdParams", "Sm90FwdParams", "BwdParams", "Sm90BwdParams", "ConvertParams", "DeltaParams"];
        let text: String = names.iter().map(|name| format!("struct {name} {{\n{fields}}};\n")).collect();
        Structs::parse(&format!("namespace fa2 {{\n{text}}}\n"), "params.h").expect("the text is right")
    }

    #[test]
    fn a_unit_has_each_dtype_and_variant() {
        let forward = unit("KERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 1)");
        assert_eq!(forward.name, "fwd_sm90_d64_192x128");
        let names: Vec<&str> = forward.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        let want = ["f16_d64_192x128", "f16_d64_192x128_score_mod", "bf16_d64_192x128", "bf16_d64_192x128_score_mod"];
        assert_eq!(names, want.map(|name| format!("fwd_sm90_{name}")));
        // The conversion of dq_accum has no score_mod.
        let names: Vec<String> =
            unit("KERNEL(convert, sm80, 4)").kernels.into_iter().map(|kernel| kernel.name).collect();
        assert_eq!(names, ["convert_f16", "convert_bf16", "convert_f32"]);
        // Tiles of f32 are in lines of their own.
        let forward = unit("KERNEL(fwd_f32, sm80, 64, 64, 64, 4, 2)");
        let names: Vec<&str> = forward.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        assert_eq!(names, ["fwd_sm80_f32_d64_64x64", "fwd_sm80_f32_d64_64x64_score_mod"]);
    }

    #[test]
    fn a_source_instantiates_and_asserts() {
        let mut forward = unit("KERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 1)");
        forward.kernels.retain(|kernel| kernel.name == "fwd_sm90_bf16_d64_192x128_score_mod");
        let kernel = "\
using fwd_sm90_bf16_d64_192x128_score_mod_traits = fa2::sm90::FwdTraits<fa2::bf16, 64, 192, 128, 16, 2, 0, 1, fa2::SoftcapAlibi>;
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kHeadDim, 64>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kBlockM, 192>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kBlockN, 128>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kWarps, 16>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kQStages, 2>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kMidWait, 0>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kLateRescale, 1>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kSharedBytes, 117760>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kMaxTiles, 512>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::TileQ::kPanel, 64>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::TileK::kPanel, 64>::kHere);
static_assert(Same<fwd_sm90_bf16_d64_192x128_score_mod_traits::kThreads, 512>::kHere);
extern \"C\" __global__ void __launch_bounds__(512, fwd_sm90_bf16_d64_192x128_score_mod_traits::kMinBlocks)
fwd_sm90_bf16_d64_192x128_score_mod(const __grid_constant__ fa2::Sm90FwdParams params) {
    fa2::sm90::forward<fwd_sm90_bf16_d64_192x128_score_mod_traits>(params);
}
";
        let source = forward.source(&structs());
        assert!(source.starts_with("#include <cstddef>\n\n#include \"sm90/fwd.cuh\"\n"), "{source}");
        assert!(source.contains("static_assert(sizeof(fa2::Sm90FwdParams) == 8"), "{source}");
        assert!(!source.contains("BwdParams"), "{source}");
        assert!(source.ends_with(kernel), "{source}");
    }

    #[test]
    fn a_template_without_traits_takes_the_dtype() {
        let source = unit("KERNEL(delta, sm80, 8)").source(&structs());
        let kernel = "\
static_assert(Same<fa2::kDeltaThreads, 256>::kHere);
extern \"C\" __global__ void __launch_bounds__(256)
delta_f32(const __grid_constant__ fa2::DeltaParams params) {
    fa2::delta<float>(params);
}
";
        assert!(source.ends_with(kernel), "{source}");
    }

    #[test]
    fn a_cluster_is_in_the_source_and_in_the_table() {
        let clustered = unit("KERNEL(bwd, sm90, 256, 64, 64, 12, 2, 2, 1)");
        assert!(clustered
            .source(&structs())
            .contains("extern \"C\" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, "));
        assert!(rust_table(&[clustered]).contains("warps: 12, cluster: 2, "));
        let alone = unit("KERNEL(bwd, sm90, 128, 64, 128, 12, 1, 2, 2)");
        assert!(!alone.source(&structs()).contains("__cluster_dims__"));
    }

    #[test]
    fn a_box_divides_the_columns_that_a_block_owns() {
        for (line, box_cols) in [
            ("KERNEL(fwd, sm90, 192, 128, 80, 12, 2, 1, 0)", Some(64)),
            ("KERNEL(fwd, sm90, 96, 128, 128, 12, 2, 1, 1)", Some(32)),
            ("KERNEL(bwd, sm90, 192, 64, 64, 12, 2, 2, 2)", Some(32)),
            ("KERNEL(bwd, sm90, 256, 64, 64, 12, 2, 2, 1)", Some(64)),
            ("KERNEL(fwd, sm80, 128, 128, 64, 4, 1)", None),
        ] {
            let unit = unit(line);
            assert_eq!(unit.kernels[0].box_cols(), box_cols, "{line}");
            assert_eq!(unit.source(&structs()).contains("TileK::kPanel"), box_cols.is_some(), "{line}");
        }
    }

    #[test]
    fn rust_rows_have_what_a_launch_needs() {
        let units = [unit("KERNEL(delta, sm80, 8)"), unit("KERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 1)")];
        let table = rust_table(&units);
        assert!(table.contains("pub static KERNELS: [Kernel; 7]"), "{table}");
        let row = "    Kernel { name: \"fwd_sm90_f16_d64_192x128\", image: 1, pass: Pass::Forward, arch: Arch::Sm90, \
                   dtype: DType::F16, tf32: false, head_dim: 64, block_m: 192, block_n: 128, warps: 16, cluster: 1, \
                   score_mod: false, params: Parameters::Sm90Fwd, grid: Grid::Persistent { max_tiles: Some(512) }, shared_bytes: 117760, box_cols: 64 },\n";
        assert!(table.contains(row), "{table}");
        assert_eq!(
            rust_images(&units),
            "pub(super) static IMAGES: [&[u8]; 2] = [\n    include_bytes!(\"delta.fatbin\"),\n    \
             include_bytes!(\"fwd_sm90_d64_192x128.fatbin\"),\n];\n"
        );
    }
}
