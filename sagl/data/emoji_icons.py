"""SVG icons of emoji in Iconify's npm packages: which emoji each icon shows, and its category.

Families name the same emoji differently, so names connected by an alias or a code point count as one emoji, and so do
the skin tones and genders of a person, and all clock faces.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FAMILIES = {
    "twemoji": "1.2.5",  # CC BY 4.0
    "noto": "1.2.9",  # Apache-2.0
    "fluent-emoji-flat": "1.2.6",  # MIT
    "fluent-emoji": "1.2.7",  # MIT
    "noto-v1": "1.2.5",  # Apache-2.0
    "emojione": "1.2.3",  # CC BY 4.0
    "fxemoji": "1.2.2",  # Apache-2.0
}
"""Version of each package @iconify-json/NAME in the install command. If two disagree on a category, the first decides.

Other versions can be used, but contain other images.
"""
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
"""Class labels 0 to 6: Unicode's categories without Symbols and Flags, which contain few objects."""
EXCLUDED = ("family", "middlefinger")
"""Excluded emoji: families are black squares with silhouettes in newer packages; the other is a rude gesture."""
TONE = re.compile(r"-(tone\d|(medium-)?(dark|light)(-skin-tone)?|medium(-skin-tone)?)$")
GENDER = re.compile(r"^(man|woman|person|men|women|people)-(?=.)")
GROUP = re.compile(r"^(family|kiss|couple-with-heart)-|-(oclock|thirty)$")


class Icon(NamedTuple):
    """An SVG image of an emoji in one family."""

    family: str
    name: str
    emoji: str
    """Name of the emoji, the same in all families."""
    category: str
    svg: str


def read_icons(packages: dict[str, Path]) -> list[Icon]:
    """Return the icons of all packages whose category is one of CATEGORIES.

    Icons that cannot be assigned to an emoji are excluded, because their split is unknown, and so are hidden icons,
    which are outdated duplicates.
    """
    files = {family: _read_json(folder / "icons.json") for family, folder in packages.items()}
    categories = dict(_categories(packages))
    emoji_of, icons = identify_emoji(categories, _connections(packages, files)), []
    for family, file in files.items():
        for name, icon in file["icons"].items():
            emoji = emoji_of.get(_plain(name))
            category = categories.get(_plain(name)) or categories.get(emoji or "")
            if emoji and emoji not in EXCLUDED and category in CATEGORIES and not icon.get("hidden"):
                icons.append(Icon(family, name, emoji, category, svg_document(file | icon)))
    return icons


def identify_emoji(known: Iterable[str], connections: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the emoji of each name: the alphabetically first of the `known` names that it is connected to.

    Names without a connection to a known name are left out.
    """
    parents, known = {name: name for name in known}, set(known)

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            parents[name] = name = parents[parents[name]]
        return name

    for a, b in connections:
        first, second = sorted((root(a), root(b)), key=lambda name: (name not in known, name))
        parents[second] = first
    return {name: root(name) for name in parents if root(name) in known}


def select_variants(icons: list[Icon], max_variants: int) -> list[Icon]:
    """Keep at most `max_variants` random icons per emoji and family, one of them without skin tone if there is one.

    Without a limit, people in five skin tones and three genders are more than half of the images.
    """
    groups = defaultdict(list)
    for icon in sorted(icons, key=lambda i: digest(f"{i.family} {i.name}")):
        groups[icon.family, icon.emoji].append(icon)
    selected = []
    for group in groups.values():
        first = min(group, key=lambda i: bool(TONE.search(i.name)))
        selected += [first, *(icon for icon in group if icon is not first)][:max_variants]
    return selected


def svg_document(icon: dict[str, Any]) -> str:
    """Return an icon, centred in a square, as an SVG document."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", 16), icon.get("height", 16)
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'


def _categories(packages: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield (plain name, category), the first family last."""
    for folder in reversed(packages.values()):
        categories = _read_json(folder / "metadata.json").get("categories", {})
        if "Animals & Nature" in categories:  # one of Unicode's; some families have other categories
            yield from ((_plain(name), category) for category, names in categories.items() for name in names)


def _connections(packages: dict[str, Path], files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield pairs of plain names of the same emoji: by alias, code point, and skin tone or gender."""
    for family, folder in packages.items():
        aliases = files[family].get("aliases", {})
        yield from ((_plain(name), _plain(alias["parent"])) for name, alias in aliases.items())
        yield from ((f"U+{point}", _plain(name)) for point, name in _read_json(folder / "chars.json").items())
        yield from ((_plain(name), _plain(base_name(name))) for name in [*files[family]["icons"], *aliases])


def base_name(name: str) -> str:
    """Return the name that variants share: running for woman-running-dark-skin-tone, clock for six-thirty."""
    while (shorter := TONE.sub("", name)) != name:
        name = shorter
    if group := GROUP.search(name):
        return group[1] or "clock"
    return GENDER.sub("", name)


def _plain(name: str) -> str:
    """Return a name in lower case and without hyphens, as in fxemoji."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dictionary if there is no file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def digest(text: str) -> str:
    """Return the SHA-256 hex digest of a text, which serves as a reproducible random order."""
    return hashlib.sha256(text.encode()).hexdigest()
