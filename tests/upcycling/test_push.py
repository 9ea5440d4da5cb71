"""Pushing, against the operations that huggingface_hub would send."""

import huggingface_hub
import pytest
from dense import save_dense
from huggingface_hub import _upload_pipeline
from huggingface_hub.errors import HTTPError

from hf_moe.upcycling import push, upcycle


@pytest.fixture
def target(tmp_path):
    return upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", experts=2, progress=False)


def test_creates_the_repository_and_commits_every_file(target, monkeypatch):
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


def test_no_network(target, monkeypatch):
    def unreachable(*_, **__):
        raise HTTPError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(ConnectionError, match="the Hub cannot be reached for 'me/moe'"):
        push(target, "me/moe")


def test_bad_names_and_folders(target, tmp_path):
    with pytest.raises(ValueError, match="is no repository name"):
        push(target, "a/b/c")
    with pytest.raises(ValueError, match="was not made by hf-moe upcycle"):
        push(tmp_path / "dense", "me/moe")
    with pytest.raises(ValueError, match="is not a folder"):
        push(tmp_path / "nothing", "me/moe")
