"""Share a converted folder: `python conversion/push_to_hub.py FOLDER OWNER/NAME`."""

import argparse

from hf_moe.upcycling import push

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder that hf-moe upcycle made")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--private", action="store_true")
    arguments = parser.parse_args()
    push(arguments.folder, arguments.repo_id, private=arguments.private)
