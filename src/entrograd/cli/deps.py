"""`entrograd deps`: the code that dvc.yaml says each stage runs on, against what imports tell."""

from __future__ import annotations

import argparse

HELP = "whether dvc.yaml lists the code every stage runs on; --write corrects it"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    parser.add_argument("--write", action="store_true", help="correct dvc.yaml")


def run(given: argparse.Namespace) -> None:
    """Compare, and correct where that is asked for."""
    from entrograd.errors import InputError
    from entrograd.pipeline.deps import ROOT, differences, with_code
    from entrograd.storage.files import write_text

    file = ROOT / "dvc.yaml"
    if not file.is_file():
        raise InputError(f"{file}: no such file; run it in a checkout of the project")
    before = file.read_text(encoding="utf-8")
    after = with_code(before)
    if given.write and before != after:
        write_text(file, after)
    elif before != after:
        changes = differences(before, after) or ["the order of its lines is another"]
        raise InputError("\n".join([f"{file.name}:", *changes, "write it: entrograd deps --write"]))
    changed = len(differences(before, after))
    print(f"dvc.yaml: {f'{changed} changes' if changed else 'every stage lists its code'}")
