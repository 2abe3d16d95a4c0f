"""The bill of materials of a wheel: CycloneDX 1.6 in .dist-info/sboms (PEP 770), the same bytes for the same input.

It names what THIRD_PARTY_LICENSES names, of that what the build at hand took in: an op library that was not built, or
one without CUDA, holds less. What clipfast asks pip for at install time is in the wheel's METADATA and not here.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

FORMAT = "1.6"
VOCABULARY = "clipfast/data/bpe_simple_vocab_16e6.txt.gz"
IMAGENET = "clipfast/evaluate/imagenet.json"
LICENCES = {
    "MIT": {"license": {"id": "MIT"}},
    "BSD": {"license": {"id": "BSD-3-Clause"}},
    "GCC": {"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"},
    "NVIDIA": {"license": {"name": "CUDA Toolkit EULA", "url": "https://docs.nvidia.com/cuda/eula/"}},
}


def _component(
    kind: str, name: str, version: str | None, licence: str, description: str, **more: Any
) -> dict[str, Any]:
    found = {"type": kind, "bom-ref": name, "name": name, "licenses": [LICENCES[licence]], "description": description}
    return found | ({"version": version} if version else {}) | more


def _sha256(content: bytes) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}]


def document(version: str, package: Path, record: dict[str, Any]) -> str:
    """Return the bill of materials as JSON.

    Args:
        version: clipfast's.
        package: The folder ``clipfast`` as the wheel will hold it.
        record: What the build of the op library wrote down (``_build.json``).
    """
    root = _component("library", "clipfast", version, "MIT", "clipfast", purl=f"pkg:pypi/clipfast@{version}")
    vocabulary = (package.parent / VOCABULARY).read_bytes()
    about = f"The tokenizer's vocabulary, of OpenAI's CLIP: {VOCABULARY}"
    parts = [_component("data", "bpe_simple_vocab_16e6", None, "MIT", about, hashes=_sha256(vocabulary))]
    names = (package.parent / IMAGENET).read_bytes()
    about = f"ImageNet's class names and the templates for them, of OpenAI's CLIP: {IMAGENET}"
    parts.append(_component("data", "imagenet-names", None, "MIT", about, hashes=_sha256(names)))
    inside = []
    if record.get("library"):
        headers = record.get("torch")
        purl = {"purl": f"pkg:pypi/torch@{headers.partition('+')[0]}"} if headers else {}
        about = "The headers of PyTorch's stable ABI, compiled in"
        inside.append(_component("library", "torch-stable-abi-headers", headers, "BSD", about, **purl))
        if record.get("cuda"):
            toolkit = record["cuda"].partition(":")[0]
            inside.append(_component("library", "cudart_static", toolkit, "NVIDIA", "The CUDA runtime, linked in"))
        if record.get("libstdcxx"):
            gcc = None if record["libstdcxx"] == "unknown" else record["libstdcxx"]
            inside.append(_component("library", "libstdc++", gcc, "GCC", "Parts of GCC's C++ library, linked in"))
        name = f"clipfast/{record['library']}"
        content = (package / record["library"]).read_bytes()
        parts.append(_component("file", name, None, "MIT", "The op library", hashes=_sha256(content)))
        parts += inside
    dependencies = [{"ref": "clipfast", "dependsOn": [p["bom-ref"] for p in parts if p not in inside]}]
    if inside:
        dependencies.append({"ref": name, "dependsOn": [p["bom-ref"] for p in inside]})
    bill = {
        "$schema": f"http://cyclonedx.org/schema/bom-{FORMAT}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": FORMAT,
        "version": 1,
        "metadata": {"component": root},
        "components": parts,
        "dependencies": dependencies,
    }
    # no time and no chance in it, so that the same input makes the same wheel
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bill, sort_keys=True))
    return json.dumps(bill | {"serialNumber": f"urn:uuid:{serial}"}, indent=1) + "\n"
