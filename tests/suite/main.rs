//! Tests of the operator: every option, shape, type and device is compared with an independent f64 reference.
//!
//! `cargo test --test suite smoke` runs one small case of each kind in about a second. With the feature `cuda` and a GPU
//! the same tests run on the GPU too; `cuda.rs` says how to copy the suite to a machine with a GPU.

mod bench_filters;
mod common;
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_graph;
mod cuda_plan;
mod edges;
mod errors;
mod few_queries;
mod gradcheck;
mod layers;
mod layouts;
mod mask_units;
mod merge;
mod packed;
mod padding;
mod problem_plan;
mod properties;
mod smoke;
mod tensor_layouts;
mod threads;
mod values;
