//! Turns cuda/instances.def into the table that `Plan` chooses from and, with the feature `cuda`, into kernels.
//!
//! | written to OUT_DIR | what it is |
//! | --- | --- |
//! | instances.rs | one `Kernel` per line, element type and variant; the only file written without the feature |
//! | UNIT.cu | one per line and one for delta: `extern "C"` kernels around the templates in cuda/ |
//! | UNIT.fatbin | its machine code for each GPU asked for, and PTX that every other GPU from 8.0 on compiles when it loads it |
//! | images.rs | the fatbins, in the order that `Kernel::image` counts |
//! | layout.rs | size and offsets of the parameter structs, asserted by both compilers |
//! | kernels.csv | registers, local and shared memory of each kernel, as ptxas reports them |
//!
//! Lines of sm90 are compiled for 9.0 alone, and without PTX: no other GPU runs their instructions. With the feature `cuda`
//! the table has them if 90 is among the GPUs asked for.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `NVCC`, `PATH`, `CUDA_HOME`, `CUDA_PATH` | where the compiler is, in this order, as for Candle's own kernels |
//! | `CUDA_COMPUTE_CAP` | the GPU to compile for, as Candle takes it: `90`; without it nvidia-smi is asked |
//! | `CANDLE_FA2_CUDA_ARCHS` | several of them instead: `80,86,89,90` |
//! | `CANDLE_FA2_SPILLS` | `warn`: local memory that instances.def does not list is a warning, not an error |

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::{env, fs, thread};

const DTYPES: [(&str, &str); 2] = [("f16", "F16"), ("bf16", "BF16")];
const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "--use_fast_math", "-Xptxas", "-v"];
const WARP_SIZE: usize = 32;

/// The GPUs whose instructions no other has: compiled as sm_90a, without PTX.
const HOPPER: usize = 90;

/// Warps of the kernel that has no tiles.
const DELTA_WARPS: usize = 8;

