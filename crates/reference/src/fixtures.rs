//! Files of inputs, answers and limits. Programs in other languages compare their results with them.
//!
//! A folder holds `fixtures.json` and one file for each tensor of each case. A file has the numbers in row-major order,
//! little endian: inputs in the type of the case, everything else in f32. Shapes are those of the operator: q, k, v, o
//! and their gradients `(batch, seqlen, heads, head_dim)`, lse `(batch, num_heads, seqlen_q)`. Each row of an answer has a
//! limit: `(batch, seqlen, heads)`. For lse each number has one.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

use crate::call::{attention, Input, Rows};
use crate::draw::{generator, normal};
use crate::precision::Precision;
use crate::tolerance::{tolerances, Tolerance};

/// One padded call. The softmax scale is `1 / sqrt(head_dim)`.
#[derive(Clone, Debug)]
pub struct Fixture {
    pub name: String,
    pub precision: Precision,
    pub batch: usize,
    pub seqlen_q: usize,
    pub seqlen_k: usize,
    pub num_heads: usize,
    pub num_heads_k: usize,
    pub head_dim: usize,
    pub causal: bool,
}

/// Three calls that find most mistakes of a kernel for `head_dim`: incomplete tiles with shared heads, more keys than
/// queries, and many tiles of a head_dim that is 8 less. Their names contain `head_dim`.
pub fn of_kernel(precision: Precision, head_dim: usize) -> Vec<Fixture> {
    let fixture = |name: &str, batch, (seqlen_q, seqlen_k), (num_heads, num_heads_k), causal| Fixture {
        name: format!("d{head_dim}-{name}"),
        precision,
        batch,
        seqlen_q,
        seqlen_k,
        num_heads,
        num_heads_k,
        head_dim,
        causal,
    };
    let many_tiles = fixture("many-tiles", 1, (2050, 2050), (2, 1), true);
    vec![
        fixture("shared-heads", 2, (333, 333), (4, 2), true),
        fixture("more-keys", 1, (200, 515), (4, 4), false),
        Fixture { head_dim: head_dim - 8, ..many_tiles },
    ]
}

/// Writes the fixtures and `fixtures.json` into `folder`. Creates the folder if it does not exist.
///
/// # Errors
/// If a file cannot be written, or if a case is in f64, because answers are stored in f32.
pub fn write(folder: &Path, fixtures: &[Fixture]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let cases = fixtures.iter().map(|fixture| fixture.write(folder)).collect::<Result<Vec<Value>>>()?;
    let index = serde_json::to_string_pretty(&json!({ "cases": cases }))?;
    write_file(&folder.join("fixtures.json"), index.as_bytes())
}

impl Fixture {
    /// Standard normal q, k, v and do. The name is the seed.
    pub fn input(&self) -> Input {
        let mut rng = generator(&self.name);
        let rows_q = self.batch * self.seqlen_q * self.num_heads;
        let rows_k = self.batch * self.seqlen_k * self.num_heads_k;
        let mut draw = |rows: usize| normal(&mut rng, self.precision, rows * self.head_dim);
        Input {
            precision: self.precision,
            lengths: vec![(self.seqlen_q, self.seqlen_k); self.batch],
            num_heads: self.num_heads,
            num_heads_k: self.num_heads_k,
            head_dim: self.head_dim,
            head_dim_v: self.head_dim,
            window: (None, self.causal.then_some(0)),
            softmax_scale: self.softmax_scale(),
            softcap: None,
            alibi_slopes: None,
            q: draw(rows_q),
            k: draw(rows_k),
            v: draw(rows_k),
            do_: draw(rows_q),
            dlse: vec![0.0; rows_q],
            queries: None,
        }
    }

