"""Folders of image files: splits and classes against what was written, and their errors."""

import contextlib
import errno
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from experiments.harness.data.sources.source import (
    Options,
)
from experiments.harness.data.sources.split_names import check_no_sibling_split, check_not_pooled
from experiments.harness.data.splits import describe, first, load, some
from experiments.harness.errors import ConfigError
from tests.experiments.harness.data.image_files import (
    load_folder,
    png_of_16_bits,
    random_image,
    save,
)
from tests.experiments.tiny import refused


@pytest.fixture
def split_folder(tmp_path):
    """Three subfolders with two classes of images each, and what is in them."""
    contents = {}
    for split, number in (("train", 5), ("validation", 2), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(number):
                pixels = random_image(100 * number + 10 * label + i)
                save(tmp_path / split / name / f"{i}.png", pixels)
                contents.setdefault(split, []).append((pixels, label))
    return tmp_path, contents


def test_subfolders_are_splits_and_classes(split_folder):
    root, contents = split_folder
    for split, examples in contents.items():
        described, loaded = load_folder(root, split)
        np.testing.assert_array_equal(loaded.images, np.stack([pixels for pixels, _ in examples]))
        np.testing.assert_array_equal(loaded.labels, [label for _, label in examples])
        assert described.num_classes == 2
        for index, (pixels, label) in enumerate(examples):
            image, told = pickle.loads(pickle.dumps(described.get))(index)
            np.testing.assert_array_equal(image, pixels)
            assert told == label


@pytest.mark.parametrize("fault", ["another class", "an image outside of classes"])
def test_no_classes_where_they_are_not_those_of_every_image(fault, split_folder):
    root, _ = split_folder
    if fault == "another class":
        (root / "test" / "dog").rename(root / "test" / "cow")
    else:
        save(root / "train" / "loose.png", random_image(0))
    described, loaded = load_folder(root, "train")
    assert described.num_examples == 10 + (fault != "another class")
    assert described.num_classes == 0
    assert loaded.labels is None


def test_splits_by_other_names(split_folder):
    root, contents = split_folder
    (root / "validation").rename(root / "val")
    described, _ = load_folder(root, "validation", {"validation": "val"})
    assert described.num_examples == len(contents["validation"])


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "val", "Test"),
        ("training", "valid", "testing"),
        ("mine/train", "mine/validation", "mine/test"),
    ],
)
def test_usual_spellings_are_taken_for_what_they_are(names, tmp_path):
    for number, name in enumerate(names):
        for i in range(number + 1):
            save(tmp_path / name / "cat" / f"{i}.png", random_image(i, 4, 4))
    for number, split in enumerate(("train", "validation", "test")):
        described, _ = load_folder(tmp_path, split, image_size=4)
        assert (described.num_examples, described.num_classes) == (number + 1, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat/train", "cat/test", "dog/train", "dog/test"), "would be pooled and split by a seed"),
        (("train2017", "val2017"), "config.data.splits.train=train2017"),
        (("train", "val_images", "test"), "config.data.splits.validation=val_images"),
        (("train", "val", "valid", "test"), "val and valid"),
        (("a/train", "a/test", "b/train", "b/test"), "like train;"),
        (("trainA", "trainB", "testA", "testB"), "config.data.splits.train=trainA"),
        (("trainset", "testset"), "config.data.splits.train=trainset"),
        (("TrainImages", "TestImages"), "config.data.splits.train=TrainImages"),
        (("imagesTr", "imagesTs"), "config.data.splits.train=imagesTr"),
        (("trains", "tests"), "config.data.splits.train=trains"),
        (("a/trainset", "b/testset"), "would be pooled and split by a seed"),
        (("train", "dev", "test"), "config.data.splits.validation=dev"),
        (("train", "eval"), "config.data.splits.test=eval"),
    ],
)
def test_what_looks_like_splits_without_being_taken_so_is_refused(names, message, tmp_path):
    for name in names:
        save(tmp_path / name / "0.png", random_image(0, 4, 4))
    with refused(message):
        describe("folder", "train", data_dir=str(tmp_path), options=Options(image_size=4))


