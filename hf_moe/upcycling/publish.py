"""Share a model's folder on the Hub."""

from pathlib import Path
from typing import Any

from .headers import read_folder
from .hub_source import hub_errors
from .sources import read_config


def push(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, **api: Any) -> str:
    """Create the repository if need be and upload the folder.

    Args:
        folder: a whole model, converted, exported, imported or trained further: config.json and safetensors.
        repo_id: "owner/name". private: of a repository that is created now. revision: branch, main by default.
        api: arguments of `huggingface_hub.HfApi`, such as `endpoint` and `token`.
    Returns:
        Address of the repository.
    Raises:
        ValueError: the folder is not a whole model. ConnectionError: the Hub is out of reach or refuses.
        OSError: a file of the folder cannot be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{folder} is not a folder")
    read_config(path)
    read_folder(path)
    hub = HfApi(**api)
    try:
        with hub_errors(repo_id, f"the Hub cannot be reached for {repo_id!r}: check the network"):
            url = hub.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            # Large folders are committed in several batches; started again, what is already there is skipped.
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=path,
                revision=revision,
                commit_message="Upload a model made with hf-moe",
            )
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name: {error}") from error
    return str(url)