fn main() {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(variable("OUT_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP", "CANDLE_FA2_CUDA_ARCHS", "CANDLE_FA2_SPILLS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let mut definitions = Definitions::read(&root.join("cuda/instances.def"));
    let compiler = env::var_os("CARGO_FEATURE_CUDA").map(|_| Compiler::find(&root, &out));
    if let Some(compiler) = &compiler {
        // `Plan` must not choose what has no code.
        definitions.lines.retain(|line| line.arch != HOPPER || compiler.archs.contains(&HOPPER));
    }
    let units = units(&definitions);
    write(&out.join("instances.rs"), &table(&units));
    let Some(compiler) = compiler else { return };
    write(&out.join("layout.rs"), &layout_rs());
    compiler.compile(&units);
    let images: String = units.iter().map(|unit| format!("    include_bytes!(\"{}.fatbin\"),\n", unit.name)).collect();
    write(&out.join("images.rs"), &format!("pub(super) static IMAGES: [&[u8]; {}] = [\n{images}];\n", units.len()));
    compiler.report(&units, &definitions);
}

/// Ends the build with a text for its user.
fn fail(text: impl std::fmt::Display) -> ! {
    println!("cargo:warning=candle-fa2: {}", text.to_string().lines().next().unwrap_or_default());
    eprintln!("candle-fa2: {text}");
    std::process::exit(1);
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Writes a file unless it holds `text` already: an untouched file is not compiled again.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|now| now == text) {
        return;
    }
    fs::write(path, text).unwrap_or_else(|error| fail(format!("cannot write {}: {error}", path.display())));
}

/// cuda/instances.def.
struct Definitions {
    lines: Vec<Line>,
    locals: Vec<Local>,
}

/// `KERNEL(pass, arch, head_dim, block_m, block_n, warps)`, for the backward followed by `stages, warps_m, warps_n`.
struct Line {
    pass: Pass,
    /// 80 for `sm80`: the directory of its templates, and the oldest GPU that runs it. 90: the only one.
    arch: usize,
    head_dim: usize,
    block_m: usize,
    block_n: usize,
    warps: usize,
    /// Of the backward, 0 otherwise: tiles of q and do in shared memory.
    stages: usize,
    /// Of the backward, 0 otherwise: rows of warps of S and dP.
    warps_m: usize,
    /// Of the backward, 0 otherwise: rows of warps of dk and dv.
    warps_n: usize,
}

/// `LOCAL(kernel, bytes)  // reason`: local memory that is meant to be. `*` in the name stands for any text.
struct Local {
    kernel: String,
    bytes: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
    Delta,
    Convert,
}

impl Definitions {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_else(|error| fail(format!("{}: {error}", path.display())));
        let mut definitions = Self { lines: Vec::new(), locals: Vec::new() };
        for (index, line) in text.lines().enumerate() {
            let (code, comment) = line.split_once("//").unwrap_or((line, ""));
            if !code.trim().is_empty() {
                if let Err(rule) = definitions.add(code.trim(), comment.trim()) {
                    fail(format!("cuda/instances.def:{}: {rule}, got {}", index + 1, line.trim()));
                }
            }
        }
        definitions
    }

    fn add(&mut self, code: &str, comment: &str) -> Result<(), &'static str> {
        const FORMS: &str = "expected KERNEL(fwd, arch, head_dim, block_m, block_n, warps), \
                             KERNEL(bwd, arch, head_dim, block_m, block_n, warps, stages, warps_m, warps_n) or \
                             LOCAL(kernel, bytes)";
        let (word, rest) = code.split_once('(').ok_or(FORMS)?;
        let arguments: Vec<&str> = rest.strip_suffix(')').ok_or(FORMS)?.split(',').map(str::trim).collect();
        let number = |text: &str| text.parse().map_err(|_| "expected a number");
        match (word, arguments.as_slice()) {
            ("KERNEL", &[pass, arch, head_dim, block_m, block_n, warps, ref layout @ ..]) => {
                let (pass, layout) = match (pass, layout) {
                    ("fwd", []) => (Pass::Forward, [0; 3]),
                    ("bwd", &[stages, warps_m, warps_n]) => {
                        (Pass::Backward, [number(stages)?, number(warps_m)?, number(warps_n)?])
                    }
                    _ => return Err(FORMS),
                };
                let arch = number(arch.strip_prefix("sm").ok_or("arch is sm and a number")?)?;
                if !(arch == 80 || (arch == HOPPER && pass == Pass::Forward)) {
                    return Err("the templates are in cuda/sm80, and of the forward in cuda/sm90 as well");
                }
                let [head_dim, block_m, block_n, warps] =
                    [number(head_dim)?, number(block_m)?, number(block_n)?, number(warps)?];
                let [stages, warps_m, warps_n] = layout;
                self.lines.push(Line { pass, arch, head_dim, block_m, block_n, warps, stages, warps_m, warps_n });
            }
            ("LOCAL", &[kernel, bytes]) if !comment.is_empty() => {
                self.locals.push(Local { kernel: kernel.to_string(), bytes: number(bytes)? });
            }
            ("LOCAL", _) => return Err("a kernel that uses local memory needs a reason behind //"),
            _ => return Err(FORMS),
        }
        Ok(())
    }
}

impl Line {
    /// Dynamic shared memory: the twin of `kSharedBytes` in the traits. Each unit asserts that the two agree.
    fn shared_bytes(&self) -> usize {
        const ELEMENT_BYTES: usize = 2;
        let tile_q = self.block_m * self.head_dim * ELEMENT_BYTES;
        let tile_k = self.block_n * self.head_dim * ELEMENT_BYTES;
        match self.pass {
            // Two stages of k and v, two of q where they fit, and 3 KB for barriers and the lists of tiles.
            Pass::Forward if self.arch == HOPPER => {
                const LIMIT: usize = 227 * 1024;
                let others = 4 * tile_k + 3072;
                let q_stages = if 2 * tile_q + others <= LIMIT { 2 } else { 1 };
                q_stages * tile_q + others
            }
            // q, k and v.
            Pass::Forward => tile_q + 2 * tile_k,
            // k and v, P, dS (twice where a group is one warp), and for each stage q, do, lse and delta.
            Pass::Backward => {
                let scores = if self.warps_m == 1 { 3 } else { 2 } * self.block_m * self.block_n * ELEMENT_BYTES;
                2 * tile_k + scores + self.stages * (2 * tile_q + 2 * self.block_m * size_of::<f32>())
            }
            Pass::Delta | Pass::Convert => 0,
        }
    }
}

