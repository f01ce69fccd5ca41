//! Number formats, stored and in memory.

use std::fmt;

/// Formats in which this library holds weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// 16-bit float.
    F16,
}

/// Formats that a safetensors file can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the variants are the format's own names")]
pub enum StoredDType {
    Bool,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    I64,
    U64,
    F64,
}

const NAMES: &[(StoredDType, &str, usize)] = &[
    (StoredDType::Bool, "BOOL", 1),
    (StoredDType::U8, "U8", 1),
    (StoredDType::I8, "I8", 1),
    (StoredDType::F8E5M2, "F8_E5M2", 1),
    (StoredDType::F8E4M3, "F8_E4M3", 1),
    (StoredDType::F8E8M0, "F8_E8M0", 1),
    (StoredDType::I16, "I16", 2),
    (StoredDType::U16, "U16", 2),
    (StoredDType::F16, "F16", 2),
    (StoredDType::BF16, "BF16", 2),
    (StoredDType::I32, "I32", 4),
    (StoredDType::U32, "U32", 4),
    (StoredDType::F32, "F32", 4),
    (StoredDType::I64, "I64", 8),
    (StoredDType::U64, "U64", 8),
    (StoredDType::F64, "F64", 8),
];

impl StoredDType {
    /// The format of a name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, known, _)| *known == name).map(|(dtype, ..)| *dtype)
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    /// Bytes of one value.
    pub fn size(self) -> usize {
        self.entry().2
    }

    fn entry(self) -> &'static (StoredDType, &'static str, usize) {
        // The table lists the variants in their order.
        &NAMES[self as usize]
    }
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl DType {
    /// The same format in a file.
    pub fn stored(self) -> StoredDType {
        match self {
            DType::F32 => StoredDType::F32,
            DType::BF16 => StoredDType::BF16,
            DType::F16 => StoredDType::F16,
        }
    }

    /// The name of transformers' `dtype` key.
    pub fn torch_name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_variants() {
        for (dtype, name, size) in NAMES {
            assert_eq!((dtype.name(), dtype.size()), (*name, *size));
            assert_eq!(StoredDType::from_name(name), Some(*dtype));
        }
        assert_eq!(StoredDType::from_name("F4"), None);
    }
}
