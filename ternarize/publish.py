"""A folder -> a repository on the Hugging Face Hub, in one commit.

Weights are sent first, to where nobody sees them; then a single commit makes all files visible at once, and what the
repository holds is compared with what was sent. `huggingface_hub.upload_folder` would commit a large folder in several
steps and leave half a model visible when it is stopped, so the commit is made by `create_commit`. Run again after an
interruption, what has arrived is not sent again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from yaml import YAMLError

from ternarize.errors import TernarizeError, first_line
from ternarize.files import INDEX_FILE, SINGLE_FILE, find_shards, read_header
from ternarize.format import QUANT_METHOD
from ternarize.hub import CARD_FILE, PLACE
from ternarize.progress import Progress, size
from ternarize.quantizer import check_folder, quant_method
from ternarize.report import RECIPE_FILE, REPORT_FILE
from ternarize.text import load_tokenizer

EXPORT_FILE = "export.json"  # in what `ternarize export` writes
OURS = {REPORT_FILE, EXPORT_FILE}
FROM_THE_HUB = {".gitattributes", CARD_FILE}  # what a fresh repository may hold
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Parcel:
    """What would be sent where.

    Args:
        repo: user/name.
        private: whether the repository has to be private.
        revision: the branch; None is the repository's main one.
        card: README.md's text, which says the repository's name where the folder's says `PLACE`.
        files: {path in the repository: local file}, the card aside.
    """

    repo: str
    private: bool
    revision: str | None
    card: str
    files: dict[str, Path]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted((sizes | {CARD_FILE: len(self.card.encode())}).items()))


def prepare(
    folder: Path, repo: str, private: bool = False, revision: str | None = None, base: str | None = None
) -> Parcel:
    """Check a folder that `ternarize convert` or `ternarize export` wrote, and say what would be sent; no network.

    Args:
        base: the base model's name on the Hub, for the card of a model that came out of a local folder.

    Raises:
        TernarizeError: no such repository name, or a folder that is damaged or not ours.
    """
    check_name(repo)
    if not folder.is_dir():
        raise TernarizeError(f"{folder} is no folder. Give one that ternarize convert wrote.")
    _check_contents(folder)
    files = {
        str(path.relative_to(folder).as_posix()): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    card = files.pop(CARD_FILE, None)
    if card is None:
        raise TernarizeError(
            f"{folder} has no {CARD_FILE}, the model card. `ternarize evaluate {folder}` writes that of a "
            "conversion anew; for any other folder write one."
        )
    return Parcel(repo, private, revision, _addressed(card, repo, base), files)


def check_name(repo: str) -> None:
    """Raise a TernarizeError where `repo` is no user/name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise TernarizeError(f"{repo!r} is no name of a repository: {error} Write it as user/name.") from error
    if repo.count("/") != 1:
        raise TernarizeError(f"{repo!r} is no name of a repository. Write it as user/name.")


def check_access(repo: str) -> None:
    """Ask the Hub whether the token could write to `repo`, before the hours that a conversion takes.

    Raises:
        TernarizeError: no token, a wrong or read-only one, somebody else's name, or no connection.
    """
    check_name(repo)
    with _explained(repo, "Nothing was begun."):
        who = HfApi().whoami()
    _refuse_reader(who)
    owner, names = repo.split("/")[0], [who["name"], *(org["name"] for org in who.get("orgs", []))]
    if owner not in names:
        raise TernarizeError(
            f"the Hub token belongs to {who['name']}, who cannot be seen to write to {owner}'s repositories "
            f"(but to those of {', '.join(names)}). Choose another name, or convert first and push the folder then."
        )


def publish(parcel: Parcel, progress: Progress, force: bool = False) -> str:
    """Create the repository if need be, and make the files visible there in one commit.

    Args:
        force: also where the repository holds something else than a ternarize folder; its history keeps that.

    Returns:
        The address of the commit.

    Raises:
        TernarizeError: what went wrong, what the repository holds now, and what to do.
    """
    repo, api = parcel.repo, HfApi()
    with _explained(repo, "Nothing was sent."):
        _refuse_reader(api.whoami())
        _check_card(parcel)
        api.create_repo(repo, private=parcel.private, exist_ok=True)
    unchanged = f"{repo} shows no file that was not there before; run the same command again to go on."
    with _explained(repo, unchanged):
        there = api.model_info(repo)
        if parcel.private and not there.private:
            raise TernarizeError(
                f"{repo} exists and is public, so --private cannot be kept. Nothing was sent. "
                "Make it private in its settings on the Hub, or choose another name."
            )
        held = set(api.list_repo_files(repo))
        _refuse_others(repo, held, force)
        if parcel.revision is not None:
            api.create_branch(repo, branch=parcel.revision, exist_ok=True)
            held = set(api.list_repo_files(repo, revision=parcel.revision))
            _refuse_others(repo, held, force)
        operations = _operations(parcel, held)
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        progress.say(f"sending {len(additions)} files, {size(sum(parcel.sizes.values()))}, to {repo}")
        with _bars(progress):
            api.preupload_lfs_files(repo, additions, revision=parcel.revision, free_memory=False)
    with _explained(repo, "Whether the commit arrived is not known: run the same command again."):
        commit = api.create_commit(repo, operations, commit_message="Upload by ternarize", revision=parcel.revision)
        _compare(api, parcel, commit.oid, additions)
    return str(commit.commit_url)


