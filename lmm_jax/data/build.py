"""Write a LLaVA file and its images as one ArrayRecord data set.

    python -m lmm_jax.data.build --json=train.json --images=images --out=records

Image bytes are stored as they are. Order is kept, so record 7 stays record 7. Read it
back with `lmm_jax.data.sources.TfdsSource`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lmm_jax.data.sources import BadRecord, LlavaJson


class LlavaRecords(tfds.core.GeneratorBasedBuilder):
    """id, encoded images, turns and the other fields (JSON) of each record.

    Args:
        source: what to write.
        out: root folder; records go to `out/llava_records/1.0.0`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for checksums beside the code, with a package it does not declare.
    code_path = None

    def __init__(self, *, source: LlavaJson, out: str | Path):
        self._records = source
        super().__init__(data_dir=str(out), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            # Images as Text: TFDS cannot skip decoding inside a sequence of images.
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "images": tfds.features.Sequence(text),
                    "turns": tfds.features.Sequence({"from": text, "value": text}),
                    "meta": text,
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(len(self._records)):
            record = self._records[index]
            try:
                images = [Path(image).read_bytes() for image in record.images]
            except OSError as error:
                raise BadRecord(
                    "missing image",
                    f"{self._records.name(index)}: {error}; repair what "
                    "python -m lmm_jax.data.check lists, then build",
                ) from error
            yield (
                index,
                {
                    "id": record.id,
                    "images": images,
                    "turns": list(record.turns),
                    "meta": json.dumps(record.meta),
                },
            )


def build(source: LlavaJson, out: str | Path) -> Path:
    """Write all records; returns the folder to give to `TfdsSource`.

    Raises:
        BadRecord: the first record that is malformed or whose image is missing.
    """
    builder = LlavaRecords(source=source, out=out)
    builder.download_and_prepare()
    return Path(builder.data_dir)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, help="LLaVA JSON or JSONL file")
    parser.add_argument("--images", default="", help="root of the image paths")
    parser.add_argument("--out", required=True, help="root of the data set")
    options = parser.parse_args(arguments)
    source = LlavaJson(options.json, options.images)
    print(f"{len(source)} records in {build(source, options.out)}")


if __name__ == "__main__":
    main()
