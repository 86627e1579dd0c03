"""Captions from labels. What a group shares can be hidden, so that the references must carry it; not in the words of a heap's image,
which are one caption and have no labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

GIVEN = "given"  # category of an image of a heap whose concept is the group that its source names; without such a group it has none
LABELS = ("subject", "gender", "tone", "style", "colors")
#: What the members of a group have in common, by kind: the prompt of a sample leaves it out.
SHARED = {
    "subject": ("subject", "gender", "colors"),
    "person": ("style", "gender", "tone", "colors"),
    "style": ("style", "colors"),
}


def is_caption(labels: Mapping[str, str]) -> bool:
    """Whether the words of an image, which is of a heap, are one caption."""
    return labels.get("category") in ("", GIVEN)


def caption(labels: Mapping[str, str], hide: Collection[str] = ("colors",)) -> str:
    """`farmer, woman, dark skin, twemoji style`, without the labels named in `hide`; never empty."""
    if is_caption(labels):
        return labels["subject"]
    shown = {name: labels[name] for name in LABELS if labels[name] and name not in hide}
    words = [shown.get("subject", "emoji"), shown.get("gender", "")]
    words += [f"{shown['tone']} skin" if "tone" in shown else "", f"{shown['style']} style" if "style" in shown else ""]
    words += [f"in {shown['colors']}" if "colors" in shown else ""]
    return ", ".join(w for w in words if w)


def invented(subject: str, other: str) -> str:
    """Words that do not exist: the first halves of those of `subject` with second halves of those of `other`."""
    ends = [word[len(word) // 2 :] for word in other.split()] or [""]
    return " ".join(word[: (len(word) + 1) // 2] + ends[i % len(ends)] for i, word in enumerate(subject.split()))


def common_labels(members: list[Mapping[str, str]]) -> dict[str, str]:
    """The labels that all members share; the others are empty."""
    return {name: members[0][name] if len({m[name] for m in members}) == 1 else "" for name in LABELS}
