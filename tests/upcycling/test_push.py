"""Pushing, against the operations that huggingface_hub would send."""

import errno

import huggingface_hub
import pytest
from dense import save_dense
from huggingface_hub import _upload_pipeline
from huggingface_hub.errors import HTTPError

from hf_moe.upcycling import Options, export, import_mixture, open_source, push, upcycle
from hf_moe.upcycling.convert import convert
from hf_moe.upcycling.sources import FolderSource


@pytest.fixture
def target(tmp_path):
    return upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", experts=2, progress=False)


@pytest.mark.parametrize("made_by", ["upcycle", "export", "import"])
def test_creates_the_repository_and_commits_every_file(target, tmp_path, monkeypatch, made_by):
    if made_by != "upcycle":
        target = export(target, tmp_path / "mixtral", "mixtral", progress=False)
    if made_by == "import":
        target = import_mixture(target, tmp_path / "back", progress=False)
    sent = {}

    def create_repo(self, repo_id, **arguments):
        sent["repo"] = (repo_id, arguments["private"], arguments["exist_ok"])
        return f"https://huggingface.co/{repo_id}"

    def upload(api, *, repo_id, add_operations, delete_operations, **arguments):
        sent["files"] = {operation.path_in_repo for operation in add_operations}
        assert repo_id == "me/moe"
        assert not delete_operations

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "_validate_yaml", lambda *_, **__: None)
    monkeypatch.setattr(_upload_pipeline, "pipelined_upload", upload)
    assert push(target, "me/moe", private=True) == "https://huggingface.co/me/moe"
    assert sent["repo"] == ("me/moe", True, True)
    assert sent["files"] == {path.name for path in target.iterdir()}


def test_the_metadata_is_what_the_hub_accepts(tmp_path):
    """A base model is an id without revision, which the Hub's validation would refuse."""
    folder = save_dense(tmp_path / "dense")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    source = FolderSource("owner/name@v1.0", folder, revision="0123abc")
    target = convert(source, tmp_path / "moe", Options(experts=2), progress=False)
    card = huggingface_hub.ModelCard.load(target / "README.md")
    assert card.data.base_model == ["owner/name"]
    assert card.data.license == "mit"
    assert "`owner/name@v1.0` at revision `0123abc`" in card.text


LOCAL_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied", "model.safetensors"),
]


@pytest.mark.parametrize("error", LOCAL_ERRORS, ids=["full disk", "no permission"])
def test_errors_of_this_machine_are_not_blamed_on_the_hub(target, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: "")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fails)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    calls = [
        lambda: push(target, "me/moe"),
        lambda: open_source("owner/name"),
        lambda: open_source("owner/name", headers_only=True),
    ]
    for call in calls:
        with pytest.raises(OSError, match=error.strerror) as caught:
            call()
        assert caught.value is error


def test_no_network(target, monkeypatch):
    def unreachable(*_, **__):
        raise HTTPError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(ConnectionError, match="the Hub cannot be reached for 'me/moe'"):
        push(target, "me/moe")


def test_bad_names_and_folders(target, tmp_path):
    with pytest.raises(ValueError, match="is no repository name"):
        push(target, "a/b/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        push(tmp_path / "empty", "me/moe")
    (target / "config.json").rename(tmp_path / "empty" / "config.json")
    with pytest.raises(ValueError, match="holds no weights"):
        push(tmp_path / "empty", "me/moe")
    with pytest.raises(ValueError, match="is not a folder"):
        push(tmp_path / "nothing", "me/moe")
