"""Models of the Hub, as folders on this machine."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from statezoo import safety, shipped
from statezoo.hub_errors import HubError, explain, explained, no_answer

log = logging.getLogger(__name__)

ADAPTER = ("adapter.json", "adapter_config.json", "adapter_model.safetensors")
FIRST = ("config.json", "adapter.json")
"""What says whether the rest is worth its time."""
SECONDS = 10
"""How long the Hub may take to say which commit a revision is."""


def is_hub_id(name: str) -> bool:
    """Say whether ``name`` can mean a repository, and is no folder or file here."""
    if Path(name).exists() or Path(name).is_absolute() or name[:1] in (".", "~"):
        return False
    return name.count("/") == 1 and not name.endswith(".ckpt")


def is_name(base: object) -> bool:
    """Say whether a model is named so that it can be found from everywhere: no path."""
    text = str(base)
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and not text.endswith(".ckpt")
    return bool(on_hub) or text in shipped.names()


def is_adapter(folder: str | Path) -> bool:
    """Say whether a folder holds what a run trained of a model, without the model."""
    return Path(folder, "adapter.json").is_file() and not Path(folder, "config.json").is_file()


def local(source: str) -> str:
    """Return the folder of a model by its short name or its name on the Hub, else ``source``.

    Raises:
        HubError: If there is no such model, or it cannot be had; says what to do.
    """
    place = shipped.resolve(source)
    return str(fetch(place)) if is_hub_id(place) else place


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Path:
    """Download a model or an adapter: settings, tokenizer and weights, and nothing else.

    Where the Hub does not answer, a copy in the cache is used, and a warning says so. Files that
    were cut off are never taken for whole ones; the next call goes on where the first was.

    Args:
        name: ``"organisation/name"``.
        revision: Branch, tag or commit; by default the main branch.
        token: Token for private repositories; by default the one of ``hf auth login`` or HF_TOKEN.
        **kwargs: ``cache_dir``, ``local_files_only`` and ``force_download`` of huggingface_hub.

    Returns:
        The folder, in the cache.

    Raises:
        HubError: If there is no such model, or it cannot be had; says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with explained(name, revision, token):
        kwargs |= {"revision": revision, "token": token}
        lost = None if kwargs.get("local_files_only") else _ask(name, revision, token)
        if lost is not None:
            kwargs["local_files_only"] = True
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*FIRST], **kwargs))
            _check_kind(folder, name)
            kwargs["revision"] = folder.name  # the commit, so that all files are of one
            rest = ["generation_config.json", *safety.TOKENIZER_FILES, *ADAPTER]
            weights = ["model*.safetensors", "model.safetensors.index.json"]
            wanted = [*FIRST, *rest, *weights]
            folder = Path(snapshot_download(name, allow_patterns=wanted, **kwargs))
            if not any(folder.glob("*.safetensors")):
                wanted += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
                folder = Path(snapshot_download(name, allow_patterns=wanted, **kwargs))
        except LocalEntryNotFoundError as error:
            raise error from (lost or error.__cause__)
    if not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        if not kwargs.get("local_files_only"):
            raise HubError(f"{name!r} has settings, but no weights: no model.safetensors.")
        raise HubError(f"the copy of {name!r} in the cache has no weights: load it on line once.")
    if lost is not None:
        why = explain(lost, name, revision, token)
        log.warning("used the copy of %r in the cache, commit %s: %s", name, folder.name[:8], why)
    return folder


def _ask(name: str, revision: str | None, token: str | bool | None) -> Exception | None:
    """Ask the Hub for the revision; return why it gave no answer, raise where it says no."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return None  # a commit never changes, so the cache knows it as well
    try:
        HfApi().model_info(name, revision=revision, token=token, timeout=SECONDS)
    except Exception as error:
        if not no_answer(error):
            raise
        return error
    return None


def _check_kind(folder: Path, name: str) -> None:
    """Raise where a repository holds nothing that we load, before the weights are downloaded."""
    from statezoo.lightning_modules.adapter import read_info
    from statezoo.zoo import convert

    if is_adapter(folder):
        base = read_info(folder)["base"]
        if not is_name(base):
            raise HubError(
                f"{name!r} holds an adapter of {base!r}, which is a file of its author: it can be "
                "loaded where its base has a name."
            )
        return
    if not (folder / "config.json").is_file():
        raise HubError(
            f"{name!r} holds no model of statezoo: it has neither config.json nor adapter.json."
        )
    try:
        kind = convert.model_type(safety.read_json(folder / safety.CONFIG))
    except ValueError as error:
        raise HubError(f"{name!r} holds no model: its config.json is not JSON.") from error
    if kind not in ("statezoo", *convert.SUPPORTED):
        raise HubError(
            f"{name!r} holds a model of type {kind!r}; statezoo reads its own and those of types "
            f"{', '.join(sorted(convert.SUPPORTED))}."
        )