/// One source file, compiled on its own.
struct Unit {
    name: String,
    /// As of a line: it decides what the unit is compiled for.
    arch: usize,
    source: String,
    kernels: Vec<Kernel>,
}

/// One row of the table.
struct Kernel {
    name: String,
    dtype: &'static str,
    modified: bool,
    pass: Pass,
    arch: usize,
    head_dim: usize,
    block_m: usize,
    block_n: usize,
    warps: usize,
    shared_bytes: usize,
}

fn units(definitions: &Definitions) -> Vec<Unit> {
    let mut units: Vec<Unit> = definitions.lines.iter().map(attention_unit).collect();
    units.push(delta_unit());
    let mut names = BTreeSet::new();
    for kernel in units.iter().flat_map(|unit| &unit.kernels) {
        if !names.insert(&kernel.name) {
            fail(format!("cuda/instances.def: two lines give a kernel of the name {}", kernel.name));
        }
    }
    units
}

/// The kernels of one line: each element type, plain and modified (softcap, ALiBi). The sums of dq lie in the order of the
/// backward's threads, so each backward has a kernel of its own that converts them.
fn attention_unit(line: &Line) -> Unit {
    let &Line { arch, head_dim, block_m, block_n, warps, stages, warps_m, warps_n, .. } = line;
    let space = format!("fa2::sm{arch}");
    let (prefix, traits, header, tile, columns) = match line.pass {
        Pass::Backward => {
            let tile = format!("{block_m}x{block_n}_s{stages}");
            // Includes the backward, for the order of its threads.
            ("bwd", "BwdTraits", "sm80/convert.cuh".to_string(), tile, format!("{warps}, {stages}, {warps_m}, {warps_n}"))
        }
        _ => ("fwd", "FwdTraits", format!("sm{arch}/fwd.cuh"), format!("{block_m}x{block_n}"), warps.to_string()),
    };
    let threads = warps * WARP_SIZE;
    let mut source = format!("#include \"{header}\"\n\n{AGREE}");
    let mut kernels = Vec::new();
    for (dtype, variant) in DTYPES {
        let mut add = |pass: Pass, modified: bool, shared_bytes: usize| {
            let (prefix, function, params) = match pass {
                Pass::Convert => ("convert", "convert", "ConvertParams"),
                Pass::Backward => (prefix, "backward", "BwdParams"),
                _ if arch == HOPPER => (prefix, "forward", "HopperFwdParams"),
                _ => (prefix, "forward", "FwdParams"),
            };
            let (suffix, score_mod) = if modified { ("_modified", "fa2::SoftcapAlibi") } else { ("", "fa2::NoScoreMod") };
            let name = format!("{prefix}_sm{arch}_{dtype}_d{head_dim}_{tile}{suffix}");
            let _ = write!(
                source,
                "\nusing {name}_traits = {space}::{traits}<fa2::{dtype}, {head_dim}, {block_m}, {block_n}, {columns}, {score_mod}>;\n"
            );
            if pass != Pass::Convert {
                let _ = writeln!(
                    source,
                    "static_assert(SharedBytes<{name}_traits::kSharedBytes, {shared_bytes}>::kAgree);"
                );
            }
            let _ = write!(
                source,
                "extern \"C\" __global__ void __launch_bounds__({threads}, {name}_traits::kMinBlocks)\n\
                 {name}(const __grid_constant__ fa2::{params} params) {{\n    \
                     {space}::{function}<{name}_traits>(params);\n\
                 }}\n"
            );
            let dtype = variant;
            kernels.push(Kernel { name, dtype, modified, pass, arch, head_dim, block_m, block_n, warps, shared_bytes });
        };
        add(line.pass, false, line.shared_bytes());
        add(line.pass, true, line.shared_bytes());
        if line.pass == Pass::Backward {
            add(Pass::Convert, false, 0);
        }
    }
    Unit { name: format!("{prefix}_sm{arch}_d{head_dim}_{tile}"), arch, source, kernels }
}

