//! One memory-mapped safetensors file.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde_json::Value;

use super::decode::{self, Element, RawTensor};
use super::dtype::StoredDType;
use super::host::{HostData, HostTensor};
use crate::error::{Error, Result};
use crate::json;

/// The format's own limit on the header, also kept by the reference implementation.
const LONGEST_HEADER: u64 = 100_000_000;

/// A tensor's place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) dtype: StoredDType,
    pub(crate) shape: Vec<usize>,
    /// Bytes of the file.
    range: Range<usize>,
}

/// A safetensors file whose header has been checked.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    map: Mmap,
    pub(crate) entries: BTreeMap<String, Entry>,
}

impl Shard {
    /// Maps a file and checks its header; no tensor data is touched.
    pub(crate) fn open(path: &Path) -> Result<Shard> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let length = file.metadata().map_err(Error::io(path, "open"))?.len();
        if length < 8 {
            return Err(header_error(
                path,
                format!("the file has {length} bytes, fewer than the 8 of the header's length"),
            ));
        }
        // SAFETY: the map is read-only. Nothing here depends on the bytes staying the same: every access is a copy of
        // plain numbers from a range inside the map, and the header is copied before it is interpreted. Cutting the file
        // while it is mapped would raise SIGBUS, which no reader of mapped files can prevent.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "map"))?;
        let entries = parse_header(path, &map)?;
        Ok(Shard { path: path.to_path_buf(), map, entries })
    }

    /// The bytes of a tensor of this file.
    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.range.clone()]
    }

    /// A tensor of this file in its own float format; `None` for other formats.
    pub(crate) fn float(&self, entry: &Entry) -> Option<HostTensor> {
        let (dtype, shape) = (entry.dtype, entry.shape.clone());
        let raw = RawTensor { dtype, shape: shape.clone(), bytes: self.bytes(entry), scale: None };
        fn decoded<T: Element>(raw: &RawTensor<'_>) -> Vec<T> {
            let mut values = vec![T::default(); raw.shape.iter().product()];
            decode::decode(raw, &mut values);
            values
        }
        let data = match dtype {
            StoredDType::F32 => HostData::F32(decoded(&raw)),
            StoredDType::BF16 => HostData::BF16(decoded(&raw)),
            StoredDType::F16 => HostData::F16(decoded(&raw)),
            _ => return None,
        };
        Some(HostTensor { shape, data })
    }
}

fn header_error(path: &Path, problem: impl Into<String>) -> Error {
    Error::Header { file: path.to_path_buf(), problem: problem.into() }
}

/// Parses and checks the header of a file.
fn parse_header(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let error = |problem: String| header_error(path, problem);
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(error(format!(
            "the file has {} bytes, fewer than the 8 of the header's length",
            bytes.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER {
        return Err(error(format!(
            "the header claims {length} bytes, over the format's limit of {LONGEST_HEADER}"
        )));
    }
    let length = length as usize;
    if length > rest.len() {
        return Err(error(format!(
            "the header claims {length} bytes, but only {} follow; the file is truncated",
            rest.len()
        )));
    }
    let header = match json::parse(path, &rest[..length]) {
        Ok(Value::Object(header)) => header,
        Ok(_) => return Err(error("the header is not a JSON object".into())),
        Err(Error::Json { problem, .. }) => return Err(error(format!("the header is not JSON: {problem}"))),
        Err(other) => return Err(other),
    };
    let data = rest.len() - length;
    let start = 8 + length;
    let mut entries = BTreeMap::new();
    for (key, value) in header {
        if key == "__metadata__" {
            continue;
        }
        let (dtype, shape, range) =
            parse_entry(&value).map_err(|problem| error(format!("tensor `{key}`: {problem}")))?;
        if range.end > data {
            return Err(error(format!(
                "tensor `{key}` ends at byte {} of the data, but the file has {data}; it is truncated",
                range.end
            )));
        }
        entries.insert(key, Entry { dtype, shape, range: start + range.start..start + range.end });
    }
    check_cover(&entries, start, data).map_err(error)?;
    Ok(entries)
}

fn parse_entry(value: &Value) -> std::result::Result<(StoredDType, Vec<usize>, Range<usize>), String> {
    let numbers = |key: &str| -> std::result::Result<Vec<usize>, String> {
        let list = value.get(key).and_then(Value::as_array).ok_or_else(|| format!("no list `{key}`"))?;
        list.iter()
            .map(|number| {
                number.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or(format!("`{key}` holds {number}"))
            })
            .collect()
    };
    let name = value.get("dtype").and_then(Value::as_str).ok_or("no string `dtype`")?;
    let dtype = StoredDType::from_name(name).ok_or_else(|| format!("unknown dtype {name}"))?;
    let shape = numbers("shape")?;
    let &[start, end] = numbers("data_offsets")?.as_slice() else {
        return Err("`data_offsets` needs two numbers".into());
    };
    if end < start {
        return Err(format!("its data ends at {end}, before its start at {start}"));
    }
    let size = shape
        .iter()
        .try_fold(dtype.size(), |product, &size| product.checked_mul(size))
        .ok_or_else(|| format!("shape {shape:?} overflows"))?;
    if size != end - start {
        return Err(format!("shape {shape:?} of {dtype} needs {size} bytes, its data has {}", end - start));
    }
    Ok((dtype, shape, start..end))
}

/// The tensors must cover the data exactly once, as the reference implementation demands.
fn check_cover(
    entries: &BTreeMap<String, Entry>,
    start: usize,
    data: usize,
) -> std::result::Result<(), String> {
    let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
    let mut covered = start;
    for (key, entry) in order {
        if entry.range.start < covered {
            return Err(format!("tensor `{key}` overlaps the one before it"));
        }
        if entry.range.start > covered {
            return Err(format!(
                "{} bytes before tensor `{key}` belong to no tensor",
                entry.range.start - covered
            ));
        }
        covered = entry.range.end;
    }
    match start + data - covered {
        0 => Ok(()),
        spare => Err(format!("{spare} bytes at the end belong to no tensor")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}"#;

    #[test]
    fn a_good_header_is_read() {
        let entries = parse_header(Path::new("m"), &file(GOOD, 26)).unwrap();
        assert_eq!(entries["a"].shape, [2, 3]);
        assert_eq!(entries["b"].dtype, StoredDType::BF16);
        assert_eq!(entries["b"].range.len(), 2);
    }

    #[test]
    fn any_cut_is_an_error() {
        let whole = file(GOOD, 26);
        for length in 0..whole.len() {
            assert!(parse_header(Path::new("m"), &whole[..length]).is_err(), "cut at {length}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_header(Path::new("m"), &bytes);
        }

        #[test]
        fn changed_bytes_never_give_ranges_outside_the_file(position in 0usize..200, value: u8) {
            let mut bytes = file(GOOD, 26);
            let position = position % bytes.len();
            bytes[position] = value;
            if let Ok(entries) = parse_header(Path::new("m"), &bytes) {
                for entry in entries.values() {
                    prop_assert!(entry.range.end <= bytes.len());
                    let size: usize = entry.shape.iter().product();
                    prop_assert_eq!(size * entry.dtype.size(), entry.range.len());
                }
            }
        }

        #[test]
        fn offsets_that_do_not_fit_are_errors(start in 0u64.., end in 0u64.., size in 0u64..) {
            let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{size}],"data_offsets":[{start},{end}]}}}}"#);
            let fits = start == 0 && end == 24 && size == 6;
            prop_assert_eq!(parse_header(Path::new("m"), &file(&header, 24)).is_ok(), fits);
        }
    }
}
