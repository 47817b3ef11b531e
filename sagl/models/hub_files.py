"""Weight files of the Hugging Face Hub by name, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`. Loads no torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib import request
from urllib.error import HTTPError

from sagl.errors import UserError, require
from sagl.models.metadata import read_metadata
from sagl.utils.digest_cache import forget_sha256
from sagl.utils.files import cache_folder, file_version

HUB_PREFIX = "hf:"
"""Prefix of the names of networks on the Hub."""
WEIGHT_FILE = "model.safetensors"
"""Name of the weight file in a repository."""
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."


def is_hub_name(name: object) -> bool:
    """Return whether a name is that of a network on the Hub."""
    return isinstance(name, str) and name.startswith(HUB_PREFIX)


def download_from_hub(name: str, argument: str = "model") -> Path:
    """Return the weight file of a network on the Hub in the cache folder; download it if it is missing or has changed.

    Args:
        name: `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`, with a branch, tag or commit.
        argument: name of the parameter, for messages.

    Raises:
        UserError: the name is malformed, the repository cannot be read, or it has no network of sagl.
    """
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    require_repository(repository, argument)
    require(  # it is part of a path
        re.fullmatch(r"[\w./-]*", revision) is not None and ".." not in revision,
        f"`{argument}` must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION with a branch, tag or commit, got {name!r}.",
    )
    with hub_errors(repository, argument):
        from huggingface_hub import hf_hub_download

        folder = cache_folder() / "hub" / (f"{repository}@{revision}" if revision else repository)
        offline = not is_reachable()
        before = file_version(folder / WEIGHT_FILE) if (folder / WEIGHT_FILE).is_file() else None
        path = Path(
            hf_hub_download(
                repository, WEIGHT_FILE, revision=revision or None, local_dir=folder, local_files_only=offline
            )
        )
    if file_version(path) != before:
        forget_sha256(path)
    require(
        bool(read_metadata(path)),
        f"`{argument}` must be a network that sagl push uploaded, and {name} has none: its {WEIGHT_FILE} holds no "
        "settings.",
    )
    return path


def is_reachable() -> bool:
    """Return whether the Hub answers; huggingface_hub itself would try for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    try:
        request.urlopen(request.Request(ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True


def require_repository(repository: str, argument: str) -> None:
    """Refuse a malformed name of a repository.

    Raises:
        UserError: it is not OWNER/NAME.
    """
    require(
        re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is not None,
        f"`{argument}` must be OWNER/NAME of a repository on the Hugging Face Hub, got {repository!r}.",
    )


@contextmanager
def hub_errors(repository: str, argument: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a `UserError` that names the repository."""
    try:
        from huggingface_hub import errors, utils
    except ImportError as error:
        raise UserError(f"`{argument}` {repository} needs huggingface_hub: pip install 'sagl[hub]'.") from error
    http_error: type[Exception] = getattr(errors, "HTTPError", OSError)  # of the client that the library uses
    start = f"`{argument}` must be a repository that you may use, and {repository}"
    try:
        utils.validate_repo_id(repository)  # type: ignore[attr-defined]
        yield
    except errors.HFValidationError as error:
        raise UserError(
            f"`{argument}` must be the name of a repository, got {repository!r}: {first_line(error)}"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"{start} needs a token, and there is none. {LOGIN}") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{start} asks for terms to be accepted on its page. Accept them there. {LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{start} does not exist or is private. If it is private: {LOGIN}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{start} has no such revision.") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{start} cannot be reached, and is not in the cache. Check the network.") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{start} has no file {WEIGHT_FILE}.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = LOGIN if status in (401, 403) else "Try again later."
        raise UserError(f"{start} was refused with status {status}: {first_line(error)} {hint}") from error
    except (http_error, OSError) as error:
        if getattr(error, "filename", None) is not None:  # an error of a local file
            raise
        raise UserError(f"{start} cannot be reached: {first_line(error)} Check the network.") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