    fn softmax_scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Writes the tensors, and returns their entry in `fixtures.json`.
    fn write(&self, folder: &Path) -> Result<Value> {
        let input = self.input();
        let want = attention(&input);
        let tolerances = tolerances(&input, &want);
        let mut tensors = serde_json::Map::new();
        let mut add = |name: &str, values: &[f64], shape: Value, precision: Precision| -> Result<()> {
            let file = format!("{}.{name}.{precision}", self.name);
            write_file(&folder.join(&file), &bytes(values, precision)?)?;
            tensors.insert(name.to_string(), json!({ "file": file, "dtype": precision.to_string(), "shape": shape }));
            Ok(())
        };
        let shape_q = json!([self.batch, self.seqlen_q, self.num_heads, self.head_dim]);
        let shape_k = json!([self.batch, self.seqlen_k, self.num_heads_k, self.head_dim]);
        for (name, values, shape) in [
            ("q", &input.q, &shape_q),
            ("k", &input.k, &shape_k),
            ("v", &input.v, &shape_k),
            ("do", &input.do_, &shape_q),
        ] {
            add(name, values, shape.clone(), self.precision)?;
        }
        for ((name, want), Tolerance { limits, .. }) in want.named().into_iter().zip(&tolerances) {
            let seqlen = want.lengths.first().copied().unwrap_or(0);
            let limits_name = format!("{name}_limits");
            if name == "lse" {
                let head_major = |values: &[f64]| self.head_major(values, want);
                let shape = json!([self.batch, want.heads, seqlen]);
                add(name, &head_major(&want.values), shape.clone(), Precision::F32)?;
                add(&limits_name, &head_major(limits), shape, Precision::F32)?;
            } else {
                add(name, &want.values, json!([self.batch, seqlen, want.heads, want.width]), Precision::F32)?;
                add(&limits_name, limits, json!([self.batch, seqlen, want.heads]), Precision::F32)?;
            }
        }
        Ok(json!({
            "name": self.name,
            "dtype": self.precision.to_string(),
            "batch": self.batch,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "num_heads": self.num_heads,
            "num_heads_k": self.num_heads_k,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "softmax_scale": self.softmax_scale(),
            "tensors": tensors,
        }))
    }

    /// `(batch, seqlen_q, num_heads)` as `(batch, num_heads, seqlen_q)`.
    fn head_major(&self, values: &[f64], rows: &Rows) -> Vec<f64> {
        let heads = rows.heads;
        let of_sequence = |sequence: &[f64]| -> Vec<f64> {
            (0..heads).flat_map(|head| sequence[head..].iter().step_by(heads).copied().collect::<Vec<_>>()).collect()
        };
        values.chunks_exact(self.seqlen_q * heads).flat_map(of_sequence).collect()
    }
}

/// The values in `precision`, rounded if necessary.
fn bytes(values: &[f64], precision: Precision) -> Result<Vec<u8>> {
    Ok(match precision {
        Precision::F32 | Precision::Tf32 => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
        Precision::F16 => values.iter().flat_map(|&x| half::f16::from_f64(x).to_le_bytes()).collect(),
        Precision::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes()).collect(),
        Precision::F64 => bail!("fixtures store answers in f32, which is not enough for f64; use f32, f16 or bf16"),
    })
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

/// A program can read the folder with `fixtures.json` alone, and gets the numbers of the reference.
#[test]
fn a_folder_of_fixtures_reads_back() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = temporary.path().join("fixtures");
    let fixture = Fixture {
        name: "small".into(),
        precision: Precision::Bf16,
        batch: 2,
        seqlen_q: 3,
        seqlen_k: 5,
        num_heads: 4,
        num_heads_k: 2,
        head_dim: 8,
        causal: true,
    };
    write(&folder, std::slice::from_ref(&fixture))?;
    let index: Value = serde_json::from_slice(&fs::read(folder.join("fixtures.json"))?)?;
    let case = &index["cases"][0];
    assert_eq!((&case["name"], &case["causal"], &case["num_heads_k"]), (&json!("small"), &json!(true), &json!(2)));
    let floats = |name: &str| -> Result<Vec<f32>> {
        let file = case["tensors"][name]["file"].as_str().context("every tensor names its file")?;
        let bytes = fs::read(folder.join(file))?;
        Ok(bytes.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect())
    };
    let (input, lse, limits) = (fixture.input(), floats("lse")?, floats("dq_limits")?);
    let want = attention(&input);
    assert_eq!(case["tensors"]["lse"]["shape"], json!([2, 4, 3]));
    // Batch 1, head 2, row 1.
    assert_eq!(lse[(4 + 2) * 3 + 1], want.lse.values[(3 + 1) * 4 + 2] as f32);
    assert_eq!(limits.len(), 2 * 3 * 4);
    assert_eq!(limits[7], tolerances(&input, &want)[2].limits[7] as f32);
    let q = fs::read(folder.join("small.q.bf16"))?;
    assert_eq!(half::bf16::from_le_bytes([q[2], q[3]]).to_f64(), input.q[1]);
    Ok(())
}
