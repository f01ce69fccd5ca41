//! Small safetensors files that commands read and write.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::{Error, Result};

/// A file of named tensors, in memory.
pub(crate) struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// A tensor that was read: sizes of the axes and the values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array<T> {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<T>,
}

impl TensorFile {
    /// Reads a file whose tensors must have names from `known`.
    ///
    /// # Errors
    /// When the file cannot be read, is malformed, or holds another name.
    pub(crate) fn read(path: &Path, known: &[&str]) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::unreadable(path, &source))?;
        let file = TensorFile { path: path.to_owned(), bytes };
        let mut names: Vec<String> = file.open()?.names().into_iter().map(str::to_owned).collect();
        names.sort();
        if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(file
                .error(name, "is not an input of this command")
                .with_hint(format!("the inputs are {}", known.join(", "))));
        }
        Ok(file)
    }

    /// An i64 tensor, if it is there.
    pub(crate) fn i64(&self, name: &str) -> Result<Option<Array<i64>>> {
        let read = |bytes: &[u8]| {
            bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
        };
        self.get(name, Dtype::I64, read)
    }

    /// An f32 tensor, if it is there.
    pub(crate) fn f32(&self, name: &str) -> Result<Option<Array<f32>>> {
        let read = |bytes: &[u8]| {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
        };
        self.get(name, Dtype::F32, read)
    }

    fn get<T>(&self, name: &str, dtype: Dtype, read: impl Fn(&[u8]) -> Vec<T>) -> Result<Option<Array<T>>> {
        let Ok(view) = self.open()?.tensor(name) else { return Ok(None) };
        if view.dtype() != dtype {
            return Err(self
                .error(name, &format!("is stored as {:?}, expected {dtype:?}", view.dtype()))
                .with_hint(format!("store it as {dtype:?}")));
        }
        Ok(Some(Array { shape: view.shape().to_vec(), values: read(view.data()) }))
    }

    /// An error about one tensor of this file.
    pub(crate) fn error(&self, name: &str, problem: &str) -> Error {
        Error::input(
            format!("{}: tensor `{name}` {problem}", self.path.display()),
            "`mistral4 forward --help` describes the inputs",
        )
    }

    /// An error about the file as a whole.
    pub(crate) fn missing(&self, name: &str, purpose: &str) -> Error {
        Error::input(
            format!("{}: there is no tensor `{name}`, {purpose}", self.path.display()),
            format!("add `{name}`; `mistral4 forward --help` describes the inputs"),
        )
    }

    fn open(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|error| {
            Error::input(
                format!("{}: malformed safetensors file: {error}", self.path.display()),
                "the file may be cut off; write it again",
            )
        })
    }
}

/// Values of a tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit integers.
    I64(Vec<i64>),
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedArray {
    /// Its key in the file.
    pub name: String,
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub values: Values,
}

impl NamedArray {
    /// A tensor of f32 values.
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        NamedArray { name: name.into(), shape: shape.into(), values: Values::F32(values) }
    }

    /// A tensor of i64 values.
    pub fn i64(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: Vec<i64>) -> Self {
        NamedArray { name: name.into(), shape: shape.into(), values: Values::I64(values) }
    }
}

/// Writes tensors to a temporary file beside `path`, then puts it in place, so that no reader ever sees half a file.
pub(crate) fn write(path: &Path, arrays: &[NamedArray]) -> Result<()> {
    let views = arrays.iter().map(|array| {
        let (dtype, bytes): (Dtype, &[u8]) = match &array.values {
            Values::F32(values) => (Dtype::F32, bytemuck::cast_slice(values)),
            Values::I64(values) => (Dtype::I64, bytemuck::cast_slice(values)),
        };
        let view = TensorView::new(dtype, array.shape.clone(), bytes);
        (array.name.as_str(), view.expect("the values fill the shape"))
    });
    let bytes = safetensors::serialize(views, None).map_err(|error| {
        Error::failed(
            format!("{}: cannot write: {error}", path.display()),
            "this is a defect; please report it",
        )
    })?;
    write_file(path, &bytes)
}

/// Writes a file under a temporary name in the same folder, then renames it.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        // The file may not be there; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
        Error::unwritable(path, &source)
    })
}
