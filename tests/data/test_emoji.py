import json
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from sagl.data import emoji
from sagl.data.emoji import EmojiData, prepare_emoji, read_split, render
from sagl.data.emoji_icons import (
    CATEGORIES,
    FAMILIES,
    base_name,
    identify_emoji,
    read_icons,
    select_variants,
    svg_document,
)
from sagl.errors import UserError
from tests.helpers.errors import refused

ANIMALS = [f"animal-{i}" for i in range(60)]
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
PEOPLE = [f"{gender}-running" for gender in ("man", "woman", "person")]
OTHERS = {"Symbols": ["keycap-1"], "Flags": ["flag-norway"], "People & Body": [*PEOPLE, "middle-finger"]}


def square(colour, icon_size=8):
    return {"body": f'<rect x="1" y="1" width="{icon_size - 2}" height="{icon_size - 2}" fill="#{colour:06x}"/>'}


def write_packages(root, families=tuple(FAMILIES), **changes):
    """Write packages of squares whose colour depends on name and family; fxemoji has no skin tones and no hyphens."""
    for number, family in enumerate(families):
        oldest = family == "fxemoji"
        toned = [] if oldest else [f"{name}-{tone}-skin-tone" for name in PEOPLE for tone in TONES]
        names = [*ANIMALS, *(name for others in OTHERS.values() for name in others), *toned]
        icons = {
            (name.replace("-", "") if oldest else name): square((7919 * i + 104729 * number) % 0xC00000)
            for i, name in enumerate(names)
        }
        categories = {"Animals & Nature": ANIMALS, **OTHERS, "People & Body": OTHERS["People & Body"] + toned}
        folder = root / "node_modules" / "@iconify-json" / family
        folder.mkdir(parents=True)
        content = {"icons": icons | changes.get("icons", {}), "aliases": changes.get("aliases", {})}
        content |= {"width": 8, "height": 8}
        (folder / "icons.json").write_text(json.dumps(content))
        (folder / "package.json").write_text(json.dumps({"version": changes.get("version", "1.2.3")}))
        if family in ("twemoji", "noto"):
            (folder / "metadata.json").write_text(json.dumps({"categories": categories}))
    return root


def arrays_of(root, max_variants=2):
    with np.load(prepare_emoji(root, max_variants)) as arrays:
        return dict(arrays)


def icons_of(root):
    return read_icons({family: root / "node_modules" / "@iconify-json" / family for family in FAMILIES})


def test_all_images_of_an_emoji_are_in_the_same_split(tmp_path):
    arrays = arrays_of(write_packages(tmp_path))
    splits = defaultdict(set)
    for name, test in zip(arrays["emoji"].tolist(), arrays["test"].tolist(), strict=True):
        splits[name].add(test)
    assert {len(sides) for sides in splits.values()} == {1}
    assert {side for sides in splits.values() for side in sides} == {True, False}
    assert Counter(arrays["family"][arrays["emoji"] == "animal7"].tolist()) == dict.fromkeys(FAMILIES, 1)


def test_the_split_of_an_emoji_does_not_depend_on_the_others(tmp_path):
    few = arrays_of(write_packages(tmp_path / "few"))
    more = arrays_of(write_packages(tmp_path / "more", aliases={"new-name": {"parent": "animal-7"}}, version="2"))
    assert set(few["emoji"][few["test"]]) == set(more["emoji"][more["test"]])


@pytest.mark.parametrize(
    ("connections", "expected"),
    [
        ([("b", "a"), ("c", "b")], {"a": "a", "b": "a", "c": "a"}),
        ([("U+1", "c"), ("U+1", "b")], {"a": "a", "b": "b", "c": "b", "U+1": "b"}),
        ([("x", "y")], {"a": "a", "b": "b", "c": "c"}),
    ],
)
def test_names_that_are_connected_are_one_emoji(connections, expected):
    assert identify_emoji("abc", connections) == expected


def test_aliases_and_code_points_connect_the_names_of_families(tmp_path):
    write_packages(tmp_path, icons={"cat-face": square(255)}, aliases={"cat-face": {"parent": "animal-3"}})
    (tmp_path / "node_modules/@iconify-json/noto/chars.json").write_text(json.dumps({"1f1": "animal-1"}))
    (tmp_path / "node_modules/@iconify-json/twemoji/chars.json").write_text(json.dumps({"1f1": "animal-2"}))
    emoji_of = {icon.name: icon.emoji for icon in icons_of(tmp_path)}
    assert emoji_of["cat-face"] == emoji_of["animal-3"]
    assert emoji_of["animal-1"] == emoji_of["animal-2"] != emoji_of["animal-3"]


