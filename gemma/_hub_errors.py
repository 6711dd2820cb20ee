# SPDX-License-Identifier: Apache-2.0
"""The hub's errors in words that say what to do: which of token, licence, name, connection or disk it is.

`_hub_download.py` wraps every request in `explained`. A token is never part of a message.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from gemma.errors import GemmaError, HubError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def explained(repository: str, revision: str | None, file: str = "") -> Iterator[None]:
    """Turns the errors of the hub's client, of the connection and of the disk into a HubError."""
    from huggingface_hub import errors as hub

    try:
        yield
    except GemmaError:
        raise
    except hub.HfHubHTTPError as error:
        raise HubError(_answered(error, repository, revision, file)) from error
    except hub.HFValidationError as error:
        raise HubError(f"{repository!r:.100}: not the name of a repository; expected owner/name") from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise HubError(_unreachable(repository, error)) from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise HubError(
                f"{repository}: no space left on the disk; free some and pull again, which continues, or give another "
                f"folder with --to"
            ) from error
        raise HubError(_broken(repository, file, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise HubError(_unreachable(repository, error)) from error
        raise


def endpoint() -> str:
    """The hub that is asked."""
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def _answered(error, repository: str, revision: str | None, file: str) -> str:
    from huggingface_hub import errors as hub

    status = getattr(error.response, "status_code", None)
    page = f"{endpoint()}/{repository}"
    gated = isinstance(error, hub.GatedRepoError)
    if status == 403 or (gated and status != 401):
        return (
            f"{repository}: this account may not read it (403). Accept the licence at {page} while logged in as the "
            f"owner of the token in HF_TOKEN, and let a fine-grained token read gated repositories; then pull again"
        )
    if gated or (status == 401 and not isinstance(error, hub.RepositoryNotFoundError)):
        return (
            f"{repository}: a valid access token is needed (401). Create one at {endpoint()}/settings/tokens, put it "
            f"into HF_TOKEN (or run `hf auth login`), and accept the licence at {page}; then pull again"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{repository}: has no revision {revision!r:.100}; give a branch, tag or commit that {page} lists"
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"{repository}: no such repository for this account ({status}). Check the spelling at {page}; if it is "
            f"private or gated, put an access token into HF_TOKEN (or run `hf auth login`)"
        )
    if status == 404:
        return f"{repository}: {file or 'what was asked for'} is not there (404); pull again"
    if status == 429:
        return f"{repository}: too many requests (429); wait {_wait(error)}and pull again, which continues"
    return f"{repository}: {endpoint()} answered {status}; try again later, what has arrived is kept"


def _wait(error) -> str:
    seconds = error.response.headers.get("Retry-After", "")
    return f"{seconds} seconds " if seconds.isdigit() else ""


def _unreachable(repository: str, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE forbids connections; unset it"
    else:
        why = f"{endpoint()} cannot be reached; check the connection and the proxy settings"
    return (
        f"{repository}: is not on this machine, and {why}. Or copy the files from a machine that has them, and give "
        f"their folder as the model"
    )


def _broken(repository: str, file: str, error: OSError) -> str:
    reason = error.strerror or str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{repository}: {file or 'the list of files'} did not arrive completely ({reason}); pull again, which continues"
    )
