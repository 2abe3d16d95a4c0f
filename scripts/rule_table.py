"""Write the tables of docs/kernels.md: bytes, and what the rule decides for classic CLIP's models, card and precision.

No card is needed: ``.venv/bin/python scripts/rule_table.py``. A test compares the page with what this gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

from clipfast.models.config import CLIPConfig, get_config, list_models
from clipfast.ops.call_classes import LENGTHS, WIDTHS, Key, Machine, bound
from clipfast.ops.rules import bytes_moved, decide

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- the rule: begin -->\n", "<!-- the rule: end -->\n"

# of classic CLIP: the first ten of the table of models, and their -quickgelu twins
_VITS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
_SIZES = (*_VITS, "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
CLASSIC = [name for name in list_models() if name.removesuffix("-quickgelu") in _SIZES]
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
MODES = ("training", "inference")
PRECISIONS = ("float32", "bfloat16", "float16", "autocast")
_WORDS = {"triton": "kernel", "native": "op library", "torch": "PyTorch", "reference": "PyTorch"}


def keys_of(config: CLIPConfig, precision: str, training: bool, large: bool = True) -> dict[str, Key]:
    """Return the classes of a model's calls, by what they are: of both towers' blocks, and of the loss.

    Args:
        config: The model.
        precision: A dtype of weights and tokens, or ``"autocast"``: to bfloat16, with float32 weights and stream.
        training: Whether gradients are recorded.
        large: Whether the batch is large.
    """
    autocast = precision == "autocast"
    product, stream = ("bfloat16", "float32") if autocast else (precision, precision)
    more = {"training": training, "autocast": autocast}
    found = {}
    vision, text = config.vision_cfg, config.text_cfg
    towers = [("captions", text.width, text.mlp_ratio, text.width // text.heads, text.context_length, True)]
    if isinstance(vision.layers, int):
        height, width = vision.image_size if isinstance(vision.image_size, tuple) else (vision.image_size,) * 2
        tokens = (height // vision.patch_size) * (width // vision.patch_size) + 1
        towers.insert(0, ("images", vision.width, vision.mlp_ratio, vision.head_width, tokens, False))
    for tower, width, ratio, head_dim, tokens, causal in towers:
        rows = {**more, "large": large, "width": bound(width, WIDTHS)}
        found[f"layer_norm, {tower}"] = Key("layer_norm", (stream, stream), **rows)
        found[f"add_layer_norm, {tower}"] = Key("add_layer_norm", (product, stream, stream), **rows)
        hidden = {**rows, "width": bound(int(width * ratio), WIDTHS), "form": config.approximate}
        found[f"bias_gelu, {tower}"] = Key("bias_gelu", (product, stream), **hidden, bias=True)
        heads = {**rows, "width": head_dim, "causal": causal}
        found[f"attention, {tower}"] = Key("attention", (product,), **heads, tokens=bound(tokens, LENGTHS))
        if causal:
            found["attention, packed captions"] = Key("attention", (product,), **heads)
    features = stream  # normalised in float32 under autocast
    found["contrastive_loss"] = Key("contrastive_loss", (features,), **more, width=bound(config.embed_dim, WIDTHS))
    return found


def decisions() -> Iterator[tuple[str, str, str, str, tuple[str, ...]]]:
    """Yield a call, a model, a precision and a mode, and what the rule takes on the six cards, for large batches."""
    for model, precision, mode in product(CLASSIC, PRECISIONS, MODES):
        for call, key in keys_of(get_config(model), precision, mode == "training").items():
            backends = (decide(key, Machine("cuda", capability)).backend for capability in CAPABILITIES)
            yield call, model, precision, mode, tuple(_WORDS[backend] for backend in backends)


def table() -> str:
    """Return the table: what is decided alike in one row."""
    found: dict[tuple[str, tuple[str, ...]], set[tuple[str, str, str]]] = defaultdict(set)
    models: dict[str, set[str]] = defaultdict(set)
    for call, model, precision, mode, backends in decisions():
        found[call, backends].add((model, precision, mode))
        models[call].add(model)
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for (call, backends), cases in found.items():
        for where in _grouped(cases, models[call]):
            rows[(*where, *backends)].append(call)
    heads = [f"{major}.{minor}" for major, minor in CAPABILITIES]
    lines = [
        "| call | models | precision | mode | " + " | ".join(heads) + " |",
        "|---" * (4 + len(heads)) + "|",
    ]
    for cells, calls in rows.items():
        where, backends = cells[:3], cells[3:]
        lines.append("| " + " | ".join(["; ".join(_towers(calls)), *where, *backends]) + " |")
    return "\n".join(lines) + "\n"


def bytes_table() -> str:
    """Return the table of bytes that the rule goes by for ops that work on rows."""
    lines = [
        "| bytes an element, PyTorch : kernel | bfloat16, forward | forward + backward | autocast, forward | forward + "
        "backward |",
        "|---|---|---|---|---|",
    ]
    autocast = {"layer_norm": ("float32",) * 2, "add_layer_norm": ("bfloat16", "float32", "float32")}
    for what, key in {
        "`layer_norm`": Key("layer_norm", ("bfloat16",) * 2),
        "`add_layer_norm`": Key("add_layer_norm", ("bfloat16",) * 3),
        "`bias_gelu`, erf and tanh": Key("bias_gelu", ("bfloat16",) * 2, form="none", bias=True),
        "`bias_gelu`, quick": Key("bias_gelu", ("bfloat16",) * 2, form="quick", bias=True),
    }.items():
        mixed = key._replace(autocast=True, dtypes=autocast.get(key.op, ("bfloat16", "float32")))
        cells = [bytes_moved(k._replace(training=training)) for k in (key, mixed) for training in (False, True)]
        lines.append(f"| {what} | " + " | ".join(f"{pytorch} : {kernel}" for pytorch, kernel in cells) + " |")
    return "\n".join(lines) + "\n"


def text() -> str:
    """Return what stands between the page's marks."""
    about = (
        "Decisions for large batches of classic CLIP's models (others' calls fall into the same classes, by length "
        "and head width); for small ones PyTorch, but for packed captions and the losses:"
    )
    return f"{bytes_table()}\n{about}\n\n{table()}"


