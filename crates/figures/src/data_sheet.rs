//! The rates that data sheets of GPUs promise.

/// TFLOP/s of dense products of bf16 or f16 with sums in f32, by the driver's name of the GPU.
///
/// Where NVIDIA's product briefs give only the rate with sparsity, this is half of it. GeForce: appendix of the
/// architecture's whitepaper, "with FP32 accumulate".
const PRODUCTS: [(&str, f64); 17] = [
    ("NVIDIA A100", 312.0),
    ("NVIDIA A30", 165.0),
    ("NVIDIA A10", 125.0),
    ("NVIDIA A40", 149.7),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 3090", 71.0),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA L4", 121.0),
    ("NVIDIA L40", 181.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H200", 989.0),
    ("NVIDIA H200 NVL", 835.0),
    ("NVIDIA GH200", 989.0),
];

/// TFLOP/s of the GPU `name` for dense products of bf16 or f16 with sums in f32. `None` if the GPU is not listed, or is
/// part of a listed one.
pub fn tflops(name: &str) -> Option<f64> {
    // `A100-SXM4-80GB` is an A100. `RTX 4090 Laptop GPU` is no RTX 4090, and a MIG instance is part of a GPU.
    let harmless = |word: &str| word.ends_with("GB") || word.starts_with("SXM") || word.eq_ignore_ascii_case("PCIe");
    let is_variant = |rest: &str| rest.starts_with([' ', '-']) && rest[1..].split([' ', '-']).all(harmless);
    let exact = PRODUCTS.iter().find(|(known, _)| *known == name);
    let variant = || PRODUCTS.iter().find(|(known, _)| name.strip_prefix(known).is_some_and(is_variant));
    exact.or_else(variant).map(|&(_, tflops)| tflops)
}

#[test]
fn variants_of_a_gpu_have_its_rate_and_parts_have_none() {
    for (name, want) in [
        ("NVIDIA H200", Some(989.0)),
        ("NVIDIA H200 NVL", Some(835.0)),
        ("NVIDIA A100-SXM4-80GB", Some(312.0)),
        ("NVIDIA A100 80GB PCIe", Some(312.0)),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("CPU", None),
    ] {
        assert_eq!(tflops(name), want, "{name}");
    }
}
