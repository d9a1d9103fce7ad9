"""Hashes of files, folders and text."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256(path: Path | str) -> str:
    """The sha256 of a file, or of a folder: of its files' relative names and hashes."""
    path = Path(path)
    if path.is_dir():
        lines = [
            f"{file.relative_to(path).as_posix()} {sha256(file)}"
            for file in sorted(path.rglob("*"))
            if file.is_file()
        ]
        return text_hash("\n".join(lines))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(*parts: str) -> str:
    """The sha256 of strings, each closed by a zero byte so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
