"""Every target of the fuzzer stands its seeds, and changes of them. `./dev fuzz` has more patience."""

from __future__ import annotations

import random

import pytest

import fuzz_seeds
from fuzz_targets import TARGETS, Parts, packed

CHANGES = 150


def changed(seed: bytes, chance: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at : at + chance.randrange(9)] = b""
            case 2:
                data[at:at] = data[: chance.randrange(64)]
            case _:
                data[at : at + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"[[[[", b'":{}', b"\x80\0\0\0"])
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_stands_its_seeds_and_changes_of_them(name: str) -> None:
    chance, target, made = random.Random(name), TARGETS[name], fuzz_seeds.of(name)
    taken = [target.feed(seed) for seed in made]
    assert any(taken), "no seed is taken: what is behind the first check is never reached"
    for _ in range(CHANGES):
        target.feed(changed(chance.choice(made), chance))


def test_an_image_is_an_input_and_back() -> None:
    image = b"a" * 700 + bytes(5000) + b"b" * 3
    found = Parts(packed(image))
    assert found.pread(found.size, 0) == image