/// Prints both numbers when they differ: the compiler shows the arguments of a template that fails.
const AGREE: &str = "\
template <int kInTraits, int kInBuildScript>
struct SharedBytes {
    static_assert(kInTraits == kInBuildScript, \"kSharedBytes and shared_bytes() in build.rs differ\");
    static constexpr bool kAgree = true;
};
";

/// delta, and what the two compilers must agree on.
fn delta_unit() -> Unit {
    let threads = DELTA_WARPS * WARP_SIZE;
    let mut source = String::from("#include <cstddef>\n\n#include \"delta.cuh\"\n");
    let _ = write!(source, "\nstatic_assert(fa2::kDeltaThreads == {threads});\n");
    source += &layout_cu();
    let mut kernels = Vec::new();
    for (dtype, variant) in DTYPES {
        let name = format!("delta_{dtype}");
        let _ = write!(
            source,
            "\nextern \"C\" __global__ void __launch_bounds__({threads})\n\
             {name}(const __grid_constant__ fa2::DeltaParams params) {{\n    fa2::delta<fa2::{dtype}>(params);\n}}\n"
        );
        kernels.push(Kernel {
            name,
            dtype: variant,
            modified: false,
            pass: Pass::Delta,
            arch: 80,
            head_dim: 0,
            block_m: 0,
            block_n: 0,
            warps: DELTA_WARPS,
            shared_bytes: 0,
        });
    }
    Unit { name: "delta".to_string(), arch: 80, source, kernels }
}

/// The table as Rust.
fn table(units: &[Unit]) -> String {
    let kernels = units.iter().enumerate().flat_map(|(image, unit)| unit.kernels.iter().map(move |k| (image, k)));
    let rows: Vec<String> = kernels
        .map(|(image, kernel)| {
            let pass = match kernel.pass {
                Pass::Forward => "Forward",
                Pass::Backward => "Backward",
                Pass::Delta => "Delta",
                Pass::Convert => "Convert",
            };
            let Kernel { name, dtype, modified, arch, head_dim, block_m, block_n, warps, shared_bytes, .. } = kernel;
            format!(
                "    Kernel {{ name: {name:?}, image: {image}, pass: Pass::{pass}, arch: Arch::Sm{arch}, dtype: \
                 DType::{dtype}, head_dim: {head_dim}, block_m: {block_m}, block_n: {block_n}, warps: {warps}, modified: \
                 {modified}, shared_bytes: {shared_bytes} }},\n"
            )
        })
        .collect();
    format!("/// All of them.\npub static KERNELS: [Kernel; {}] = [\n{}];\n", rows.len(), rows.concat())
}

/// The parameter structs: bytes of each field in order, as cuda/params.h and src/cuda/params.rs must both have them.
const STRUCTS: [(&str, &[(&str, usize)]); 10] = [
    ("Strides", &[("batch", 8), ("row", 8), ("head", 8)]),
    (
        "Shape",
        &[
            ("cu_seqlens_q", 8),
            ("cu_seqlens_k", 8),
            ("key_lengths", 8),
            ("alibi_slopes", 8),
            ("lse_batch", 8),
            ("lse_head", 8),
            ("alibi_batch", 4),
            ("batch", 4),
            ("first_batch", 4),
            ("keys_at_end", 4),
            ("seqlen_q", 4),
            ("seqlen_k", 4),
            ("num_heads", 4),
            ("num_heads_k", 4),
            ("head_dim", 4),
            ("window_left", 4),
            ("window_right", 4),
            ("softmax_scale_log2", 4),
            ("softcap_log2", 4),
            ("softmax_scale_over_softcap", 4),
        ],
    ),
    (
        "FwdParams",
        &[
            ("q", 8),
            ("k", 8),
            ("v", 8),
            ("o", 8),
            ("lse", 8),
            ("q_strides", STRIDES),
            ("k_strides", STRIDES),
            ("v_strides", STRIDES),
            ("o_strides", STRIDES),
            ("shape", SHAPE),
            ("o_is_f32", 4),
        ],
    ),
    ("TensorMap", &[("words", TENSOR_MAP)]),
    ("Schedule", &[("counters", 8), ("tiles", 4), ("m_blocks", 4), ("section_heads", 4)]),
    (
        "HopperFwdParams",
        &[("q", TENSOR_MAP), ("k", TENSOR_MAP), ("v", TENSOR_MAP), ("fwd", FWD_PARAMS), ("schedule", SCHEDULE)],
    ),
    (
        "DeltaParams",
        &[
            ("o", 8),
            ("do_", 8),
            ("dlse", 8),
            ("delta", 8),
            ("o_strides", STRIDES),
            ("do_strides", STRIDES),
            ("shape", SHAPE),
        ],
    ),
    ("DqTiles", &[("batch", 8), ("head", 8), ("count", 8)]),
    (
        "BwdParams",
        &[
            ("q", 8),
            ("k", 8),
            ("v", 8),
            ("do_", 8),
            ("lse", 8),
            ("delta", 8),
            ("dq_accum", 8),
            ("semaphores", 8),
            ("dk", 8),
            ("dv", 8),
            ("q_strides", STRIDES),
            ("k_strides", STRIDES),
            ("v_strides", STRIDES),
            ("do_strides", STRIDES),
            ("dk_strides", STRIDES),
            ("dq_tiles", DQ_TILES),
            ("shape", SHAPE),
            ("softmax_scale", 4),
        ],
    ),
    (
        "ConvertParams",
        &[
            ("dq_accum", 8),
            ("dq", 8),
            ("dq_strides", STRIDES),
            ("dq_tiles", DQ_TILES),
            ("shape", SHAPE),
            ("softmax_scale", 4),
        ],
    ),
];
const STRIDES: usize = 24;
const DQ_TILES: usize = 24;
const SHAPE: usize = 104;
const FWD_PARAMS: usize = 248;
const SCHEDULE: usize = 24;
const TENSOR_MAP: usize = 128;

/// A struct of [`STRUCTS`] in bytes.
struct Layout {
    name: &'static str,
    size: usize,
    alignment: usize,
    /// Name and offset.
    fields: Vec<(&'static str, usize)>,
}

fn layouts() -> impl Iterator<Item = Layout> {
    // TMA reads its maps at multiples of 64.
    let alignment = |bytes: usize| if bytes == TENSOR_MAP { 64 } else { bytes.min(8) };
    STRUCTS.into_iter().map(move |(name, fields)| {
        let mut end = 0usize;
        let offsets = fields
            .iter()
            .map(|&(field, bytes)| {
                let offset = end.next_multiple_of(alignment(bytes));
                end = offset + bytes;
                (field, offset)
            })
            .collect();
        let alignment = fields.iter().map(|&(_, bytes)| alignment(bytes)).max().unwrap_or(1);
        Layout { name, size: end.next_multiple_of(alignment), alignment, fields: offsets }
    })
}

fn layout_cu() -> String {
    let mut text = String::new();
    for Layout { name, size, alignment, fields } in layouts() {
        let _ = write!(text, "\nstatic_assert(sizeof(fa2::{name}) == {size}, \"{name}\");\n");
        let _ = writeln!(text, "static_assert(alignof(fa2::{name}) == {alignment}, \"{name}\");");
        for (field, offset) in fields {
            let _ = writeln!(text, "static_assert(offsetof(fa2::{name}, {field}) == {offset}, \"{name}::{field}\");");
        }
    }
    text
}

fn layout_rs() -> String {
    let mut text = String::from("const _: () = {\n");
    for Layout { name, size, alignment, fields } in layouts() {
        let _ = writeln!(text, "    assert!(size_of::<{name}>() == {size} && align_of::<{name}>() == {alignment});");
        for (field, offset) in fields {
            let _ = writeln!(text, "    assert!(std::mem::offset_of!({name}, {field}) == {offset});");
        }
    }
    text + "};\n"
}

/// nvcc, and what it is asked for.
struct Compiler {
    nvcc: PathBuf,
    version: String,
    /// Compute capabilities times ten, from 80 on.
    archs: BTreeSet<usize>,
    include: PathBuf,
    out: PathBuf,
}

impl Compiler {
    fn find(root: &Path, out: &Path) -> Self {
        let nvcc = find_nvcc().unwrap_or_else(|| {
            fail(
                "the feature cuda needs nvcc, which is in none of NVCC, PATH, CUDA_HOME, CUDA_PATH and /usr/local/cuda",
            )
        });
        let version = match Command::new(&nvcc).arg("--version").output() {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => fail(format!("cannot run {}: {error}", nvcc.display())),
        };
        Self { nvcc, version, archs: archs(), include: root.join("cuda"), out: out.to_path_buf() }
    }

