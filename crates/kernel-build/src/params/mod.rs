//! Parameter structs and shared numbers, parsed from a CUDA header. Only the header lists their fields and values.
//!
//! The same structs and numbers in Rust, the assertions on sizes and offsets for both compilers, and the description for tune.py are
//! generated from it.

mod generate;
mod parse;

use std::path::Path;

use crate::{files, Error, Result};

/// The structs and constants of a header. A struct comes after the structs that it contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structs {
    /// Their namespace in CUDA: `fa2`.
    pub namespace: String,
    /// The structs, in the order of the file.
    pub structs: Vec<Struct>,
    /// The constants, in the order of the file.
    pub constants: Vec<Constant>,
}

/// A whole number that kernels and host share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constant {
    /// Its name in CUDA: `kGroupRows`.
    pub name: String,
    /// The lines of the comments above it and after it.
    pub docs: Vec<String>,
    /// Its value.
    pub value: usize,
}

/// A struct with the layout of C.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Struct {
    /// Its name in both languages.
    pub name: String,
    /// The lines of the comment above it.
    pub docs: Vec<String>,
    /// Its fields in order.
    pub fields: Vec<Field>,
    /// Size in bytes, a multiple of the alignment.
    pub size: usize,
    /// Alignment in bytes.
    pub alignment: usize,
    /// Whether `alignas` sets the alignment.
    pub aligned: bool,
}

/// A field of a struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name in both languages.
    pub name: String,
    /// The lines of the comments above it and after it.
    pub docs: Vec<String>,
    /// Its type. For an array, the type of an element.
    pub ty: Type,
    /// Number of elements of an array. `None` for other fields.
    pub count: Option<usize>,
    /// Offset in the struct in bytes.
    pub offset: usize,
}

/// A type with the same layout in both languages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// A number.
    Scalar(&'static Scalar),
    /// A device address. In Rust its text, such as `const float*`, has no meaning.
    Pointer(String),
    /// A struct of the same header.
    Struct(String),
}

/// A number type.
#[derive(Debug, PartialEq, Eq)]
pub struct Scalar {
    /// Its name in CUDA.
    pub cuda: &'static str,
    /// Its name in Rust.
    pub rust: &'static str,
    /// Size and alignment in bytes.
    pub bytes: usize,
}

const SCALARS: [Scalar; 5] = [
    Scalar { cuda: "int32_t", rust: "i32", bytes: 4 },
    Scalar { cuda: "uint32_t", rust: "u32", bytes: 4 },
    Scalar { cuda: "int64_t", rust: "i64", bytes: 8 },
    Scalar { cuda: "uint64_t", rust: "u64", bytes: 8 },
    Scalar { cuda: "float", rust: "f32", bytes: 4 },
];

/// Size and alignment of a device address in bytes.
const POINTER_BYTES: usize = 8;

impl Structs {
    /// Reads a file.
    ///
    /// # Errors
    /// As [`Self::parse`], or if the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&files::read(path)?, &path.display().to_string())
    }

    /// The struct with this name.
    ///
    /// # Errors
    /// If there is no such struct.
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

    /// Computes the layout of a struct and adds it. Each field starts at the next multiple of its alignment. The size is a multiple of
    /// the alignment of the struct.
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
