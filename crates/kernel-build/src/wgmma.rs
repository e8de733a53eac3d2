//! Generates the wgmma of every N, for cuda/sm90/wgmma.cuh.
//!
//! A thread holds N / 2 registers of the product. An asm statement names each of them, and C++ cannot make such a list from a template
//! argument. So each N is a specialization. The compiler only parses those that a kernel does not use.

use std::fmt::Write as _;

/// The header: a `WgmmaShared` and a `WgmmaRegisters` for each N (PTX ISA, "wgmma.mma_async").
pub fn header() -> String {
    let mut text = String::from(
        "// The wgmma of every N. crates/kernel-build/src/wgmma.rs generates this file; cuda/sm90/wgmma.cuh has the templates.\n\
         #pragma once\n\n#include <type_traits>\n\nnamespace fa2::sm90 {\n",
    );
    for n in (8..=256).step_by(8) {
        let shared = step(n, "uint64_t a", &[("l", "a")], &["kTransposedA", "kTransposedB"]);
        let registers = step(
            n,
            "const uint32_t (&a)[4]",
            &[("r", "a[0]"), ("r", "a[1]"), ("r", "a[2]"), ("r", "a[3]")],
            &["kTransposedB"],
        );
        let _ = write!(
            text,
            "\ntemplate <typename T, bool kTransposedA, bool kTransposedB>\n\
             struct WgmmaShared<T, {n}, kTransposedA, kTransposedB> {{\n{shared}}};\n\
             \ntemplate <typename T, bool kTransposedB>\n\
             struct WgmmaRegisters<T, {n}, kTransposedB> {{\n{registers}}};\n"
        );
    }
    text + "\n}  // namespace fa2::sm90\n"
}

/// The function `step` of one specialization. `operands_a`: constraint and value of each operand that holds a.
fn step(n: usize, parameter_a: &str, operands_a: &[(&str, &str)], transposed: &[&str]) -> String {
    let (f16, bf16) = (asm(n, "f16", operands_a, transposed), asm(n, "bf16", operands_a, transposed));
    format!(
        "    __device__ __forceinline__ static void step(float (&d)[{}][4], {parameter_a}, uint64_t b, int accumulate) {{
        if constexpr (std::is_same_v<T, f16>) {{
            {f16}
        }} else {{
            {bf16}
        }}
    }}
",
        n / 8
    )
}

/// The asm statement of one instruction. Its operands are the registers of d, then those of a, then b, `accumulate` and `transposed`.
fn asm(n: usize, dtype: &str, operands_a: &[(&str, &str)], transposed: &[&str]) -> String {
    let registers = n / 2;
    let mut inputs: Vec<String> = Vec::new();
    let mut input = |constraint: &str, value: &str| {
        inputs.push(format!("\"{constraint}\"({value})"));
        format!("%{}", registers + inputs.len() - 1)
    };
    let mut a = operands_a.iter().map(|(constraint, value)| input(constraint, value)).collect::<Vec<_>>().join(", ");
    if operands_a.len() > 1 {
        a = format!("{{{a}}}");
    }
    let (b, accumulate) = (input("l", "b"), input("r", "accumulate"));
    let transposed: String =
        transposed.iter().map(|name| format!(", {}", input("n", &format!("int({name})")))).collect();
    let d = (0..registers).map(|i| format!("%{i}")).collect::<Vec<_>>().join(", ");
    let outputs = (0..registers).map(|i| format!("\"+f\"(d[{}][{}])", i / 4, i % 4)).collect::<Vec<_>>().join(", ");
    format!(
        "asm volatile(\"{{\\n.reg .pred add;\\nsetp.ne.b32 add, {accumulate}, 0;\\n\"
                \"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {{{d}}}, {a}, {b}, add, 1, 1{transposed};\\n}}\\n\"
                : {outputs}
                : {});",
        inputs.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_names_all_its_operands() {
        let shared = step(8, "uint64_t a", &[("l", "a")], &["kTransposedA", "kTransposedB"]);
        let bf16 = r#"        } else {
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
                "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, %7, %8;\n}\n"
                : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3])
                : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransposedA)), "n"(int(kTransposedB)));
        }
"#;
        assert!(shared.contains(bf16), "{shared}");
    }

    #[test]
    fn every_n_has_both_templates() {
        let header = header();
        for n in (8..=256).step_by(8) {
            assert!(header.contains(&format!("struct WgmmaShared<T, {n}, kTransposedA, kTransposedB> {{")), "{n}");
            assert!(header.contains(&format!("struct WgmmaRegisters<T, {n}, kTransposedB> {{")), "{n}");
        }
        assert!(header.contains("{%128, %129, %130, %131}, %132, add, 1, 1, %134;"), "the last operands at 256");
    }
}