    fn path(&self, unit: &Unit, extension: &str) -> PathBuf {
        self.out.join(format!("{}.{extension}", unit.name))
    }

    /// Compiles what has changed, as many units at once as cargo runs jobs.
    fn compile(&self, units: &[Unit]) {
        let changed: Vec<(&Unit, String)> = units
            .iter()
            .rev() // the longest to compile stand last in the table
            .map(|unit| (unit, self.fingerprint(unit)))
            .filter(|(unit, fingerprint)| {
                let seen = fs::read_to_string(self.path(unit, "fingerprint"));
                !(seen.is_ok_and(|seen| seen == *fingerprint) && self.path(unit, "fatbin").exists())
            })
            .collect();
        let jobs = variable("NUM_JOBS").and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
        let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..jobs.min(changed.len()) {
                scope.spawn(|| {
                    while let Some((unit, fingerprint)) = changed.get(next.fetch_add(1, Ordering::Relaxed)) {
                        match self.compile_unit(unit) {
                            Ok(()) => write(&self.path(unit, "fingerprint"), fingerprint),
                            Err(error) => {
                                // No further unit is begun.
                                next.store(changed.len(), Ordering::Relaxed);
                                errors.lock().expect("no job panics").push(error);
                            }
                        }
                    }
                });
            }
        });
        if let Some(error) = errors.into_inner().expect("no job panics").first() {
            fail(error);
        }
    }

