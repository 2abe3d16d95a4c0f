"""Fine-tune an open_clip model on handwritten digits with ``clipfast.accelerate`` and ``clipfast.ContrastiveLoss``.

The loop is open_clip's own but for the lines that name clipfast. The model keeps its class, its Parameters and its
checkpoints: plain open_clip reads what this writes. Without --model, a small one starts from random weights.

    pip install 'clipfast[train]' open_clip_torch
    python examples/finetune_open_clip.py
    python examples/finetune_open_clip.py --model ViT-B-32 --pretrained FILE --lr 1e-5

A batch holds every digit many times, in three wordings. CLIP's loss takes all other pairs for negatives: it would push
a three away from the other wordings of a three. ``groups`` says which pairs belong together. The best loss is then the
logarithm of a group's size, and not 0.
"""

import argparse
import json
import time
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import clipfast

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}", "a handwritten {}", "the number {} in white on black")
HELD_OUT = 297
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 16, "width": 64, "layers": 1, "heads": 2}
SMALL = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, captions: Tensor) -> float:
    """Return the share of pictures whose caption is the nearest of the ten."""
    model.eval()
    similarities = model.encode_image(images, normalize=True) @ model.encode_text(captions, normalize=True).T
    model.train()
    return (similarities.argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    """Train a model, test it before and after, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", choices=open_clip.list_models(), help="a small model by default")
    parser.add_argument("--pretrained", help="a file of its weights; random ones by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--plain", action="store_true", help="leave clipfast's towers out, to compare")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="a folder for the trained model")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # a folder as open_clip knows it: the configuration now, the weights in the end
    args.output.mkdir(parents=True, exist_ok=True)
    config = open_clip.get_model_config(args.model) if args.model else SMALL
    (args.output / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}, indent=2))
    folder = f"local-dir:{args.output}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder, load_weights=False, device=device)
    if args.pretrained:
        open_clip.load_checkpoint(model, args.pretrained)

    digits = load_digits()
    pictures = [preprocess(Image.fromarray((15 * pixels).astype("uint8"))) for pixels in digits.images]
    images, labels = torch.stack(pictures).to(device), torch.from_numpy(digits.target).to(device)
    tokenize = open_clip.get_tokenizer(args.model or folder)
    captions = torch.stack([tokenize([words.format(name) for name in NAMES]) for words in TEMPLATES]).to(device)
    held_out = images[-HELD_OUT:], labels[-HELD_OUT:], captions[0]

    if not args.plain:
        print(clipfast.acceleration(clipfast.accelerate(model)))
    loss_function = clipfast.ContrastiveLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    print(f"before: {accuracy(model, *held_out):.1%} of {HELD_OUT} held-out digits are recognised")
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(images) - HELD_OUT, (args.batch_size,))
        groups = labels[chosen]
        texts = captions[torch.randint(len(TEMPLATES), groups.shape), groups]
        loss = loss_function(*model(images[chosen], texts), groups=groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {(time.perf_counter() - start) / 10 * 1e3:.0f} ms a step")
            start = time.perf_counter()
    print(f"after: {accuracy(model, *held_out):.1%}")

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.output / "open_clip_model.safetensors")
    again = open_clip.create_model(folder, device=device)
    print(f"{args.output}, read by plain open_clip: {accuracy(again, *held_out):.1%}")


if __name__ == "__main__":
    main()
