"""Write both towers of a CLIP as ONNX files, run them in onnxruntime, and compare with PyTorch.

    pip install 'clipfast[export]'
    python examples/onnx_export.py
    python examples/onnx_export.py FOLDER
    python examples/onnx_export.py ViT-B-32 --weights FILE

FOLDER is that of a training run, or of an open_clip or transformers model. Without a model, a small one gets random
weights. `clipfast export` writes the same files from the command line. onnxruntime needs neither clipfast nor PyTorch,
and takes any number of pictures and texts.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch
from PIL import Image

import clipfast

COLORS = ("red", "green", "blue", "white", "black")


def main() -> None:
    """Export, run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, or a name of clipfast.list_models()")
    parser.add_argument("--weights", help="a file of weights, of any layout")
    parser.add_argument("--output", type=Path, default=Path("runs/onnx"), help="a folder for the two files")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        model, tokenizer = clipfast.open_model(args.model, args.weights, "cpu"), clipfast.get_tokenizer(args.model)
    else:
        model = clipfast.create_model(Path(__file__).with_name("small.json")).eval()
        tokenizer = clipfast.Tokenizer(model.context_length)
    transform = model.transform()
    images = torch.stack([transform(Image.new("RGB", (640, 480), color)) for color in COLORS])
    tokens = tokenizer([f"a {color} wall" for color in COLORS])

    for tower, inputs, encode in (("image", images, model.encode_image), ("text", tokens, model.encode_text)):
        # the report compares too, with random pictures and tokens
        print(clipfast.export(model, args.output / f"{tower}.onnx", tower=tower))
        session = onnxruntime.InferenceSession(args.output / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        (features,) = session.run(None, {tower: inputs.numpy()})
        with torch.no_grad():
            expected = encode(inputs, normalize=True)
        difference = (torch.from_numpy(features) - expected).abs().max() / expected.abs().max()
        print(f"{tower} features {list(features.shape)}: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
