"""A quantized model to the Hub, by huggingface_hub: checked first, and nothing but what was written with it."""

from __future__ import annotations

from dataclasses import dataclass
from glob import escape
from pathlib import Path

from qpalette.core.errors import InputError
from qpalette.core.text import first_line
from qpalette.formats import check_checksums, open_artifact
from qpalette.formats.checksums import CHECKSUMS, checked_names

# Of an earlier push, with other shards: they would be read beside this model's, or in their place.
REPLACED = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Upload:
    """What a push sends."""

    directory: Path
    files: tuple[tuple[str, int], ...]  # name in the directory, bytes
    left: tuple[str, ...]  # what lies in the directory beside the model, and stays

    @property
    def total_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.files)


def check_repository(name: str) -> None:
    """Raises InputError unless `name` is "owner/name", as the Hub spells it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"'{name}' is no name on the Hub ({error}): give owner/name") from error
    if "/" not in name:
        raise InputError(f"'{name}' has no owner: give owner/name")


def prepare_upload(directory: str | Path) -> Upload:
    """The files of the quantized model in `directory`, each compared with SHA256SUMS.

    Raises ArtifactError where there is no such model, or a file is missing or differs.
    """
    place = open_artifact(Path(directory).expanduser()).directory
    check_checksums(place)
    names = sorted([*checked_names(place), CHECKSUMS])
    present = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
    files = tuple((name, (place / name).stat().st_size) for name in names)
    return Upload(place, files, tuple(sorted(present - set(names))))


def push(upload: Upload, repository: str, private: bool = False) -> str:
    """Send the files to `repository` ("owner/name"), which is made when it is not there; the address of the commit.

    With `private` nobody else sees it. Weights of an earlier push go in the same commit. What an interrupted push has
    sent is not sent again. Raises InputError when the Hub cannot be reached, knows no token, or does not let its owner
    write there, and for a public repository that was to be private.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    check_repository(repository)
    if get_token() is None:
        raise InputError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(library_name="qpalette")
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise InputError(f"{repository} is there already, and public: make it private there, or take another name")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=upload.directory,
            allow_patterns=[escape(name) for name, _ in upload.files],
            delete_patterns=list(REPLACED),
            commit_message="Upload a model quantized by qpalette",
        )
    except HfHubHTTPError as error:
        raise InputError(_refused(repository, error.response.status_code, str(error))) from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"the Hub cannot be reached ({first_line(error)}): push again when it can; nothing is lost"
        ) from error
    except ValueError as error:  # a card that the Hub does not take
        raise InputError(f"the Hub does not take it: {first_line(error)}") from error
    return str(commit.commit_url)


def _refused(repository: str, status: int, answer: str) -> str:
    ways: dict[int, str] = {
        401: f"the Hub does not know the token for {repository}: run `hf auth login`, or set HF_TOKEN to another",
        403: f"the token may not write to {repository}: take one with the right to, or another owner",
    }
    return ways.get(status, f"the Hub refused {repository} with {status}: {_last_line(answer)}")


def _last_line(text: str) -> str:
    """Where huggingface_hub puts what the server said."""
    return text.strip().rpartition("\n")[2]