def _check_contents(folder: Path) -> None:
    """The strict check of a ternarize folder; of an export, that its weight files are whole."""
    if (folder / "config.json").is_file() and quant_method(folder) == QUANT_METHOD:
        check_folder(folder)
        if (folder / "tokenizer_config.json").is_file():
            load_tokenizer(folder)
        if (folder / RECIPE_FILE).is_file() and not (folder / REPORT_FILE).is_file():
            raise TernarizeError(f"{folder} has no {REPORT_FILE}: it is not all of what ternarize convert wrote.")
        return
    if not (folder / EXPORT_FILE).is_file():
        raise TernarizeError(
            f"{folder} is neither a folder that ternarize convert wrote nor one that ternarize export did. "
            "Other models are pushed with: hf upload"
        )
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        for shard in find_shards(folder):
            read_header(shard)
    for path in folder.rglob("*.gguf"):
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise TernarizeError(f"{path} is damaged: it does not begin as a GGUF file does. Export it again.")


def _check_card(parcel: Parcel) -> None:
    """Let the Hub read the card's metadata, as it does again with the commit, when the weights are there already."""
    try:
        ModelCard(parcel.card).validate()
    except ValueError as error:
        try:
            reason = "; ".join(str(fault["message"]) for fault in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reason = str(error)
        raise TernarizeError(
            f"the Hub refuses what the card, {CARD_FILE}, says between its lines of ---: {reason}. Nothing was sent. "
            "Mend it there and push again."
        ) from error


def _addressed(path: Path, repo: str, base: str | None) -> str:
    """The card with the repository's name in it, and the base model's where it is given."""
    try:
        text = path.read_text(encoding="utf-8").replace(PLACE, repo)
        card = ModelCard(text)
    except (OSError, ValueError, YAMLError) as error:
        raise TernarizeError(f"{path}: its metadata, between the lines of ---, cannot be read: {error}") from error
    if base is None:
        return text
    check_name(base)
    card.data["base_model"], card.data["base_model_relation"] = base, "quantized"
    return str(card)


def _operations(parcel: Parcel, held: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add every file; weights of an earlier push that these do not replace go, or they would be read with them."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(CARD_FILE, parcel.card.encode()),
        *(CommitOperationAdd(name, str(path)) for name, path in parcel.files.items()),
    ]
    if any(name.endswith(".safetensors") for name in parcel.files):
        stale = {name for name in held if "/" not in name and name.endswith((".safetensors", INDEX_FILE))}
        operations += [CommitOperationDelete(name) for name in sorted(stale - set(parcel.files))]
    return operations


def _compare(api: HfApi, parcel: Parcel, commit: str, additions: list[CommitOperationAdd]) -> None:
    """Raise a TernarizeError where the commit does not hold what was sent."""
    info = api.model_info(parcel.repo, revision=commit, files_metadata=True)
    found = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []}
    wrong = []
    for addition in additions:
        length, digest = found.get(addition.path_in_repo, (None, None))
        other = digest is not None and digest != addition.upload_info.sha256.hex()
        if length != addition.upload_info.size or other:
            wrong.append(addition.path_in_repo)
    if wrong:
        raise TernarizeError(
            f"{parcel.repo} was changed, but {len(wrong)} of {len(additions)} files are not there as they are here: "
            f"{', '.join(wrong[:5])}. A .gitignore in the repository leaves files out; otherwise run the command again."
        )


def _refuse_reader(who: dict[str, Any]) -> None:
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise TernarizeError(
            f"the Hub token of {who['name']} may only read. Make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, then run hf auth login or set HF_TOKEN."
        )


def _refuse_others(repo: str, held: set[str], force: bool) -> None:
    others = held - FROM_THE_HUB
    if others and not others & OURS and not force:
        raise TernarizeError(
            f"{repo} already holds something that ternarize did not push, such as {sorted(others)[0]}. Nothing was "
            "sent. Choose another name, or --force: the repository's history keeps what is there."
        )


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """The client's own bars, where a person sees them."""
    silence = (progress.quiet or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


@contextmanager
def _explained(repo: str, state: str) -> Iterator[None]:
    """Whatever the client raises becomes a TernarizeError with `state`, what the repository holds now, at its end."""
    try:
        yield
    except TernarizeError:
        raise
    except LocalTokenNotFoundError as error:
        raise TernarizeError(f"there is no Hub token. Run hf auth login, or set HF_TOKEN. {state}") from error
    except OfflineModeIsEnabled as error:
        raise TernarizeError(f"HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it to push. {state}") from error
    except RevisionNotFoundError as error:
        raise TernarizeError(f"{repo} has no such revision. Push to a branch. {state}") from error
    except HfHubHTTPError as error:
        raise TernarizeError(f"{_reason(repo, error)} {state}") from error
    except Exception as error:  # httpx, hf_xet and the client's own checks raise each their own
        raise TernarizeError(
            f"the Hub at {constants.ENDPOINT} could not be used: {first_line(error)} {state}"
        ) from error


def _reason(repo: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.server_message or (str(error).strip().splitlines() or [""])[0]
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not take the token ({said}). Run hf auth login, or set HF_TOKEN to a valid one."
    if status == 403 or isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub refuses {repo} to this token ({said}). Check the user's or organisation's name, and that the "
            f"token may write there: {constants.ENDPOINT}/settings/tokens."
        )
    if status == 429:
        return f"the Hub asks for a pause ({said}). Wait some minutes."
    if status >= 500:
        return f"the Hub failed with status {status} ({said}), also when asked again."
    return f"the Hub answered with status {status}: {said}"