    fn compile_unit(&self, unit: &Unit) -> Result<(), String> {
        let source = self.path(unit, "cu");
        write(&source, &unit.source);
        let mut command = Command::new(&self.nvcc);
        command.args(self.flags(unit)).arg("-I").arg(&self.include);
        command.arg("-fatbin").arg("-o").arg(self.path(unit, "fatbin")).arg(&source);
        let output = command.output().map_err(|error| format!("cannot run {}: {error}", self.nvcc.display()))?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{command:?} failed:\n{text}"));
        }
        let advice = serialized(&text);
        if unit.arch == HOPPER && !advice.is_empty() {
            return Err(format!("{} loses what its kernels are written for:\n{}", unit.name, advice.join("\n")));
        }
        write(&self.path(unit, "log"), &text);
        Ok(())
    }

    /// The GPUs that a unit has machine code for: compute capability times ten, and the name that ptxas has for it.
    fn targets(&self, unit: &Unit) -> Vec<(usize, String)> {
        if unit.arch == HOPPER {
            return vec![(HOPPER, format!("{HOPPER}a"))];
        }
        self.archs.iter().map(|&arch| (arch, arch.to_string())).collect()
    }

    fn flags(&self, unit: &Unit) -> Vec<String> {
        let targets = self.targets(unit).into_iter();
        let machine_code = targets.map(|(_, name)| format!("-gencode=arch=compute_{name},code=sm_{name}"));
        let later_gpus = (unit.arch != HOPPER).then(|| "-gencode=arch=compute_80,code=compute_80".to_string());
        FLAGS.into_iter().map(String::from).chain(machine_code).chain(later_gpus).collect()
    }

    /// Everything that decides what comes out of the compiler.
    fn fingerprint(&self, unit: &Unit) -> String {
        let mut hasher = DefaultHasher::new();
        (&self.nvcc, &self.version, self.flags(unit), &unit.source).hash(&mut hasher);
        let mut headers = BTreeMap::new();
        self.headers(&unit.source, &self.include, &mut headers);
        headers.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// The headers under cuda/ that `source` includes, and those that they include. Others belong to the compiler.
    fn headers(&self, source: &str, folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
        let names = source.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
        for name in names {
            for path in [folder.join(name), self.include.join(name)] {
                let Ok(path) = path.canonicalize() else { continue };
                if let (false, Ok(text)) = (found.contains_key(&path), fs::read_to_string(&path)) {
                    found.insert(path.clone(), text.clone());
                    self.headers(&text, path.parent().unwrap_or(folder), found);
                }
            }
        }
    }

    /// Writes kernels.csv, and fails on local memory that instances.def does not list.
    fn report(&self, units: &[Unit], definitions: &Definitions) {
        let mut csv =
            String::from("kernel,arch,threads,registers,stack_bytes,spill_store_bytes,spill_load_bytes,shared_bytes\n");
        let mut unlisted = Vec::new();
        for unit in units {
            // A stand-in for nvcc, with which only Rust is checked, leaves an empty file.
            if fs::metadata(self.path(unit, "fatbin")).is_ok_and(|file| file.len() == 0) {
                continue;
            }
            let log = fs::read_to_string(self.path(unit, "log")).unwrap_or_default();
            let usage = parse_log(&log);
            for kernel in &unit.kernels {
                for (arch, target) in self.targets(unit) {
                    let Some(used) = usage.get(&(kernel.name.clone(), format!("sm_{target}"))) else {
                        fail(format!("ptxas reports nothing about {} for sm_{target}", kernel.name))
                    };
                    let &Usage { registers, stack, spill_stores, spill_loads, shared } = used;
                    let _ = writeln!(
                        csv,
                        "{},{arch},{},{registers},{stack},{spill_stores},{spill_loads},{}",
                        kernel.name,
                        kernel.warps * WARP_SIZE,
                        shared + kernel.shared_bytes
                    );
                    let listed = |local: &Local| matches(&local.kernel, &kernel.name) && stack <= local.bytes;
                    if stack > 0 && !definitions.locals.iter().any(listed) {
                        unlisted.push(format!(
                            "{} for sm_{arch} uses {stack} bytes of local memory a thread, {spill_stores} bytes are spilled",
                            kernel.name
                        ));
                    }
                }
            }
        }
        write(&self.out.join("kernels.csv"), &csv);
        if unlisted.is_empty() {
            return;
        }
        let way_out = "change the tile, or list the kernel in cuda/instances.def: LOCAL(kernel, bytes)  // reason";
        if variable("CANDLE_FA2_SPILLS").is_some_and(|value| value == "warn") {
            unlisted.iter().for_each(|text| println!("cargo:warning={text}"));
        } else {
            fail(format!("{}\n{way_out}, or set CANDLE_FA2_SPILLS=warn", unlisted.join("\n")));
        }
    }
}