def test_file_names_that_look_like_splits_are_refused(tmp_path):
    names = ("train_0", "train_1", "test_0")
    for name in (*names, "x"):
        save(tmp_path / f"{name}.png", random_image(0, 4, 4))
    with refused("train_0.png", "test_0.png", "would be pooled"):
        describe("folder", "train", data_dir=str(tmp_path), options=Options(image_size=4))
    check_not_pooled(tmp_path, [f"{name}.png" for name in (*names, *"abcd")])  # by chance
    check_not_pooled(tmp_path, ["train_test/a.png", "train_test/b.png", "other/c.png"])


def test_folders_beside_the_splits_are_named_once(split_folder, capsys):
    root, _ = split_folder
    (root / "annotations").mkdir()
    save(root / "loose.png", random_image(0, 4, 4))
    for split in ("train", "test"):
        describe("folder", split, data_dir=str(root), options=Options(image_size=4))
    [line] = capsys.readouterr().out.splitlines()
    assert "left out 'annotations', 'loose.png'" in line


@pytest.mark.parametrize(
    ("name", "sibling", "is_refused"),
    [
        ("train", "test_images", True),
        ("photos_train", "photos_test", True),
        ("training", "trainset", False),
        ("photos_train", "test_logs", False),
        ("photos", "test", False),
    ],
)
def test_a_split_beside_another_is_not_split_itself(name, sibling, is_refused, tmp_path):
    for path in (tmp_path / name, tmp_path / sibling):
        path.mkdir()
        (tmp_path / f"{path.name}.npz").write_bytes(b"")
    for path, ending in ((tmp_path / name, ""), (tmp_path / f"{name}.npz", ".npz")):
        parts = path.name, sibling, str(tmp_path), "split by a seed"
        with refused(*parts) if is_refused else contextlib.nullcontext():
            check_no_sibling_split(path, ending)


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_both_formats_look_beside_the_set(name, tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "0.png", random_image(0, 4, 4))
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((9, 4, 4), np.uint8))
    ending = ".npz" if name == "npz" else ""
    with refused("beside it like test"):
        describe(name, "train", data_dir=str(tmp_path / f"train{ending}"))


def test_one_name_that_resembles_a_split_may_be_a_class(tmp_path):
    for name in ("crash_test_dummy", "car"):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", random_image(i, 4, 4))
    assert load_folder(tmp_path, "train", image_size=4)[0].num_classes == 2


def test_files_that_are_no_images_to_be_read(split_folder, capsys):
    root, _ = split_folder
    save(root / "train" / "cat" / "a.tga", random_image(0))
    os.mkfifo(root / "test" / "dog" / "z\x1b[31m.png")  # the last one: found by the fingerprint
    os.mkfifo(root / "validation" / "cat" / "-first.png")
    (root / "train" / "cat" / "b.jp2").write_bytes(b"")
    describe("folder", "train", data_dir=str(root), options=Options(image_size=4))
    [line] = capsys.readouterr().out.splitlines()
    assert "1 .tga, 1 .jp2" in line
    with pytest.raises(ConfigError, match="no regular file") as error:
        describe("folder", "test", data_dir=str(root), options=Options(image_size=4)).fingerprint()
    assert str(error.value).isprintable()
    with pytest.raises(ConfigError, match="no regular file"):
        describe("folder", "validation", data_dir=str(root), options=Options(image_size=4))


