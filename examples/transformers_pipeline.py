"""A transformers pipeline that clipfast accelerates: one line more, and the same scores.

    pip install transformers
    python examples/transformers_pipeline.py
    python examples/transformers_pipeline.py FOLDER --images a.jpg b.jpg --labels "a cat" "two dogs"

FOLDER is a model as ``hf download openai/clip-vit-base-patch32 --local-dir FOLDER`` leaves it; this downloads nothing.
Without a folder, a small model gets random weights: its scores mean nothing, but they are the same twice.
"""

import argparse
import gzip
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

import clipfast

Scores = list[dict[str, float]]


def write_small_model(folder: str) -> None:
    """Write a CLIP of random weights with its tokenizer and image processor, as published models' folders have them."""
    packed = (files("clipfast.data") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")[1:48895]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    transformers.CLIPTokenizer(vocabulary, merges, model_max_length=77).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=side).save_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=sizes, vision_config=sizes | {"image_size": 64, "patch_size": 16}, projection_dim=128
    )
    transformers.CLIPModel(config).save_pretrained(folder)


def run(classifier: transformers.Pipeline, images: list[Image.Image], labels: list[str]) -> tuple[Scores, float]:
    """Return each picture's scores by label, and the seconds of a second call; the first one warms up."""
    classifier(images, candidate_labels=labels)
    start = time.perf_counter()
    found = classifier(images, candidate_labels=labels)
    seconds = time.perf_counter() - start
    return [{entry["label"]: entry["score"] for entry in scores} for scores in found], seconds


def main() -> None:
    """Run the pipeline as it is and accelerated, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a model's folder")
    parser.add_argument("--images", nargs="+", type=Path, help="files; by default pictures of one colour")
    parser.add_argument("--labels", nargs="+", default=["a red wall", "a green meadow", "the blue sky above the sea"])
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = [Image.new("RGB", (640, 480), color) for color in ("red", "green", "blue")]
    if args.images:
        images = [Image.open(path) for path in args.images]

    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            write_small_model(temporary)
        dtype = getattr(torch, args.dtype)
        classifier = transformers.pipeline("zero-shot-image-classification", args.folder or temporary, dtype=dtype)
    plain, plain_seconds = run(classifier, images, args.labels)
    clipfast.accelerate(classifier.model)
    accelerated, seconds = run(classifier, images, args.labels)

    print(clipfast.acceleration(classifier.model))
    for number, (mine, theirs) in enumerate(zip(accelerated, plain, strict=True)):
        print(f"picture {number}: " + ", ".join(f"{label} {mine[label]:.3f} ({theirs[label]:.3f})" for label in mine))
    pairs = [(m[label], t[label]) for m, t in zip(accelerated, plain, strict=True) for label in args.labels]
    print(f"accelerated (plain): largest difference {max(abs(m - t) for m, t in pairs):.1e}")
    print(f"{1e3 * seconds:.0f} ms ({1e3 * plain_seconds:.0f} ms)")


if __name__ == "__main__":
    main()