def _grouped(cases: set[tuple[str, str, str]], models: set[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the cells for models, precisions and modes of rows that cover the cases, and nothing else."""
    of: dict[tuple[str, str], frozenset[str]] = {
        (p, m): frozenset(model for model in models if (model, p, m) in cases) for p, m in product(PRECISIONS, MODES)
    }
    by: dict[tuple[frozenset[str], tuple[str, ...]], list[str]] = defaultdict(list)
    for precision in PRECISIONS:
        for served in dict.fromkeys(of[precision, mode] for mode in MODES):
            if served:
                by[served, tuple(mode for mode in MODES if of[precision, mode] == served)].append(precision)
    for (served, modes), precisions in by.items():
        yield _models(served, models), _all_or(precisions, PRECISIONS), _all_or(modes, MODES)


def _all_or(some: Iterable[str], every: tuple[str, ...]) -> str:
    return "all" if set(some) == set(every) else ", ".join(some)


def _models(some: frozenset[str], every: set[str]) -> str:
    quick: Callable[[str], bool] = lambda name: name.endswith("-quickgelu")  # noqa: E731
    if some == every:
        return "all"
    if some == {name for name in every if quick(name)}:
        return "QuickGELU"
    if some == {name for name in every if not quick(name)}:
        return "erf GELU"
    plain = {name.removesuffix("-quickgelu") for name in some}
    both = all({name, f"{name}-quickgelu"} <= some for name in plain)
    names = sorted(plain if both else some, key=CLASSIC.index)
    return ", ".join(names)


def _towers(calls: list[str]) -> list[str]:
    """Return calls with those of both towers joined."""
    ops: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        op, _, tower = call.partition(", ")
        ops[op].append(tower)
    joined = []
    for op, towers in ops.items():
        both = op != "attention" and set(towers) >= {"images", "captions"}
        where = [] if both or towers == [""] else [" and ".join(towers)]
        joined.append(", ".join([f"`{op}`", *where]))
    return joined


def main() -> None:
    """Put the table where the page has it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + text() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