def test_a_name_that_is_not_utf_8_is_shown_escaped(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    with refused("\\udcff.png cannot be read") as error:
        describe("folder", "test", data_dir=str(tmp_path), options=Options(image_size=4))
    str(error.value).encode()


@pytest.mark.parametrize("name", ["folder", "npz", "idx"])
def test_a_path_that_no_file_system_has_is_refused_in_one_line(name):
    with refused() as error:
        describe(name, "train", data_dir="x" * 5000)
    assert len(str(error.value)) < 600


def test_why_there_are_no_classes(split_folder):
    root, _ = split_folder
    (root / "test" / "dog").rename(root / "test" / "cow")
    described = describe("folder", "train", data_dir=str(root), options=Options(image_size=4))
    assert described.unlabelled == f"{root / 'train'} has no class cow"


def as_set(images) -> set:
    return {image.tobytes() for image in images}


def test_validation_is_cut_out_of_train_where_it_is_missing(split_folder):
    root, contents = split_folder
    (root / "validation").rename(root.parent / f"{root.name}-elsewhere")
    train, validation = (
        load_folder(root, split, held_out=0.2)[1] for split in ("train", "validation")
    )
    assert (len(train.images), len(validation.images)) == (8, 2)
    together = as_set(train.images) | as_set(validation.images)
    assert together == as_set(pixels for pixels, _ in contents["train"])
    assert load_folder(root, "test")[0].num_examples == 6


def test_an_unsplit_folder_is_split_by_seed(tmp_path):
    for i in range(20):
        save(tmp_path / f"{'ab'[i % 2]}" / f"{i}.png", random_image(i, 4, 4))
    splits = ("train", "validation", "test")

    def parts(seed):
        return [
            load_folder(tmp_path, split, image_size=4, held_out=0.15, split_seed=seed)[1]
            for split in splits
        ]

    first = parts(0)
    assert [len(part.images) for part in first] == [14, 3, 3]
    assert set().union(*(as_set(part.images) for part in first)) == as_set(
        random_image(i, 4, 4) for i in range(20)
    )
    for part, again in zip(first, parts(0), strict=True):
        np.testing.assert_array_equal(part.images, again.images)
        np.testing.assert_array_equal(part.labels, again.labels)
    assert as_set(first[2].images) != as_set(parts(1)[2].images)


def test_other_files_are_no_images(tmp_path):
    save(tmp_path / "test" / "a.PNG", random_image(0))
    (tmp_path / "test" / "notes.txt").write_text("no image")
    (tmp_path / "test" / "._a.png").write_text("hidden")
    assert load_folder(tmp_path, "test")[0].num_examples == 1


def test_a_damaged_image_names_its_file_and_the_remedy(split_folder):
    root, _ = split_folder
    path = root / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:1500])
    with refused(str(path), "config.data.skip_corrupt=True"):
        load_folder(root, "train")
    load_folder(root, "test")


def test_damaged_images_are_skipped_and_counted_if_asked(split_folder, capsys):
    root, _ = split_folder
    whole = load_folder(root, "train")[1].images
    for name, content in (("0.png", b""), ("3.png", b"no image")):
        (root / "train" / "dog" / name).write_bytes(content)
    described, loaded = load_folder(root, "train", skip_corrupt=True)
    assert described.num_examples == 8
    np.testing.assert_array_equal(loaded.images, np.delete(whole, [5, 8], axis=0))
    np.testing.assert_array_equal(loaded.labels, [0] * 5 + [1] * 3)
    [line] = capsys.readouterr().out.splitlines()
    assert "skipped 2 of 10 images" in line
    assert "dog/0.png" in line


def test_what_cannot_be_used_is_found_where_damaged_files_are_sought(tmp_path):
    """Before training, and not at the step that first needs it."""
    save(tmp_path / "test" / "whole.png", random_image(0, 2, 2))
    (tmp_path / "test" / "deep.png").write_bytes(png_of_16_bits(colour=True))
    options = Options(image_size=2, skip_corrupt=True)
    with pytest.raises(ConfigError, match=r"deep.png: it has more than 8 bits"):
        describe("folder", "test", data_dir=str(tmp_path), options=options)


