//! An optimizer's states in a safetensors file, one in memory at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Shape, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::disk::Disk;
use crate::error::{Error, Result};
use crate::optim::StateTensor;

/// What a header says of one tensor.
#[derive(Serialize, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// A tensor to write.
pub(super) struct Named<'a> {
    /// Its key.
    pub(super) key: &'a str,
    /// Its whole shape.
    pub(super) shape: Vec<usize>,
    /// Type of its values.
    pub(super) dtype: DType,
}

/// The dtypes of states: names in the file, bytes of a value.
const DTYPES: [(&str, DType, u64); 3] =
    [("F32", DType::F32, 4), ("BF16", DType::BF16, 2), ("U8", DType::U8, 1)];

const _: () =
    assert!(cfg!(target_endian = "little"), "safetensors are little-endian, and so are the tensors here");

/// A file of f32, bf16 and u8 tensors, which every rank writes its parts of.
pub(super) struct StateFile {
    path: PathBuf,
    /// Length of the header, and the header.
    head: Vec<u8>,
    /// Where each tensor begins, and the bytes of a value, by key.
    places: BTreeMap<String, (u64, usize)>,
}

/// What a rank writes of a tensor: its key, where the values lie in it, flat, and their bytes.
pub(super) type StatePart = (String, Vec<Range<usize>>, Vec<u8>);

