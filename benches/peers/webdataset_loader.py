"""Times open_clip's webdataset loader, with its own training transform, on local shards.

    pip install torch torchvision open_clip_torch webdataset==0.2.86 pandas
    python webdataset_loader.py 'shards/{000..019}.tar' --samples 1920 --workers 2

Ours on the same shards, in the same run:

    train --out out/x --data 'shards/{000..019}.tar' --samples 1920 --batch-size 64 --workers 2 --image-size 224 --load-only

open_clip 3.3.0 needs a webdataset before 0.2.111, whose samples have other names.
"""

import argparse
import time
from types import SimpleNamespace

import open_clip
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    transform = image_transform((args.image_size, args.image_size), is_train=True)
    options = SimpleNamespace(
        train_data=args.shards,
        train_num_samples=args.samples,
        train_data_upsampling_factors=None,
        val_data=None,
        val_num_samples=None,
        dataset_resampled=False,
        seed=0,
        workers=args.workers,
        batch_size=args.batch_size,
        world_size=1,
        rank=0,
        distributed=False,
    )
    loader = get_wds_dataset(options, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader
    begin, pairs, first = time.time(), 0, None
    for images, _ in loader:
        pairs += len(images)
        if first is None:
            first, of_first = time.time(), pairs
    end = time.time()
    later = (pairs - of_first) / (end - first)
    print(f"{pairs} pairs in {end - begin:.1f} s: {pairs / (end - begin):.1f} pairs/s, {later:.1f} after the first batch")


if __name__ == "__main__":
    main()