fn find_nvcc() -> Option<PathBuf> {
    let program = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let path = env::var_os("PATH").unwrap_or_default();
    let named = variable("NVCC").map(PathBuf::from).into_iter();
    let on_path = env::split_paths(&path).map(|folder| folder.join(&program));
    let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let roots = roots.chain(["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda"].map(String::from));
    let in_roots = roots.map(|root| Path::new(&root).join("bin").join(&program));
    named.chain(on_path).chain(in_roots).find(|candidate| candidate.is_file())
}

/// The GPUs to compile for, from compute capability 8.0 on. Older ones get no machine code: `Plan` refuses them.
fn archs() -> BTreeSet<usize> {
    let names: Vec<String> = match variable("CANDLE_FA2_CUDA_ARCHS").or_else(|| variable("CUDA_COMPUTE_CAP")) {
        Some(list) => list.split([',', ';', ' ']).filter(|name| !name.is_empty()).map(String::from).collect(),
        None => match Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output() {
            Ok(output) if output.status.success() => {
                String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_string()).collect()
            }
            _ => fail("nvidia-smi does not say which GPU to compile for; set CUDA_COMPUTE_CAP, for example to 90"),
        },
    };
    let number = |name: &String| {
        // 90, 9.0, sm_90 and 90a all name the same GPU.
        let digits: String = name.trim_start_matches("sm_").chars().filter(char::is_ascii_digit).collect();
        match digits.parse::<usize>() {
            Ok(arch) => arch,
            Err(_) => fail(format!("{name} is no compute capability; expected a number such as 90")),
        }
    };
    let (new, old): (BTreeSet<usize>, BTreeSet<usize>) = names.iter().map(number).partition(|&arch| arch >= 80);
    for arch in old {
        println!("cargo:warning=candle-fa2 has no kernel for compute capability {arch}: its oldest is 80");
    }
    new
}

