"""What went wrong at the Hub, in words that one can act on: the messages of load and publish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class HubError(OSError):
    """The Hub did not give what was asked of it, or did not take what was sent."""


@contextmanager
def explained(
    name: str, revision: str | None = None, token: str | bool | None = None, write: bool = False
) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a :class:`HubError`; others pass.

    Args:
        name: Id of the repository.
        revision: Branch, tag or commit that is asked for.
        token: What the caller gave as token, None for the one that is saved.
        write: Whether something is sent.

    Raises:
        HubError: With what happened and what to do.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        told = explain(error, name, revision, token, write)
        if told is None:
            raise
        raise HubError(told) from error


def explain(
    error: BaseException,
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    write: bool = False,
) -> str | None:
    """Return what an error means and what to do about it; None where it is not of the Hub.

    Args:
        error: What was raised; where it says nothing itself, its cause may.
        name: Id of the repository.
        revision: Branch, tag or commit that is asked for.
        token: What the caller gave as token, None for the one that is saved.
        write: Whether something is sent.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return (
            f"{name!r} is no id of the Hub: write organisation/name, with letters, digits, '-', "
            f"'_' and '.' alone ({_first_line(error)})."
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"token=True needs a saved token, and there is none: {LOG_IN}."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _not_in_cache(error, name, revision)
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, name, revision, token, write)
    if found := _unreachable(error, write):
        return f"{found}."
    if str(error).startswith("Consistency check failed"):
        return f"a file of {name!r} came cut off: the same command downloads it again."
    cause = error.__cause__ or error.__context__
    return explain(cause, name, revision, token, write) if cause else None


def no_answer(error: BaseException) -> bool:
    """Say whether the Hub could not be asked, or had no answer, rather than said no."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return _unreachable(error, False) is not None


def _refused(
    error: Any, name: str, revision: str | None, token: str | bool | None, write: bool
) -> str:
    """Put an answer of the Hub into words."""
    from huggingface_hub import errors

    url, status = f"{_endpoint()}/{name}", error.response.status_code
    which = _token(token)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name!r} is open to those alone who accept its conditions: see {url}, and {LOG_IN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name!r} has no revision {revision!r}: {url}/commits/main shows what there is."
    if status == 401 and which and not _says_missing(error):
        return (
            f"the Hub does not know {which}: make a new one at {_endpoint()}/settings/tokens, then "
            f"{LOG_IN}."
        )
    if status == 401 and write:
        return f"publishing needs a token that may write: {LOG_IN}."
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        why = f"{which} may not read it" if which else "no token was given"
        here = "" if write else f"no folder {name!r} here and "
        return (
            f"there is {here}no model {name!r} on {_endpoint()}, or it is private and {why}, which "
            f"looks the same from here: check the name, or {LOG_IN}."
        )
    if status == 403:
        what = f"write to {name.partition('/')[0]!r}" if write else f"read {name!r}"
        return (
            f"{which or 'nobody without a token'} may not {what} ({_said(error)}): choose another "
            f"name or another token, see {_endpoint()}/settings/tokens."
        )
    return f"{_trouble(error)}."


def _trouble(error: Any) -> str:
    """Put a limit of the Hub, or trouble of its own, into words."""
    status = error.response.status_code
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        more = "" if _token(None) else f", or {LOG_IN}, which raises the limit"
        when = f"in {wait} seconds" if wait else "in some minutes"
        return f"{_endpoint()} takes no more requests for now (429): try again {when}{more}"
    if status >= 500:
        return f"{_endpoint()} has trouble ({status}): try again later"
    return f"{_endpoint()} answered {status}: {_said(error)}"


def _unreachable(error: BaseException, write: bool) -> str | None:
    """Put a failure to reach the Hub, or to stay connected, into words; None if it is none."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to go on line"
    of_client = HfHubHTTPError.__mro__[1]  # every error of the library that speaks HTTP
    if not isinstance(error, (of_client, ConnectionError, TimeoutError)):
        return None
    if isinstance(error, HfHubHTTPError):
        return _trouble(error) if no_answer(error) else None
    if type(error).__name__ in (
        "ConnectError",
        "ConnectTimeout",
        "ProxyError",
        "UnsupportedProtocol",
    ):
        return (
            f"cannot reach {_endpoint()} ({_first_line(error)}): check the network, the proxy and "
            "HF_ENDPOINT"
        )
    what = "sends what is missing" if write else "goes on where it was"
    return f"the connection to {_endpoint()} was lost: the same command {what}"


def _not_in_cache(error: BaseException, name: str, revision: str | None) -> str:
    """Say that there is no copy, and why the Hub was not asked."""
    of = f" at {revision!r}" if revision else ""
    partial = type(error).__name__ == "IncompleteSnapshotError"
    lacks = (
        f"the copy of {name!r}{of} in the cache is not whole"
        if partial
        else (f"the cache has no copy of {name!r}{of}")
    )
    if error.__cause__ is None:
        return f"{lacks}, and local_files_only=True forbids to ask the Hub."
    why = _unreachable(error.__cause__, False)
    return f"{why or _first_line(error.__cause__)}; {lacks}."


def _says_missing(error: Any) -> bool:
    return bool(error.response.headers.get("X-Error-Code") == "RepoNotFound")


def _token(token: str | bool | None) -> str | None:
    """Name the token that was sent by where it comes from; None where there was none."""
    from huggingface_hub import get_token

    if isinstance(token, str):
        return "the token that was passed"
    if token is False or not get_token():
        return None
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved token"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _said(error: Any) -> str:
    return str(error.server_message or "no reason given").strip().partition("\n")[0].rstrip(".")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
