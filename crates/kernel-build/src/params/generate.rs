//! Generates code from the structs: Rust, assertions for nvcc, and a description for tune.py.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Constant, Field, Struct, Structs, Type};
use crate::json::Json;

impl Structs {
    /// The structs in Rust, with the comments of the header and an assertion for each size, alignment and offset. A pointer is a
    /// `CUdeviceptr`, which must be in scope.
    pub fn rust(&self) -> String {
        self.structs.iter().map(|item| item.rust() + &item.rust_asserts()).collect()
    }

    /// The constants in Rust, with the comments of the header.
    pub fn rust_constants(&self) -> String {
        self.constants.iter().map(Constant::rust).collect()
    }

    /// Assertions for nvcc on the layout of the structs in `names`, and of the structs that they contain.
    pub fn cuda_asserts<'a>(&'a self, names: impl IntoIterator<Item = &'a str>) -> String {
        let mut found = BTreeSet::new();
        names.into_iter().for_each(|name| self.reach(name, &mut found));
        let structs = self.structs.iter().filter(|item| found.contains(item.name.as_str()));
        structs.map(|item| item.cuda_asserts(&self.namespace)).collect()
    }

    /// All structs by name, for a program that fills them field by field.
    pub fn json(&self) -> Json {
        Json::object(self.structs.iter().map(|item| (item.name.as_str(), item.json())))
    }

    /// All constants by name.
    pub fn json_constants(&self) -> Json {
        Json::object(self.constants.iter().map(|constant| (constant.name.as_str(), Json::from(constant.value))))
    }

    /// Adds a struct to `found`, and the structs that it contains.
    fn reach<'a>(&'a self, name: &'a str, found: &mut BTreeSet<&'a str>) {
        found.insert(name);
        for item in self.structs.iter().filter(|item| item.name == name) {
            for field in &item.fields {
                if let Type::Struct(inner) = &field.ty {
                    self.reach(inner, found);
                }
            }
        }
    }
}

impl Constant {
    fn rust(&self) -> String {
        let mut text = String::from("\n");
        docs(&mut text, "", &self.docs);
        let _ = writeln!(text, "pub const {}: usize = {};", self.rust_name(), self.value);
        text
    }

    /// `GROUP_ROWS` for `kGroupRows`.
    fn rust_name(&self) -> String {
        let mut name = String::new();
        for c in self.name[1..].chars() {
            if c.is_ascii_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(c.to_ascii_uppercase());
        }
        name
    }
}

impl Struct {
    fn rust(&self) -> String {
        let mut text = String::from("\n");
        docs(&mut text, "", &self.docs);
        let align = if self.aligned { format!(", align({})", self.alignment) } else { String::new() };
        let _ = writeln!(text, "#[repr(C{align})]\n#[derive(Clone, Copy, Debug)]\npub struct {} {{", self.name);
        for field in &self.fields {
            docs(&mut text, "    ", &field.docs);
            let _ = writeln!(text, "    pub {}: {},", field.name, field.rust_type());
        }
        text + "}\n"
    }

    fn rust_asserts(&self) -> String {
        let Self { name, size, alignment, .. } = self;
        let mut text = format!(
            "const _: () = {{\n    assert!(size_of::<{name}>() == {size} && align_of::<{name}>() == {alignment});\n"
        );
        for Field { name: field, offset, .. } in &self.fields {
            let _ = writeln!(text, "    assert!(std::mem::offset_of!({name}, {field}) == {offset});");
        }
        text + "};\n"
    }

    fn cuda_asserts(&self, namespace: &str) -> String {
        let Self { name, size, alignment, .. } = self;
        let path = format!("{namespace}::{name}");
        let mut text = format!("\nstatic_assert(sizeof({path}) == {size}, \"{name}\");\n");
        let _ = writeln!(text, "static_assert(alignof({path}) == {alignment}, \"{name}\");");
        for Field { name: field, offset, .. } in &self.fields {
            let _ = writeln!(text, "static_assert(offsetof({path}, {field}) == {offset}, \"{name}::{field}\");");
        }
        text
    }

