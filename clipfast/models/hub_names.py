"""Names that only a model hub knows, from whoever is used to libraries that download."""

from __future__ import annotations

import difflib
from pathlib import Path

from clipfast.models.config import list_models

#: What names of a hub begin with where a library downloads.
HUB = "hf-hub:"
HOW_TO_FETCH = "Fetch the model's folder first, such as by `hf download OWNER/NAME --local-dir FOLDER`, and give FOLDER"


def refuse_hub_name(name: object) -> None:
    """Raise for what only a model hub knows: nothing is downloaded.

    Raises:
        FileNotFoundError: It looks like ``OWNER/NAME`` or begins with ``hf-hub:``, and nothing here is called so.
    """
    if not isinstance(name, str) or (path := Path(name)).exists():
        return
    of_hub = name.count("/") == 1 and not path.suffix and not path.parent.exists()
    # "ViT-B/16" is a wrong name, and another message says which is near
    if name.startswith(HUB) or (of_hub and not difflib.get_close_matches(name, list_models(), cutoff=0.75)):
        raise FileNotFoundError(
            f"model name: got {name!r}, which looks like a model hub's, expected one of clipfast.list_models() or "
            f"a folder: nothing is downloaded. {HOW_TO_FETCH}"
        )
