"""tensorflow-datasets sets for tests: random ones in memory, and given ones on disk.

Neither needs a network or TensorFlow.

A smoke test of configs/cifar10.py, unchanged but for its size:

    with mock_tfds(num_examples=32):
        train(config, workdir)

Within `mock_tfds`, every set that tensorflow-datasets knows by name exists, with its true features:
cifar10 has 32×32×3 images, mnist 28×28×1. Every split expression is accepted, unknown ones and
'train[:45000]' too, and has the same `num_examples` examples: example i is drawn from a generator
seeded by i, grey levels uniform on 0..254. Any data_dir is ignored, nothing is read or written.

It replaces methods of tensorflow-datasets' classes in this process, so `load` must be called
inside the `with`, and a child process needs its own. What it cannot show is how split expressions
cut a set, what a missing one says, or that records are decoded: for that, `write_cifar10`.
"""

import io
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np


@contextmanager
def mock_tfds(num_examples: int) -> Iterator[None]:
    """Random images for every set and split, as above."""
    import tensorflow_datasets as tfds

    # USE_CODE: features from the set's source, as the wheel comes without its metadata files.
    policy = tfds.testing.MockPolicy.USE_CODE
    with tfds.testing.mock_data(num_examples, policy=policy):
        yield


def write_cifar10(
    data_dir: pathlib.Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> pathlib.Path:
    """Prepares cifar10 under data_dir as tensorflow-datasets does, from given examples.

    Args:
      data_dir: for config.data.data_dir.
      splits: images uint8 [n, 32, 32, 3] and labels [n], which are stored in this order.

    Returns:
      The set's own directory.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=data_dir, file_format="array_record")
    builder.data_path.mkdir(parents=True)
    infos = []
    for split, (images, labels) in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=builder.data_path,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="array_record",
        )
        info = tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(images)],
            num_bytes=images.nbytes,
            filename_template=template,
        )
        _write_records(info.filepaths[0], builder.info.features, split, images, labels)
        infos.append(info)
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)
    return pathlib.Path(builder.data_path)


def _write_records(path, features, split, images, labels):
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        example = {"image": png.getvalue(), "label": int(label), "id": f"{split}_{index:05d}"}
        writer.write(features.serialize_example(example))
    writer.close()