    fn json(&self) -> Json {
        let fields = self.fields.iter().map(|field| {
            let mut members = vec![("name", Json::from(field.name.as_str()))];
            members.push(match &field.ty {
                Type::Scalar(scalar) => ("type", Json::from(scalar.rust)),
                Type::Pointer(_) => ("type", Json::from("pointer")),
                Type::Struct(name) => ("struct", Json::from(name.as_str())),
            });
            members.push(("offset", Json::from(field.offset)));
            members.extend(field.count.map(|count| ("count", Json::from(count))));
            Json::object(members)
        });
        Json::object([("size", Json::from(self.size)), ("fields", Json::Array(fields.collect()))])
    }
}

impl Field {
    fn rust_type(&self) -> String {
        let element = match &self.ty {
            Type::Scalar(scalar) => scalar.rust,
            Type::Pointer(_) => "CUdeviceptr",
            Type::Struct(name) => name,
        };
        match self.count {
            None => element.to_string(),
            Some(count) => format!("[{element}; {count}]"),
        }
    }
}

/// Writes comments as documentation. It escapes brackets, which would be links and tags there.
fn docs(text: &mut String, indent: &str, lines: &[String]) {
    for line in lines {
        let _ = writeln!(text, "{indent}/// {}", line.replace('[', "\\[").replace('<', "\\<"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn structs() -> Structs {
        let text = "\
namespace fa2 {
struct alignas(64) Map {
    uint64_t words[2];
};
// Arguments of one <call>.
struct Params {
    const float* lse;  // (batch, num_heads)
    Map map;
    int32_t tiles;
};
struct Outer {
    Params inner;
};
struct Other {
    float scale;
};
}
";
        Structs::parse(text, "params.h").expect("the text is right")
    }

    #[test]
    fn rust_has_the_fields_their_comments_and_the_layout() {
        let rust = structs().rust();
        let params = "
/// Arguments of one \\<call>.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// (batch, num_heads)
    pub lse: CUdeviceptr,
    pub map: Map,
    pub tiles: i32,
}
const _: () = {
    assert!(size_of::<Params>() == 192 && align_of::<Params>() == 64);
    assert!(std::mem::offset_of!(Params, lse) == 0);
    assert!(std::mem::offset_of!(Params, map) == 64);
    assert!(std::mem::offset_of!(Params, tiles) == 128);
};
";
        assert!(rust.contains(params), "{rust}");
        assert!(rust.contains(
            "#[repr(C, align(64))]\n#[derive(Clone, Copy, Debug)]\npub struct Map {\n    pub words: [u64; 2],\n}"
        ));
    }

    #[test]
    fn nvcc_asserts_a_struct_and_what_it_contains() {
        let asserts = structs().cuda_asserts(["Outer"]);
        assert!(
            asserts.contains("static_assert(offsetof(fa2::Params, tiles) == 128, \"Params::tiles\");"),
            "{asserts}"
        );
        assert!(asserts.contains("static_assert(alignof(fa2::Map) == 64, \"Map\");"), "{asserts}");
        assert!(!asserts.contains("Other"), "{asserts}");
    }

    #[test]
    fn constants_have_the_names_of_each_language() {
        let text = "namespace fa2 {\nconstexpr int kGroupRows = 8;  // queries\nconstexpr int kCols = 32;\n}\n";
        let structs = Structs::parse(text, "params.h").expect("the text is right");
        assert_eq!(
            structs.rust_constants(),
            "\n/// queries\npub const GROUP_ROWS: usize = 8;\n\npub const COLS: usize = 32;\n"
        );
        assert_eq!(structs.json_constants().to_string(), "{\"kGroupRows\": 8, \"kCols\": 32}");
    }

    #[test]
    fn json_has_types_and_offsets() {
        let json = structs().json().to_string();
        let params =
            "\"Params\": {\"size\": 192, \"fields\": [{\"name\": \"lse\", \"type\": \"pointer\", \"offset\": 0}, \
                      {\"name\": \"map\", \"struct\": \"Map\", \"offset\": 64}, ";
        assert!(json.contains(params), "{json}");
        assert!(json.contains("{\"name\": \"words\", \"type\": \"u64\", \"offset\": 0, \"count\": 2}"), "{json}");
    }
}
