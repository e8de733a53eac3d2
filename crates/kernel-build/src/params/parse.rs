//! Parses a strict subset of C with one declaration on a line. Everything else is an error, so that no field is overlooked.

use super::{Constant, Field, Struct, Structs, Type, SCALARS};
use crate::{Error, Result};

/// The rule that an error about a line states.
const SUBSET: &str =
    "parameters are structs with one field on a line, `type name;` or `type name[count];`, where type is int32_t, \
                      uint32_t, int64_t, uint64_t, float, a pointer, or a struct above; a shared number is \
                      `constexpr int kName = number;` outside of structs";

impl Structs {
    /// Parses the text of `file`. Errors name the file.
    ///
    /// # Errors
    /// If a line is not in the subset, names an unknown type, or repeats a name.
    ///
    /// # Example
    /// ```
    /// use kernel_build::params::Structs;
    ///
    /// let text = "namespace fa2 {\n// Strides, in elements.\nstruct Strides {\n    int64_t row;\n    int32_t head;  // or 0\n};\n}\n";
    /// let structs = Structs::parse(text, "params.h")?;
    /// let strides = structs.get("Strides")?;
    /// assert_eq!((strides.size, strides.alignment, strides.fields[1].offset), (16, 8, 8));
    /// # Ok::<(), kernel_build::Error>(())
    /// ```
    pub fn parse(text: &str, file: &str) -> Result<Self> {
        let structs = Self { namespace: String::new(), structs: Vec::new(), constants: Vec::new() };
        let mut parser = Parser { structs, open: None, docs: Vec::new() };
        let mut last = 0;
        for (index, line) in text.lines().enumerate() {
            last = index + 1;
            parser.line(line.trim()).map_err(|rule| Error::at(file, last, format!("{rule}, got {}", line.trim())))?;
        }
        match parser.open {
            Some(open) => Err(Error::at(file, last, format!("struct {} is not closed", open.name))),
            None => Ok(parser.structs),
        }
    }
}

struct Parser {
    structs: Structs,
    /// The struct that has begun and not ended.
    open: Option<Struct>,
    /// Comment lines above the next declaration.
    docs: Vec<String>,
}

impl Parser {
    fn line(&mut self, line: &str) -> Result<(), String> {
        let (code, comment) = match line.split_once("//") {
            Some((code, comment)) => (code.trim(), Some(comment.trim().to_string())),
            None => (line, None),
        };
        match (code, comment) {
            // A comment before a blank line belongs to no declaration.
            ("", None) => self.docs.clear(),
            ("", Some(comment)) => self.docs.push(comment),
            (code, comment) => {
                let docs = std::mem::take(&mut self.docs).into_iter().chain(comment).collect();
                self.code(code, docs)?;
            }
        }
        Ok(())
    }

    fn code(&mut self, code: &str, docs: Vec<String>) -> Result<(), String> {
        if self.open.is_some() {
            return self.inside(code, docs);
        }
        if let Some(namespace) = code.strip_prefix("namespace ").and_then(|rest| rest.strip_suffix('{')) {
            self.structs.namespace = namespace.trim().to_string();
        } else if let Some(head) = code.strip_prefix("struct ").and_then(|rest| rest.strip_suffix('{')) {
            self.open = Some(self.opened(head.trim(), docs)?);
        } else if let Some(constant) = code.strip_prefix("constexpr int ").and_then(|rest| rest.strip_suffix(';')) {
            let constant = self.constant(constant, docs)?;
            self.structs.constants.push(constant);
        } else if !(code == "}" || code.starts_with('#')) {
            return Err(SUBSET.to_string());
        }
        Ok(())
    }

    /// `kName = 8`
    fn constant(&self, text: &str, docs: Vec<String>) -> Result<Constant, String> {
        let (name, value) = text.split_once('=').ok_or(SUBSET)?;
        let (name, value) = (identifier(name.trim())?, value.trim().parse().map_err(|_| SUBSET)?);
        if !name.strip_prefix('k').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase())) {
            return Err(SUBSET.to_string());
        }
        if self.structs.constants.iter().any(|other| other.name == name) {
            return Err(format!("the name of a number is used once, but there is a {name} above"));
        }
        Ok(Constant { name, docs, value })
    }

    /// `Name` or `alignas(64) Name`.
    fn opened(&self, head: &str, docs: Vec<String>) -> Result<Struct, String> {
        let (alignment, name) = match head.strip_prefix("alignas(") {
            None => (None, head),
            Some(rest) => {
                let (number, name) = rest.split_once(')').ok_or(SUBSET)?;
                let number = number.trim().parse().ok().filter(|number: &usize| number.is_power_of_two());
                (Some(number.ok_or("alignas takes a power of two")?), name.trim())
            }
        };
        if self.structs.get(name).is_ok() {
            return Err(format!("the name of a struct is used once, but there is a struct {name} above"));
        }
        let (aligned, alignment) = (alignment.is_some(), alignment.unwrap_or(1));
        Ok(Struct { name: identifier(name)?, docs, fields: Vec::new(), size: 0, alignment, aligned })
    }

    fn inside(&mut self, code: &str, docs: Vec<String>) -> Result<(), String> {
        if code == "};" {
            let item = self.open.take().ok_or(SUBSET)?;
            return self.structs.push(item).map_err(|error| error.to_string());
        }
        let field = self.field(code, docs)?;
        let item = self.open.as_mut().ok_or(SUBSET)?;
        if item.fields.iter().any(|other| other.name == field.name) {
            return Err(format!(
                "the name of a field is used once in a struct, but {} has a field {} above",
                item.name, field.name
            ));
        }
        item.fields.push(field);
        Ok(())
    }

    /// `type name;` or `type name[count];`
    fn field(&self, code: &str, docs: Vec<String>) -> Result<Field, String> {
        let (ty, name) = code.strip_suffix(';').and_then(|code| code.rsplit_once([' ', '*'])).ok_or(SUBSET)?;
        let pointer = code[ty.len()..].starts_with('*');
        let (name, count) = match name.split_once('[') {
            None => (name, None),
            Some((name, count)) => {
                let count =
                    count.strip_suffix(']').and_then(|count| count.parse().ok()).filter(|&count: &usize| count > 0);
                (name, Some(count.ok_or(SUBSET)?))
            }
        };
        let ty = if pointer { Type::Pointer(format!("{}*", ty.trim())) } else { self.ty(ty.trim())? };
        Ok(Field { name: identifier(name.trim())?, docs, ty, count, offset: 0 })
    }

    fn ty(&self, text: &str) -> Result<Type, String> {
        if let Some(pointee) = text.strip_suffix('*') {
            return Ok(Type::Pointer(format!("{}*", pointee.trim())));
        }
        if let Some(scalar) = SCALARS.iter().find(|scalar| scalar.cuda == text) {
            return Ok(Type::Scalar(scalar));
        }
        self.structs.get(text).map(|inner| Type::Struct(inner.name.clone())).map_err(|_| SUBSET.to_string())
    }
}

