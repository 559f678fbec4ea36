"""The files of a hub folder: lazily read tensors, and shards that are written whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


class OnDisk:
    """One tensor of a file; reading a part reads no more than that."""

    def __init__(self, part: Any):
        self._part = part

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._part.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._part[index]


class Folder(Mapping[str, OnDisk]):
    """Tensors of a folder, or of one file, by name.

    Raises (when opened):
        FileNotFoundError: no folder, no `config.json`, no weights, or a missing shard.
        ValueError: a file that is not JSON or not safetensors, or is cut short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{path} is no folder; download the model first, for example with "
                "`hf download NAME --local-dir DIR`."
            )
        self.config = read_json(self.path / "config.json")
        index = self._index()
        files = set(index.values()) if index else {SINGLE}
        self._open = {file: self._checked(file) for file in files}
        held = {file: set(opened.keys()) for file, opened in self._open.items()}
        self._where = index or dict.fromkeys(held[SINGLE], SINGLE)
        for name, file in self._where.items():
            if name not in held[file]:
                raise ValueError(
                    f"{self.path / file} lacks {name!r}, which {INDEX} lists."
                )

    def __getitem__(self, name: str) -> OnDisk:
        return OnDisk(self._open[self._where[name]].get_slice(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def _index(self) -> dict[str, str] | None:
        """Tensor name -> file name; None where one file holds all."""
        if (self.path / INDEX).is_file():
            found = read_json(self.path / INDEX)["weight_map"]
            for file in sorted(set(found.values())):
                if not (self.path / file).is_file():
                    raise FileNotFoundError(
                        f"{self.path} lacks the shard {file}; download it again."
                    )
            return found
        if (self.path / SINGLE).is_file():
            return None
        pickled = sorted(p.name for p in self.path.glob("*.bin"))
        if pickled:
            raise FileNotFoundError(
                f"{self.path} has {pickled[0]} but no safetensors: pickled weights can "
                "run code and are not read. Convert them, or download the safetensors."
            )
        raise FileNotFoundError(f"{self.path} has neither {SINGLE} nor {INDEX}.")

    def _checked(self, file: str) -> Any:
        try:
            return safetensors.safe_open(self.path / file, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path / file} is no complete safetensors file ({error}); "
                "download it again."
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a hub folder.

    Raises:
        FileNotFoundError, ValueError: no such file; not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: is it a model folder?"
        )
    try:
        found = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object.")
    return found


def write(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a folder; `config.json` comes last, so a folder that has it is complete.

    Args:
        path: made when missing; must not hold a model.
        config: for `config.json`.
        tensors: (name, value), consumed one by one.
        shard_bytes: size beyond which another file is begun.

    Raises:
        ValueError: the folder already holds a model.
        OSError: it cannot be written.
    """
    path = Path(path)
    if (path / "config.json").exists():
        raise ValueError(f"{path} already holds a model; choose another folder.")
    path.mkdir(parents=True, exist_ok=True)
    held: dict[str, np.ndarray] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        names.append(list(held))
        save_file(held, path / f".shard-{len(names)}.partial", {"format": "pt"})
        held.clear()

    for name, value in tensors:
        if held and size + value.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = value
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    files = [
        f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
    ]
    if len(names) == 1:
        files = [SINGLE]
    for i, file in enumerate(files):
        os.replace(path / f".shard-{i + 1}.partial", path / file)
    if len(names) > 1:
        where = {name: file for file, inside in zip(files, names) for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    return path
