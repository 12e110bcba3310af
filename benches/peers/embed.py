"""Images a second through open_clip: decoding and preprocessing alone, and with the embedding.

    python embed.py --model clip-openclip-vit-b-32 --images FOLDER [--batch 32]

`--model` is a folder with open_clip_config.json and open_clip_model.safetensors. Preprocessing runs in a DataLoader with as many workers as
there are cores. The same through this crate: `cargo run --release --example embed -- --model … --images …`, which prints both rates.
"""

import argparse
import json
import os
import pathlib
import time

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file


class Images(torch.utils.data.Dataset):
    def __init__(self, folder, transform):
        self.paths = sorted(path for path in pathlib.Path(folder).iterdir() if path.suffix in {".jpg", ".jpeg", ".png", ".webp"})
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]))


def rate(loader, count, step):
    start = time.perf_counter()
    for batch in loader:
        step(batch)
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    config = json.loads((args.model / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(args.model / "open_clip_model.safetensors"))
    size = config["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(size, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    images = Images(args.images, transform)
    loader = torch.utils.data.DataLoader(images, batch_size=args.batch, num_workers=os.cpu_count())
    with torch.inference_mode():
        print(f"preprocess {rate(loader, len(images), lambda batch: None):.1f} images a second")
        print(f"embed {rate(loader, len(images), model.encode_image):.1f} images a second")


if __name__ == "__main__":
    main()
