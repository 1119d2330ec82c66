"""How often test groups were used: each version that was tested on them had its chance to win by luck."""

from typing import Any

from cappy.evaluation.leaks import merged, shared
from cappy.registry.models import ATTEMPT_TAG, TESTED_TAG, Version
from cappy.registry.versions import others

_SAME_TEST = 0.5
"""A version that has this share of the groups in its own tag was tested on them before: its place stays."""


def number(client: Any, version: Version, tested_groups: str) -> int:
    """Which attempt on these groups the version is: 1 and what the versions before it used of them.

    A version counts by the share of the groups that it was tested on, so that a row that is added resets nothing; the
    sum is rounded. Versions with the same scorer are one.
    """
    own = shared(tested_groups, version.tags.get(TESTED_TAG, ""))
    used = sum(
        shared(tested_groups, other.tags.get(TESTED_TAG, ""))
        for other in others(client, version)
        if other.manifest_hash != version.manifest_hash and (other.number < version.number or own < _SAME_TEST)
    )
    return 1 + int(used + 0.5)


def record(client: Any, version: Version, tested_groups: str, attempt: int) -> None:
    """Tags the version with the groups and the attempt, or that attempts were not counted (0)."""
    groups = merged(version.tags.get(TESTED_TAG, ""), tested_groups)
    tags = {TESTED_TAG: groups, ATTEMPT_TAG: str(attempt) if attempt else "not counted"}
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.number), key, value)