def test_symbols_flags_hidden_icons_and_those_without_a_category_are_excluded(tmp_path):
    write_packages(tmp_path, icons={"animal-5": square(255) | {"hidden": True}, "unknown": square(255)})
    icons = icons_of(tmp_path)
    assert {icon.category for icon in icons} == {"Animals & Nature", "People & Body"}
    excluded = {"animal-5", "keycap-1", "flag-norway", "middle-finger", "unknown"}
    assert not excluded & {icon.name for icon in icons}


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_number_of_variants_per_family_is_limited_and_one_has_no_skin_tone(limit, tmp_path):
    selected = select_variants(icons_of(write_packages(tmp_path)), limit)
    counts = Counter((icon.family, icon.emoji) for icon in selected)
    people = {family: number for (family, name), number in counts.items() if "running" in name}
    assert people == dict.fromkeys(FAMILIES, limit) | {"fxemoji": min(limit, len(PEOPLE))}
    assert {number for (_, name), number in counts.items() if "animal" in name} == {1}
    first = {icon.family: icon.name for icon in reversed(selected) if "running" in icon.emoji}
    assert not [name for name in first.values() if "tone" in name]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("woman-running-medium-dark-skin-tone", "running"),
        ("men-holding-hands-dark-skin-tone-light-skin-tone", "holding-hands"),
        ("mermaid-tone3", "mermaid"),
        ("person-wrestling-medium", "wrestling"),
        ("family-man-woman-boy", "family"),
        ("kiss-woman-man-dark-skin-tone", "kiss"),
        ("six-thirty", "clock"),
        ("woman", "woman"),
        ("womans-hat", "womans-hat"),
        ("manual", "manual"),
    ],
)
def test_variants_share_a_base_name(name, base):
    assert base_name(name) == base


def test_images_are_on_white_centred_and_not_cut_off(tmp_path):
    icon = {"body": '<rect width="8" height="4" fill="#f00"/>', "width": 8, "height": 4}
    image = render(svg_document(icon))
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert (image[:8] == 255).all()
    assert (image[24:] == 255).all()
    assert (image[8:24] == (255, 0, 0)).all()


def test_duplicates_and_nearly_white_images_are_excluded(tmp_path):
    same = {"animal-1": square(255), "animal-2": square(255), "animal-3": {"body": ""}}
    arrays = arrays_of(write_packages(tmp_path, icons=same))
    assert len(np.unique(arrays["images"], axis=0)) == len(arrays["images"])
    assert not (arrays["images"].min(axis=1) > 240).all(axis=(1, 2)).any()
    assert {CATEGORIES[label] for label in arrays["labels"]} == {"Animals & Nature", "People & Body"}


def test_rendering_is_deterministic_and_done_once(tmp_path, cache, monkeypatch):
    root = write_packages(tmp_path)
    first = prepare_emoji(root, 2).read_bytes()
    monkeypatch.setattr(emoji, "render_icons", lambda *_: pytest.fail("rendered twice"))
    assert prepare_emoji(root, 2).read_bytes() == first
    monkeypatch.undo()
    monkeypatch.setenv("SAGL_CACHE", str(cache / "other"))
    again = arrays_of(root)
    monkeypatch.setenv("SAGL_CACHE", str(cache))
    assert all(np.array_equal(again[name], array) for name, array in arrays_of(root).items())


def test_versions_and_settings_determine_the_cache_file(tmp_path):
    old, new = (write_packages(tmp_path / version, version=version) for version in "12")
    assert len({prepare_emoji(old, 1), prepare_emoji(old, 2), prepare_emoji(new, 2)}) == 3


@pytest.mark.parametrize("missing", ["twemoji", "fxemoji"])
def test_a_missing_package_is_named_with_the_install_command(missing, tmp_path):
    root = write_packages(tmp_path / "root", [family for family in FAMILIES if family != missing])
    with refused("`data.root`", root, missing, "npm install @iconify-json/"):
        EmojiData(root=str(root)).prepare_data()


def test_the_test_split_is_part_of_the_package_and_the_training_split_needs_the_icons(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    images, version = read_split(train=False, argument="reference")
    assert (images.shape, images.dtype, version) == ((689, 3, 32, 32), torch.uint8, "")
    with refused("`reference`", tmp_path / "emoji", "npm install"):
        read_split(train=True, argument="reference")
    root = write_packages(tmp_path / "emoji")
    images, version = read_split(train=True, argument="reference")
    arrays = arrays_of(root)
    assert np.array_equal(images, arrays["images"][~arrays["test"]])
    assert version == prepare_emoji(root, 2).stem


def test_a_missing_renderer_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"resvg_py.*sagl\[emoji\]"):
        EmojiData(root=str(write_packages(tmp_path))).prepare_data()


def test_loaders_return_the_images_of_their_split_with_category_labels(tmp_path):
    module = EmojiData(root=str(write_packages(tmp_path)), batch_size=16, num_validation=5)
    module.prepare_data()
    arrays = arrays_of(tmp_path)
    label_of = {image.tobytes(): int(label) for image, label in zip(arrays["images"], arrays["labels"], strict=True)}
    training = list(module.train_dataloader())
    assert {tuple(images.shape) for images, _ in training} == {(16, 3, 32, 32)}
    assert {(images.dtype, labels.dtype) for images, labels in training} == {(torch.uint8, torch.int64)}
    validation, test = (
        torch.cat([images for images, _ in loader]) for loader in (module.val_dataloader(), module.test_dataloader())
    )
    assert torch.equal(torch.cat([validation, test]), torch.from_numpy(arrays["images"][arrays["test"]]))
    assert len(validation) == 5
    pairs = [
        (image.contiguous().numpy().tobytes(), int(label))
        for images, labels in training
        for image, label in zip(images, labels, strict=True)
    ]
    assert all(label_of[image] == label for image, label in pairs)
    held_out = {image.numpy().tobytes() for image in torch.cat([validation, test])}
    assert not held_out & {image for image, _ in pairs}


@pytest.mark.parametrize(("argument", "value"), [("max_variants", 0), ("num_validation", 10**6)])
def test_settings_that_leave_no_images_are_refused(argument, value, tmp_path):
    with pytest.raises(UserError, match=argument):
        EmojiData(root=str(write_packages(tmp_path)), **{argument: value}).test_dataloader()
