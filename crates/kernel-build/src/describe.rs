//! Describes the kernels of a table as JSON, so that a program without Rust can compile and launch them.

use std::path::Path;

use crate::family::Grid;
use crate::headers;
use crate::json::Json;
use crate::nvcc::FLAGS;
use crate::params::Structs;
use crate::units::{Kernel, Unit};
use crate::Result;

/// The units with their sources, the headers that they include, the layout of the parameters, the shared numbers, and nvcc's flags.
///
/// # Errors
/// If `include` cannot be read.
pub fn describe(units: &[Unit], structs: &Structs, include: &Path) -> Result<Json> {
    let sources: Vec<String> = units.iter().map(|unit| unit.source(structs)).collect();
    let headers = headers::of_text(&sources.concat(), include)?;
    let headers: Vec<(String, Json)> =
        headers.into_iter().map(|(path, text)| (path.display().to_string(), Json::String(text))).collect();
    let units = units.iter().zip(sources).map(|(unit, source)| describe_unit(unit, source));
    Ok(Json::object([
        ("flags", Json::Array(FLAGS.into_iter().map(Json::from).collect())),
        ("constants", structs.json_constants()),
        ("structs", structs.json()),
        ("units", Json::Array(units.collect())),
        ("headers", Json::Object(headers)),
    ]))
}

fn describe_unit(unit: &Unit, source: String) -> Json {
    let arch = &unit.family.arch;
    Json::object([
        ("name", Json::from(unit.name.as_str())),
        ("sm", Json::from(arch.sm as usize)),
        ("exact", Json::Bool(arch.exact)),
        ("kernels", Json::Array(unit.kernels.iter().map(describe_kernel).collect())),
        ("source", Json::String(source)),
    ])
}

fn describe_kernel(kernel: &Kernel) -> Json {
    let Kernel { name, entry, dtype, variant, line, shared_bytes, .. } = kernel;
    let mut members = vec![
        ("name", Json::from(name.as_str())),
        ("pass", Json::from(entry.pass)),
        ("dtype", Json::from(dtype.name)),
        ("element_bytes", Json::from(dtype.bytes)),
        ("score_mod", Json::Bool(variant.score_mod)),
        ("params", Json::from(entry.params)),
        ("threads", Json::from(kernel.threads())),
        ("shared_bytes", Json::from(*shared_bytes)),
    ];
    if let Grid::Persistent { max_tiles: Some(max_tiles) } = entry.grid {
        members.push(("max_tiles", Json::from(max_tiles)));
    }
    members.extend(kernel.box_cols().map(|box_cols| ("box_cols", Json::from(box_cols))));
    members.extend(line.family.columns.iter().zip(line.values()).map(|(column, value)| (*column, Json::from(*value))));
    Json::object(members)
}
