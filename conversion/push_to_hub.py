"""Share a model's folder and print its address: `python conversion/push_to_hub.py FOLDER OWNER/NAME`."""

import argparse

import typer

from hf_moe.cli import one_sentence
from hf_moe.upcycling import push

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder with config.json and safetensors")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--private", action="store_true")
    arguments = parser.parse_args()
    with one_sentence(resumable=True):
        typer.echo(push(arguments.folder, arguments.repo_id, private=arguments.private))