def test_linked_folders_are_classes_and_a_link_upwards_is_no_loop(tmp_path):
    pixels = {name: random_image(seed, 2, 2) for seed, name in enumerate(("cat", "dog"))}
    for name, image in pixels.items():
        save(tmp_path / "all" / name / "0.png", image)
        (tmp_path / "some" / "test").mkdir(parents=True, exist_ok=True)
        (tmp_path / "some" / "test" / name).symlink_to(tmp_path / "all" / name)
    (tmp_path / "all" / "cat" / "up").symlink_to(tmp_path / "all")
    (tmp_path / "some" / "test" / "again").symlink_to(tmp_path / "some" / "test")
    described, loaded = load_folder(tmp_path / "some", "test", image_size=2)
    assert described.num_classes == 2
    np.testing.assert_array_equal(loaded.images, [pixels["cat"], pixels["dog"]])
    np.testing.assert_array_equal(loaded.labels, [0, 1])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def walk(root, onerror, followlinks):
        onerror(PermissionError(errno.EACCES, "Permission denied", f"{root}/closed"))
        return iter(())

    save(tmp_path / "test" / "a.png", random_image(0, 2, 2))
    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(ConfigError, match=r"closed cannot be listed \(Permission denied\)"):
        load_folder(tmp_path, "test", image_size=2)


def test_some_are_decoded_and_the_others_need_not_be_whole(tmp_path):
    images = [random_image(seed, 2, 2) for seed in range(40)]
    for number, image in enumerate(images):
        save(tmp_path / "train" / f"class_{number // 10}" / f"{number:02}.png", image)
    save(tmp_path / "validation" / "class_0" / "0.png", images[0])
    arguments = {"data_dir": str(tmp_path), "options": Options(image_size=2)}
    chosen = load("folder", "test", splits={"test": "train"}, choose=some(12), **arguments)
    whole = load("folder", "test", splits={"test": "train"}, **arguments)
    places = some(12)(40)
    assert len(set(places)) == 12
    np.testing.assert_array_equal(places, np.sort(places))
    np.testing.assert_array_equal(chosen.images, whole.images[places])
    np.testing.assert_array_equal(chosen.labels, whole.labels[places])
    # Sorted by class as they lie, and yet of every class.
    assert set(chosen.labels) == set(whole.labels)
    for number in set(range(40)) - {0, 1, 2}:
        (tmp_path / "train" / f"class_{number // 10}" / f"{number:02}.png").write_bytes(b"no")
    few = load("folder", "test", splits={"test": "train"}, choose=first(3), **arguments)
    np.testing.assert_array_equal(few.images, images[:3])


def test_another_file_is_another_set(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name[0] / "test" / name, random_image(0, 2, 2))
    save(tmp_path / "c" / "test" / "a.png", random_image(0, 2, 2))
    a, b, c = (load_folder(tmp_path / of, "test", image_size=2)[0].fingerprint() for of in "abc")
    assert a != b
    assert a == c


def test_missing_folder_or_split(tmp_path, split_folder):
    root, _ = split_folder
    for data_dir in (str(tmp_path / "nowhere"), "", None):
        with pytest.raises(ConfigError, match=r"config\.data\.data_dir = .* is no folder"):
            describe("folder", "train", data_dir=data_dir)
    with refused("config.data.splits.extra = 'more'", match="has only train, validation, test"):
        load_folder(root, "extra", {"extra": "more"})
    empty = tmp_path / "empty"
    empty.mkdir()
    with refused(".png", match="no image in"):
        load_folder(empty, "train")


def test_a_share_of_no_image_is_refused(tmp_path):
    save(tmp_path / "a.png", random_image(0))
    with refused("config.data.held_out = 0.01"):
        load_folder(tmp_path, "train", held_out=0.01)


def test_an_image_too_large_to_be_safe_is_named(tmp_path, monkeypatch):
    save(tmp_path / "test" / "large.png", random_image(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ConfigError, match=r"large\.png: it is too large"):
        load_folder(tmp_path, "test")