/// The lines in which ptxas says that wgmma runs one by one, or that setmaxnreg moves no registers; they name the kernel.
fn serialized(log: &str) -> Vec<&str> {
    const SIGNS: [&str; 10] = [
        "Potential Performance Loss",
        "serialized",
        "(C7508)",
        "(C7510)",
        "(C7511)",
        "(C7512)",
        "(C7513)",
        "(C7514)",
        "(C7515)",
        "(C7516)",
    ];
    log.lines().filter(|line| SIGNS.iter().any(|sign| line.contains(sign))).collect()
}

/// What a kernel uses on one GPU.
#[derive(Default)]
struct Usage {
    registers: usize,
    stack: usize,
    spill_stores: usize,
    spill_loads: usize,
    shared: usize,
}

/// Reads what `-Xptxas -v` prints, by kernel and architecture.
fn parse_log(log: &str) -> BTreeMap<(String, String), Usage> {
    let mut usage: BTreeMap<(String, String), Usage> = BTreeMap::new();
    let mut current = None;
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'');
            current = quoted.nth(1).zip(quoted.nth(1)).map(|(name, arch)| (name.to_string(), arch.to_string()));
            continue;
        }
        let Some(key) = &current else { continue };
        let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        // The number before a phrase: `80 bytes stack frame`, `Used 255 registers`.
        let before = |phrase: &[&str]| {
            let at = words.windows(phrase.len()).position(|window| window == phrase)?;
            words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
        };
        let entry = usage.entry(key.clone()).or_default();
        // Functions that were not inlined have frames of their own.
        let update = |value: &mut usize, phrase: &[&str]| *value = before(phrase).unwrap_or(0).max(*value);
        update(&mut entry.stack, &["bytes", "stack", "frame"]);
        update(&mut entry.stack, &["bytes", "cumulative", "stack", "size"]);
        update(&mut entry.spill_stores, &["bytes", "spill", "stores"]);
        update(&mut entry.spill_loads, &["bytes", "spill", "loads"]);
        update(&mut entry.registers, &["registers"]);
        update(&mut entry.shared, &["bytes", "smem"]);
    }
    usage
}

/// Whether `name` is `pattern`, in which each `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            (0..=name.len()).any(|skip| name.is_char_boundary(skip) && matches(rest, &name[skip..]))
        }),
    }
}