fn identifier(text: &str) -> Result<String, String> {
    let is_letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    let right = text.starts_with(is_letter) && text.chars().all(|c| is_letter(c) || c.is_ascii_digit());
    right.then(|| text.to_string()).ok_or_else(|| SUBSET.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Structs::parse(text, "params.h").expect_err("the text breaks a rule").to_string()
    }

    #[test]
    fn fields_are_laid_out_as_c_does() {
        let text = "\
#pragma once
#include <cstdint>

namespace fa2 {

// Not of the struct.

// What TMA
// reads.
struct alignas(64) Map {
    uint64_t words[3];
};

struct Params {
    const float* lse;  // (batch, head)
    int32_t tiles;
    Map map;
    // Above.
    void *o;
    uint32_t counts[2];
    float scale;
};

}  // namespace fa2
";
        let structs = Structs::parse(text, "params.h").expect("the text is right");
        assert_eq!(structs.namespace, "fa2");
        let map = structs.get("Map").expect("it is there");
        assert_eq!((map.size, map.alignment, map.aligned), (64, 64, true));
        assert_eq!(map.docs, ["What TMA", "reads."]);
        let params = structs.get("Params").expect("it is there");
        let fields: Vec<(&str, usize)> =
            params.fields.iter().map(|field| (field.name.as_str(), field.offset)).collect();
        assert_eq!(fields, [("lse", 0), ("tiles", 8), ("map", 64), ("o", 128), ("counts", 136), ("scale", 144)]);
        assert_eq!((params.size, params.alignment, params.aligned), (192, 64, false));
        assert_eq!(params.fields[0].ty, Type::Pointer("const float*".to_string()));
        assert_eq!(params.fields[0].docs, ["(batch, head)"]);
        assert_eq!((&params.fields[3].ty, params.fields[3].docs.len()), (&Type::Pointer("void*".to_string()), 1));
    }

    #[test]
    fn numbers_have_a_value_and_docs() {
        let text =
            "namespace fa2 {\n// Above.\nconstexpr int kGroupRows = 8;  // queries\nconstexpr int kCols = 32;\n}\n";
        let constants = Structs::parse(text, "params.h").expect("the text is right").constants;
        let found: Vec<(&str, usize)> =
            constants.iter().map(|constant| (constant.name.as_str(), constant.value)).collect();
        assert_eq!(found, [("kGroupRows", 8), ("kCols", 32)]);
        assert_eq!(constants[0].docs, ["Above.", "queries"]);
    }

    #[test]
    fn what_is_not_of_the_subset_is_an_error() {
        for line in [
            "int x;",
            "int32_t x, y;",
            "int32_t x = 0;",
            "int32_t x[n];",
            "int32_t x[0];",
            "bool modified;",
            "void f();",
        ] {
            assert_eq!(error(&format!("struct A {{\n    {line}\n}};\n")), format!("params.h:2: {SUBSET}, got {line}"));
        }
        for line in [
            "class A {",
            "using T = int;",
            "struct A;",
            "struct A { int32_t x; };",
            "union A {",
            "constexpr int kRows;",
            "constexpr int kRows = 2 * 4;",
            "constexpr int rows = 8;",
            "constexpr float kScale = 1;",
            "const int kRows = 8;",
        ] {
            assert_eq!(error(line), format!("params.h:1: {SUBSET}, got {line}"));
        }
        assert_eq!(
            error("struct alignas(3) A {"),
            "params.h:1: alignas takes a power of two, got struct alignas(3) A {"
        );
    }

    #[test]
    fn names_are_unique_and_structs_closed() {
        assert_eq!(
            error("struct A {\n    float x;\n    float x;\n};"),
            "params.h:3: the name of a field is used once in a struct, but A has a field x above, got float x;"
        );
        assert_eq!(
            error("struct A {\n};\nstruct A {"),
            "params.h:3: the name of a struct is used once, but there is a struct A above, got struct A {"
        );
        assert_eq!(
            error("constexpr int kRows = 8;\nconstexpr int kRows = 9;"),
            "params.h:2: the name of a number is used once, but there is a kRows above, got constexpr int kRows = 9;"
        );
        assert_eq!(error("struct A {\n    float x;"), "params.h:2: struct A is not closed");
    }
}
