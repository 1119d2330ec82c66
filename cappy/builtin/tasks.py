"""Generates the built-in tasks: procedural families, divided into pools and splits that share no instruction."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from random import Random
from typing import Literal, TypeVar, get_args

from cappy.builtin.families import Content, Family, notation, questions, rewriting
from cappy.errors import ConfigError, quote
from cappy.records.instance import Instance, Split, prompt_hash

_Name = TypeVar("_Name", bound=str)
Pool = Literal["llm", "pretraining", "adaptation"]

POOLS: tuple[Pool, ...] = get_args(Pool)
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (*rewriting.FAMILIES, *notation.FAMILIES, *questions.FAMILIES)
}

_POOL_SHARES: Mapping[Pool, float] = {"llm": 0.5, "pretraining": 0.25, "adaptation": 0.25}
_SPLIT_SHARES: Mapping[Pool, Mapping[Split, float]] = {
    "llm": {"train": 0.95, "validation": 0.05},
    "pretraining": {"train": 0.95, "validation": 0.05},
    "adaptation": {"train": 0.5, "validation": 0.1, "test": 0.4},
}
_MAX_MISSES = 2_000


def instances(
    pool: Pool, *, num_per_family: int, seed: int = 0, families: Sequence[str] | None = None
) -> Iterator[Instance]:
    """Generates `num_per_family` instances of each family, in rotation; every instance is a group of its own.

    By default `families` are all families, or for `pretraining` those that are not held out. A hash of the content
    decides its pool, split and template, so that pools and splits share no instruction, whatever the seed. Raises
    ConfigError for an unknown family, for a held-out one in `pretraining`, and if a family has too few instances.
    """
    if pool not in POOLS:
        raise ConfigError(f"pool must be one of {', '.join(POOLS)}, got {quote(pool)}")
    if num_per_family < 1:
        raise ConfigError(f"num_per_family must be at least 1, got {num_per_family}")
    selected_families = [_family(name, pool) for name in families] if families is not None else _families_of(pool)
    streams = [_stream(family, pool, num_per_family, seed) for family in selected_families]
    return chain.from_iterable(zip(*streams, strict=True))


def _pool_of(content_hash: int) -> Pool:
    """The pool for a content hash: half of all contents for the LLM, a quarter for each pool of the scorer."""
    return _pick_by_share(_POOL_SHARES, (content_hash & 0xFFFFFFFF) / 2**32)


def _draw_split(pool: Pool, content_hash: int) -> Split:
    """The split for a content hash in its pool, from other bits than those that determine the pool."""
    return _pick_by_share(_SPLIT_SHARES[pool], (content_hash >> 32) / 2**32)


def _pick_by_share(shares: Mapping[_Name, float], position: float) -> _Name:
    """The name whose interval contains `position`, with the shares placed end to end from 0 to 1."""
    for name, size in shares.items():
        if position < size:
            return name
        position -= size
    return next(reversed(list(shares)))


def _families_of(pool: Pool) -> list[Family]:
    return [family for family in FAMILIES.values() if pool != "pretraining" or not family.held_out]


def _family(name: str, pool: Pool) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"families: unknown family {quote(name)}; choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if pool == "pretraining" and family.held_out:
        raise ConfigError(f"families: {quote(name)} is held out of pretraining; use the adaptation pool")
    return family


def _stream(family: Family, pool: Pool, num: int, seed: int) -> Iterator[Instance]:
    """Yields `num` distinct instances of one family, the same in every process: `Random` hashes a str with SHA-512."""
    rng = Random(f"{seed}/{pool}/{family.name}")
    seen: set[int] = set()
    produced = misses = 0
    while produced < num:
        content = family.draw(rng)
        content_hash = _content_hash(family, content)
        instance = _instance(family, content, pool, content_hash)
        prompt = prompt_hash(instance.instruction)
        if _pool_of(content_hash) != pool or prompt in seen:
            misses += 1
            if misses > _MAX_MISSES:
                raise ConfigError(
                    f"num_per_family: {family.name} has only about {produced} instances in pool {pool}, "
                    f"got {num}; give a smaller number"
                )
            continue
        misses = 0
        seen.add(prompt)
        produced += 1
        yield instance


def _content_hash(family: Family, content: Content) -> int:
    """64-bit hash of the family and the slots, independent of the template, case and white space.

    Instructions with the same `prompt_hash` have the same slots up to case and white space, and so the same hash.
    """
    values = (f"{name}={' '.join(content.slots[name].casefold().split())}" for name in sorted(content.slots))
    text = "\n".join((family.name, *values))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _instance(family: Family, content: Content, pool: Pool, content_hash: int) -> Instance:
    index = content_hash % 65_521 % len(family.templates)
    group = f"{family.name}/{content_hash:016x}"
    return Instance(
        instance_id=f"{family.name}/{pool}/{content_hash:016x}",
        group_id=group,
        task=family.name,
        template=f"{family.name}_{index}",
        split=_draw_split(pool, content_hash),
        instruction=family.templates[index].format(**content.slots),
        references=content.references,
        choices=content.choices,
    )