impl StateFile {
    /// A file of these tensors, the same on every rank.
    pub(super) fn new(path: PathBuf, tensors: &[Named<'_>]) -> Self {
        let mut entries = serde_json::Map::new();
        let mut places = BTreeMap::new();
        let mut end = 0;
        for Named { key, shape, dtype } in tensors {
            let &(name, _, size) =
                DTYPES.iter().find(|entry| entry.1 == *dtype).expect("states are f32, bf16 or u8");
            let start = end;
            end += size * shape.iter().product::<usize>() as u64;
            let entry = Entry { dtype: name.to_owned(), shape: shape.clone(), data_offsets: [start, end] };
            entries.insert((*key).to_owned(), serde_json::to_value(entry).expect("an entry is plain JSON"));
            places.insert((*key).to_owned(), (start, size as usize));
        }
        let mut header = serde_json::Value::Object(entries).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        Self { path, head, places }
    }

    /// Makes the file with its header, on one rank, before any rank writes its parts.
    pub(super) fn create(&self, disk: &Disk) -> Result<()> {
        disk.write(&self.path, &self.head)
    }

    /// Writes parts, one in memory at a time, and brings them to the medium.
    pub(super) fn write(&self, disk: &Disk, parts: impl Iterator<Item = StatePart>) -> Result<()> {
        let mut file = disk.open(&self.path)?;
        for (key, runs, bytes) in parts {
            let (start, size) = self.places[&key];
            let values = runs.iter().map(Range::len).sum::<usize>();
            assert_eq!(bytes.len(), size * values, "the bytes of `{key}`");
            let mut rest = &bytes[..];
            for run in runs {
                let (bytes, after) = rest.split_at(size * run.len());
                file.write_at(self.head.len() as u64 + start + (size * run.start) as u64, bytes)?;
                rest = after;
            }
        }
        file.finish()
    }
}

/// Says which values of a tensor are read, given its key and number of values; `None`: it is left out.
pub(super) type Runs<'a> = dyn Fn(&str, usize) -> Option<Vec<Range<usize>>> + 'a;

/// Reads the values of every tensor that `runs` names, given its key and number of values, flat; `None`: the tensor is
/// left out.
///
/// # Errors
/// A file that is missing, cut short or not what [`StateFile`] writes, with the tensor's key.
pub(super) fn read(path: &Path, device: &Device, runs: &Runs<'_>) -> Result<BTreeMap<String, StateTensor>> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    let damaged = |message: String| Error::Damaged { path: path.to_owned(), message };
    let mut file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    if size < 8 {
        return Err(damaged(format!("{size} bytes are no safetensors file")));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > size - 8 {
        return Err(damaged(format!("the header should have {length} bytes, the file has {size}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(unreadable)?;
    let header: BTreeMap<String, Entry> =
        serde_json::from_slice(&header).map_err(|error| damaged(format!("the header: {error}")))?;
    let data = 8 + length;
    let mut tensors = BTreeMap::new();
    for (key, Entry { dtype, shape, data_offsets: [start, end] }) in header {
        let known = DTYPES.iter().find(|entry| entry.0 == dtype);
        let count = shape.iter().try_fold(1u64, |count, &size| count.checked_mul(size as u64));
        let bytes = count.and_then(|count| count.checked_mul(known?.2));
        let (Some(&(_, dtype, _)), Some(count), true) =
            (known, count, end.checked_sub(start) == bytes && end <= size - data)
        else {
            return Err(damaged(format!(
                "`{key}` ({dtype}, {shape:?}, bytes {start} to {end}) does not fit a file with {} bytes of data",
                size - data
            )));
        };
        let Some(runs) = runs(&key, count as usize) else { continue };
        // One read over all runs: columns lie close together.
        let span = runs.first().map_or(0, |run| run.start)..runs.last().map_or(0, |run| run.end);
        let size = dtype.size();
        let mut bytes = vec![0; size * span.len()];
        file.seek(SeekFrom::Start(data + start + (size * span.start) as u64)).map_err(unreadable)?;
        file.read_exact(&mut bytes).map_err(unreadable)?;
        let place = |run: &Range<usize>| size * (run.start - span.start)..size * (run.end - span.start);
        let kept: Vec<u8> = match runs.len() {
            1 => bytes,
            _ => runs.iter().flat_map(|run| bytes[place(run)].iter().copied()).collect(),
        };
        let values = TensorData::from_bytes_vec(
            kept,
            Shape::from([runs.iter().map(Range::len).sum::<usize>()]),
            dtype,
        );
        let values = match dtype {
            DType::U8 => StateTensor::Codes(Tensor::from_data(values, (device, dtype))),
            _ => StateTensor::Float(Tensor::from_data(values, (device, dtype))),
        };
        tensors.insert(key, values);
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use std::iter::once;

    use half::bf16;

    use super::*;

    fn written(path: &Path) -> Vec<f32> {
        let values = vec![1.5, -0.0, f32::MIN_POSITIVE / 2.0, 3.0, 4.0, 5.0];
        let tensor = Tensor::from_data(TensorData::new(values.clone(), [6]), (&Device::flex(), DType::F32));
        let codes =
            Tensor::from_data(TensorData::new(vec![0u8, 127, 255], [3]), (&Device::flex(), DType::U8));
        let states = [
            StateTensor::Float(tensor.clone()),
            StateTensor::Float(tensor.clone().slice(0..0)),
            StateTensor::Codes(codes),
            StateTensor::Float(tensor.cast(DType::BF16)),
        ];
        let named = |key, shape: &[usize], index: usize| Named {
            key,
            shape: shape.to_vec(),
            dtype: states[index].dtype(),
        };
        let tensors =
            [named("a.weight", &[2, 3], 0), named("b", &[0], 1), named("c", &[3], 2), named("d", &[6], 3)];
        let file = StateFile::new(path.to_owned(), &tensors);
        file.create(&Disk::default()).unwrap();
        // Two ranks, the last one first: whole tensors, and halves of one.
        let part = |index: usize, runs: &[Range<usize>]| {
            let (key, data) = (tensors[index].key.to_owned(), states[index].to_data());
            let size = data.dtype().size();
            let bytes =
                runs.iter().flat_map(|run| data.as_bytes()[size * run.start..size * run.end].to_vec());
            (key, runs.to_vec(), bytes.collect())
        };
        for parts in [
            vec![part(0, &[1..3, 5..6]), part(3, &[0..2, 2..6])],
            vec![part(0, &[0..1, 3..5]), part(1, &[]), part(2, &[0..1, 1..3])],
        ] {
            file.write(&Disk::default(), parts.into_iter()).unwrap();
        }
        values
    }

    #[test]
    fn values_return_bit_for_bit_and_other_readers_see_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let values = written(&path);
        let back = read(&path, &Device::flex(), &|_, count| Some(once(0..count).collect())).unwrap();
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let data = back["a.weight"].to_data();
        assert_eq!(bits(data.as_slice::<f32>().unwrap()), bits(&values));
        assert!(back["b"].is_empty());
        assert_eq!(back["c"].to_data().as_slice::<u8>().unwrap(), [0, 127, 255]);
        assert_eq!(back["d"].dtype(), DType::BF16);
        assert_eq!(back["d"].to_data().as_slice::<bf16>().unwrap()[..2], [1.5, -0.0].map(bf16::from_f32));
        let part =
            read(&path, &Device::flex(), &|_, count| Some(once(count / 3..count / 2).collect())).unwrap();
        assert_eq!(bits(part["a.weight"].to_data().as_slice::<f32>().unwrap()), bits(&values[2..3]));
        let bytes = std::fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a.weight").unwrap().shape(), [2, 3]);
    }

    #[test]
    fn a_file_cut_short_anywhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        written(&path);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = read(&path, &Device::flex(), &|_, count| Some(once(0..count).collect())).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{length} bytes: {error}");
        }
    }
}
