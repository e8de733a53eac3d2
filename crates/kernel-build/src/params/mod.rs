//! Parameter structs: parsed from a CUDA header, which is the one place that lists their fields.
//!
//! From it come the `#[repr(C)]` twins in Rust, the assertions on size and offsets for both compilers, and a description that
//! tune.py builds its structs from.

mod generate;
mod parse;

use std::path::Path;

use crate::{files, Error, Result};

/// The structs of a header, each after those that it contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structs {
    /// Where they are in CUDA: `fa2`.
    pub namespace: String,
    /// In the order of the file.
    pub structs: Vec<Struct>,
}

/// A struct, laid out as C does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Struct {
    /// Its name in both languages.
    pub name: String,
    /// The comment above it, a line each.
    pub docs: Vec<String>,
    /// In order.
    pub fields: Vec<Field>,
    /// Bytes, a multiple of the alignment.
    pub size: usize,
    /// Bytes.
    pub alignment: usize,
    /// Whether the alignment is asked for with `alignas`.
    pub aligned: bool,
}

/// A field of a struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name in both languages.
    pub name: String,
    /// The comments above and after it, a line each.
    pub docs: Vec<String>,
    /// Its type, or that of its elements.
    pub ty: Type,
    /// Elements, if it is an array.
    pub count: Option<usize>,
    /// Bytes from the start of the struct.
    pub offset: usize,
}

/// A type that both languages lay out alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// A number.
    Scalar(&'static Scalar),
    /// A device address. The type that it points to is a comment for Rust: `const float*`.
    Pointer(String),
    /// One of the structs of the same header.
    Struct(String),
}

/// A number type.
#[derive(Debug, PartialEq, Eq)]
pub struct Scalar {
    /// In CUDA.
    pub cuda: &'static str,
    /// In Rust.
    pub rust: &'static str,
    /// Size and alignment.
    pub bytes: usize,
}

const SCALARS: [Scalar; 5] = [
    Scalar { cuda: "int32_t", rust: "i32", bytes: 4 },
    Scalar { cuda: "uint32_t", rust: "u32", bytes: 4 },
    Scalar { cuda: "int64_t", rust: "i64", bytes: 8 },
    Scalar { cuda: "uint64_t", rust: "u64", bytes: 8 },
    Scalar { cuda: "float", rust: "f32", bytes: 4 },
];

/// Size and alignment of an address on the device.
const POINTER_BYTES: usize = 8;

impl Structs {
    /// Reads a file.
    ///
    /// # Errors
    /// As [`Self::parse`], or if the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&files::read(path)?, &path.display().to_string())
    }

    /// The struct of a name.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<&Struct> {
        let found = self.structs.iter().find(|item| item.name == name);
        found.ok_or_else(|| {
            let known: Vec<&str> = self.structs.iter().map(|item| item.name.as_str()).collect();
            Error::new(format!("the parameters have no struct {name}; they have {}", known.join(", ")))
        })
    }

    /// Size and alignment of one element of a type.
    fn size_and_alignment(&self, ty: &Type) -> Result<(usize, usize)> {
        Ok(match ty {
            Type::Scalar(scalar) => (scalar.bytes, scalar.bytes),
            Type::Pointer(_) => (POINTER_BYTES, POINTER_BYTES),
            Type::Struct(name) => {
                let inner = self.get(name)?;
                (inner.size, inner.alignment)
            }
        })
    }

    /// Adds a struct after laying it out: each field at the next multiple of its alignment, the whole padded to its own.
    fn push(&mut self, mut item: Struct) -> Result<()> {
        let mut end = 0usize;
        for field in &mut item.fields {
            let (size, alignment) = self.size_and_alignment(&field.ty)?;
            field.offset = end.next_multiple_of(alignment);
            end = field.offset + size * field.count.unwrap_or(1);
            item.alignment = item.alignment.max(alignment);
        }
        item.size = end.next_multiple_of(item.alignment);
        self.structs.push(item);
        Ok(())
    }
}
