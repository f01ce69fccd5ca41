//! Writing a model as a checkpoint folder.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::DType;
use mistral4_checkpoint::config::ConfigFile;
use mistral4_checkpoint::weights::{self, HostData, HostTensor, SaveOptions, SaveReport};

use super::NamedTensor;
use crate::error::{Error, Result};
use crate::model::Mistral4;

impl Mistral4 {
    /// Writes the model as a Hugging Face (or native) checkpoint folder.
    ///
    /// # Errors
    /// When weights are quantised in memory, the model cannot be written in this form or the disk fails; what stood in the folder before stays whole.
    pub fn save(&self, folder: &Path, config: &ConfigFile, options: &SaveOptions<'_>) -> Result<SaveReport> {
        let mut parameters: HashMap<String, NamedTensor> =
            self.parameters().into_iter().map(|p| (p.key.clone(), p)).collect();
        weights::save(folder, config, options, |spec| {
            let parameter = parameters.remove(&spec.key).ok_or_else(|| {
                Error::Unsupported(format!("{}: a weight that is quantised in memory is not saved", spec.key))
            })?;
            Ok::<_, Error>(host_tensor(parameter))
        })
    }
}

/// A parameter's values in memory, in its own dtype.
pub fn host_tensor(parameter: NamedTensor) -> HostTensor {
    let NamedTensor { shape, values, .. } = parameter;
    let dtype = values.dtype();
    let data = values.into_data();
    let mismatch = "the tensor's data has the tensor's dtype";
    let data = match dtype {
        DType::BF16 => HostData::BF16(data.try_into_vec().expect(mismatch)),
        DType::F16 => HostData::F16(data.try_into_vec().expect(mismatch)),
        _ => HostData::F32(data.convert::<f32>().try_into_vec().expect(mismatch)),
    };
    HostTensor { shape, data }
}
