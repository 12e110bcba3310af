//! Weights that PyTorch pickled into a zip file, read without running anything that is in them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use pytorch_reader::{DType, PytorchReader, Tensor};
use safetensors::Dtype;

use super::CheckpointError;

/// Bytes of the longest list of tensors that is read; that of a ViT-L/14 has 100 kB, and its reader takes some eighty times as much.
const LONGEST_PICKLE: u64 = 2 << 20;

/// Bytes of the end of a zip file in which its list of files is looked for.
const LONGEST_LIST: u64 = 1 << 20;

/// Where training programs put the weights beside other things.
const STATE_DICTS: [&str; 3] = ["state_dict.", "model_state_dict.", MODEL];

/// What a wrapper of the model may put in front of its weights, too, and not of all: others of a CLIP then stand beside them.
const MODEL: &str = "model.";
const OF_CLIPS: [&str; 8] = [
    "logit_scale",
    "text_projection",
    "positional_embedding",
    "token_embedding.",
    "transformer.",
    "visual.",
    "text_model.",
    "vision_model.",
];

/// The tensors of a file.
pub(crate) struct Pickle {
    tensors: BTreeMap<String, Tensor>,
}

/// Whether a file that begins so is a pickle of PyTorch: in a zip file since version 1.6, bare before.
pub(crate) fn is_pickle(start: &[u8]) -> bool {
    let is_safetensors = start.get(8) == Some(&b'{');
    start.starts_with(ZIP) || (!is_safetensors && matches!(start, [0x80, 2..=5, ..]))
}

const ZIP: &[u8] = b"PK\x03\x04";

impl Pickle {
    /// `start` is what the file begins with.
    pub(crate) fn open(path: &Path, start: &[u8]) -> Result<Self, CheckpointError> {
        let bad = |reason: String| {
            let reason = format!("{reason}; {}", as_safetensors(path));
            CheckpointError::Pickle { path: path.to_path_buf(), reason }
        };
        if !start.starts_with(ZIP) {
            return Err(bad("it was written by PyTorch before 1.6, or without a zip file, which is not read".into()));
        }
        let mut file = File::open(path).map_err(CheckpointError::io(path))?;
        let size = file.metadata().map_err(CheckpointError::io(path))?.len();
        if is_torch_script(&mut file, size).map_err(CheckpointError::io(path))? {
            return Err(torch_script(path));
        }
        let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|error| bad(error.to_string()))?;
        for index in 0..archive.len() {
            let read = |error: zip::result::ZipError| bad(error.to_string());
            let entry = archive.by_index_raw(index).map_err(read)?;
            let (name, bytes) = (entry.name().map_err(read)?, entry.size());
            // The weights lie apart, in `data/`.
            if name.ends_with(".pkl") && bytes > LONGEST_PICKLE {
                return Err(bad(format!("its {name} has {bytes} bytes; at most {LONGEST_PICKLE} are read")));
            }
        }
        let reader = PytorchReader::new(path).map_err(|error| bad(error.to_string()))?;
        let tensors: BTreeMap<String, Tensor> = reader.into_tensors().into_iter().collect();
        let is_of_clip = |name: &String| OF_CLIPS.iter().any(|start| name.starts_with(start));
        let holds = |prefix: &str| {
            tensors.keys().any(|name| name.starts_with(prefix)) && (prefix != MODEL || !tensors.keys().any(is_of_clip))
        };
        let prefix = STATE_DICTS.into_iter().find(|prefix| holds(prefix));
        let tensors = match prefix {
            None => tensors,
            Some(prefix) => tensors.into_iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_string(), t))).collect(),
        };
        // A tensor may claim to repeat a few numbers as often as it likes; one that PyTorch saves is in the file as a whole.
        let claimed = tensors.values().fold(0usize, |sum, tensor| sum.saturating_add(tensor.byte_len()));
        if claimed as u64 > size {
            return Err(bad(format!("its tensors have {claimed} bytes, but the file has {size}")));
        }
        Ok(Self { tensors })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    pub(crate) fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.tensors.get(name).map(|tensor| (dtype(tensor.dtype()), tensor.shape()))
    }

    /// The bytes of a tensor that is there.
    pub(crate) fn read(&self, path: &Path, name: &str) -> Result<Vec<u8>, CheckpointError> {
        self.tensors[name].read().map_err(CheckpointError::io(path))
    }
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::Bool => Dtype::BOOL,
    }
}

/// Whether the list of files at the end of a zip file has one that only programs of TorchScript have. Not every reader of zip files reads theirs.
fn is_torch_script(file: &mut File, size: u64) -> io::Result<bool> {
    const NAME: &[u8] = b"/constants.pkl";
    let mut end = Vec::new();
    file.seek(SeekFrom::Start(size.saturating_sub(LONGEST_LIST)))?;
    file.take(LONGEST_LIST).read_to_end(&mut end)?;
    file.rewind()?;
    Ok(end.windows(NAME.len()).any(|name| name == NAME))
}

/// What is said of a program of TorchScript, as OpenAI publishes its models: its weights have to be taken out by PyTorch.
fn torch_script(path: &Path) -> CheckpointError {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let reason = format!(
        "it is a TorchScript archive, as OpenAI's are; write its weights alone, in Python: `import torch; \
         d = torch.jit.load(\"{name}\", map_location=\"cpu\").state_dict(); torch.save(d, \"weights.pt\")`, and put that file in its place"
    );
    CheckpointError::Pickle { path: path.to_path_buf(), reason }
}

/// How to write the weights so that they can be read.
fn as_safetensors(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The names under which weights are looked for; a shard's is up to its index.
    let target = match &*name {
        "pytorch_model.bin" => "model",
        name if name.starts_with("open_clip_pytorch_model") => "open_clip_model",
        _ => return "write its state dict again with `safetensors.torch.save_file`, in Python".to_string(),
    };
    format!(
        "write it again as safetensors, in Python: `from safetensors.torch import save_file; import torch; \
         d = torch.load(\"{name}\", weights_only=True); d = d.get(\"state_dict\", d); \
         save_file({{k: v.clone() for k, v in d.items()}}, \"{target}.safetensors\", {{\"format\": \"pt\"}})`"
    )
}
