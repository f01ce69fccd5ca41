//! `--device`: which backend computes.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;

use crate::error::{Error, Result};

/// A backend of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    Flex,
    /// Any GPU through Vulkan.
    Vulkan,
    /// An NVIDIA GPU by its index.
    Cuda(usize),
    /// An Apple GPU.
    Metal,
    /// An AMD GPU.
    Rocm,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "flex" | "cpu" => Ok(DeviceChoice::Flex),
            "vulkan" => Ok(DeviceChoice::Vulkan),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            "metal" => Ok(DeviceChoice::Metal),
            "rocm" => Ok(DeviceChoice::Rocm),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(DeviceChoice::Cuda)
                .ok_or_else(|| "the devices are flex, vulkan, cuda, cuda:N, metal and rocm".to_owned()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Cuda(0) => f.write_str("cuda"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
            other => f.write_str(other.feature()),
        }
    }
}

impl DeviceChoice {
    /// The cargo feature that compiles the backend in.
    fn feature(self) -> &'static str {
        match self {
            DeviceChoice::Flex => "flex",
            DeviceChoice::Vulkan => "vulkan",
            DeviceChoice::Cuda(_) => "cuda",
            DeviceChoice::Metal => "metal",
            DeviceChoice::Rocm => "rocm",
        }
    }

    /// The device of one of several ranks of a machine, which number `cuda` by their places there.
    pub(crate) fn of_rank(self, local_rank: usize) -> Self {
        match self {
            DeviceChoice::Cuda(first) => DeviceChoice::Cuda(first + local_rank),
            other => other,
        }
    }

    /// Whether computing happens on the CPU.
    pub fn is_cpu(self) -> bool {
        self == DeviceChoice::Flex
    }

    /// The device.
    ///
    /// # Errors
    /// When the backend is not compiled in; the hint says how to build it.
    pub fn open(self) -> Result<Device> {
        match self {
            #[cfg(feature = "flex")]
            DeviceChoice::Flex => Ok(Device::flex()),
            #[cfg(feature = "vulkan")]
            DeviceChoice::Vulkan => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(index) => Ok(Device::cuda(index)),
            #[cfg(feature = "metal")]
            DeviceChoice::Metal => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "rocm")]
            DeviceChoice::Rocm => Ok(Device::rocm(0usize)),
            #[allow(unreachable_patterns, reason = "reachable unless every backend is compiled in")]
            missing => Err(Error::input(
                format!("this program was built without the device `{missing}`"),
                format!(
                    "build it with `cargo build --release -p mistral4-cli --features {}`",
                    missing.feature()
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for name in ["flex", "vulkan", "cuda", "cuda:3", "metal", "rocm"] {
            assert_eq!(name.parse::<DeviceChoice>().unwrap().to_string(), name);
        }
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
        assert!("tpu".parse::<DeviceChoice>().unwrap_err().contains("vulkan"));
    }
}
