"""The Hugging Face hub: whether it may be used, an upload to it, and its errors in one line each.

A token is read by `huggingface_hub` alone, from the environment or from its own login; this program never holds one in
a setting, and takes it out of the text of an error.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sar_kd.errors import UsageError

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

_UNREACHABLE = {
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError", "TimeoutException",
}  # fmt: skip


def offline_variable() -> str:
    """The environment variable that forbids requests to the hub, with its value; '' if none does."""
    for name in _OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name}={os.environ[name]}"
    return ""


def is_cached(name: str) -> bool:
    """Is the hub's model of this id in the local cache, at least its `config.json`?"""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def has_token() -> bool:
    """Is a token set, without which gated models cannot be loaded?"""
    from huggingface_hub import get_token

    return get_token() is not None


def require_upload(name: str) -> None:
    """Raise UsageError if an upload to `--push_to_hub` cannot succeed, as far as that is known without the network."""
    if offline := offline_variable():
        raise UsageError(f"--push_to_hub {name}: {offline} forbids the network; unset it")
    if not has_token():
        raise UsageError(f"--push_to_hub {name}: there is no token; log in with `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, name: str, public: bool, message: str) -> str:
    """Upload a folder into a repository of models, which is made if there is none; returns its address.

    Raises: UsageError if the hub refuses it or cannot be reached, or if a public repository is there and public is not
    asked for
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # of the network; its own errors are OSError and ValueError too

    require_upload(name)
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        is_public = not api.model_info(url.repo_id).private
        if not is_public or public:
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message, ignore_patterns=[".*"])
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last: of its transfer, in Rust
        kinds = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "the hub cannot be reached" if kinds & _UNREACHABLE else f"the hub refuses it ({lines[0]})"
        raise UsageError(f"--push_to_hub {name}: {_without_token(reason)}") from None
    if is_public and not public:
        raise UsageError(f"--push_to_hub {name}: is there already, and public; give --public too, or another name")
    return str(url)


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text


def explain_hub_error(error: BaseException, name: str, what: str = "model") -> str:
    """The cause of an error and its remedy, in one line; the error's own first line where it is not the hub's.

    name: the hub id or directory; what: 'model' or 'dataset'
    """
    chain = list(_chain(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return "no room on the disk for the download; free some, or set HF_HOME to a folder on another disk"
    if "GatedRepoError" in kinds:
        return "gated; accept its terms on its page at the hub, then `hf auth login` or set HF_TOKEN"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return f"no such {what} on the hub, or a private one; check the spelling, or log in with `hf auth login`"
    if "HFValidationError" in kinds:
        return "neither a directory nor a hub id"
    if kinds & _UNREACHABLE:
        offline = offline_variable()
        cause = f"{offline} forbids the network" if offline else "no network"
        kind = " --repo-type dataset" if what == "dataset" else ""
        here = "" if Path(name).expanduser().exists() else "no such directory here, "
        return (
            f"{here}not in the cache, and {cause}; fetch it elsewhere with `hf download {name}{kind}` and give its "
            "directory"
        )
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
