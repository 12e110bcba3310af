//! Devices by name, for the command lines of examples, benches and tests.

use burn::tensor::Device;

/// A device that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The name means nothing.
    #[error("`{name}` is no device: expected one of cpu, wgpu, vulkan, metal, cuda, webgpu")]
    Unknown {
        /// The name that was given.
        name: String,
    },
    /// The crate was built without it.
    #[error("device `{name}` is not built in: build with `--features {feature}`")]
    NotBuilt {
        /// The name that was given.
        name: String,
        /// The cargo feature that adds it.
        feature: &'static str,
    },
}

/// `cpu`, `wgpu`, `vulkan`, `metal`, `cuda` or `webgpu`; each but `cpu` needs the cargo feature of its name, `cpu` needs `flex`.
///
/// # Errors
/// When the name means nothing, or the feature is off.
pub(crate) fn device_by_name(name: &str) -> Result<Device, DeviceError> {
    let feature = match name {
        #[cfg(feature = "flex")]
        "cpu" => return Ok(Device::flex()),
        #[cfg(not(feature = "flex"))]
        "cpu" => "flex",
        #[cfg(feature = "wgpu")]
        "wgpu" => return Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(not(feature = "wgpu"))]
        "wgpu" => "wgpu",
        #[cfg(feature = "vulkan")]
        "vulkan" => return Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(not(feature = "vulkan"))]
        "vulkan" => "vulkan",
        #[cfg(feature = "metal")]
        "metal" => return Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(not(feature = "metal"))]
        "metal" => "metal",
        #[cfg(feature = "cuda")]
        "cuda" => return Ok(Device::cuda(0)),
        #[cfg(not(feature = "cuda"))]
        "cuda" => "cuda",
        #[cfg(feature = "webgpu")]
        "webgpu" => return Ok(Device::webgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(not(feature = "webgpu"))]
        "webgpu" => "webgpu",
        _ => return Err(DeviceError::Unknown { name: name.to_string() }),
    };
    Err(DeviceError::NotBuilt { name: name.to_string(), feature })
}
