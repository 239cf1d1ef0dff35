"""``statezoo publish``: a model's folder to the Hub, in one commit."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from statezoo import shipped
from statezoo.download import is_adapter
from statezoo.folder import check_folder, files_of
from statezoo.hub_errors import explained


def publish(
    folder: str,
    name: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """Send the folder of a model or an adapter to the Hub, private unless told otherwise.

    The token is the one of ``hf auth login`` or HF_TOKEN. After an interruption, the same command
    sends what is missing.

    Args:
        folder: What statezoo card wrote, an adapter with a card, or the name of a shipped model.
        name: organisation/name on the Hub; made where it is missing.
        public: Let everybody see it.
        revision: Branch to write to, by default main; made where it is missing.
        message: What the commit says.
        dry_run: List what would be sent, and send nothing.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    place = _find(folder)
    with explained(name, revision, write=True):
        validate_repo_id(name)
    if name.count("/") != 1:
        raise ValueError(f"publish needs organisation/name, got {name!r}.")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"publish writes to a branch, and {revision} is a commit.")
    problems = check_folder(place)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{folder} cannot be published:{listed}")
    message = message or f"Publish {name.rpartition('/')[2]} with statezoo {version('statezoo')}"
    if dry_run:
        where = f"{constants.ENDPOINT}/{name}, branch {revision or 'main'}"
        kind = "public" if public else "private"
        sys.stdout.write(
            f"would send to {where} ({kind} if new), as {message!r}:\n{_listed(place)}\n"
        )
        return
    with explained(name, revision, write=True):
        private, commit = _send(place, name, public, revision, message)
    call = f'statezoo.load("{name}", revision="{commit.oid}")'
    url = f"{constants.ENDPOINT}/{name}"
    note = "  # private: needs a token" if private else ""
    if private and public:
        note += f"; it was there before, and stays private: {url}/settings changes that"
    sys.stdout.write(f"{url}\n{call}{note}\n")


def _find(folder: str) -> Path:
    """Return the folder that is meant."""
    place = Path(shipped.resolve(folder))
    if not place.is_dir():
        raise ValueError(f"there is no folder {folder!r}{shipped.near(folder)}.")
    bare = not is_adapter(place) and not (place / "config.json").is_file()
    if bare and next(place.rglob("*.ckpt"), None):
        raise ValueError(
            f"{folder!r} is a run, which has no card: write a folder with one by `statezoo card "
            f"{folder} OUT --about ABOUT.yaml`, and publish that."
        )
    return place


def _listed(folder: Path) -> str:
    """List files with their sizes, and the sum."""
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in files_of(folder)}
    sizes[f"{len(sizes)} files"] = sum(sizes.values())
    width = max(map(len, sizes))
    return "\n".join(f"  {name:<{width}}  {size:>13,} bytes" for name, size in sizes.items())


def _send(
    folder: Path, name: str, public: bool, revision: str | None, message: str
) -> tuple[bool, Any]:
    """Make repository and branch where they are missing, and commit all files at once.

    Returns:
        Whether the repository is private, and the commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    try:
        private = bool(api.model_info(name).private)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not public, exist_ok=True)
        private = not public
    if not private and not public:
        raise ValueError(f"{name!r} exists and is public: say --public to publish there.")
    if revision not in (None, "main"):
        api.create_branch(name, branch=str(revision), exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=file)
        for file in files_of(folder)
    ]
    commit = api.create_commit(name, operations, commit_message=message, revision=revision)
    return private, commit
