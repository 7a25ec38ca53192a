"""What a guest says, once it is read: plain values, which whoever keeps or sends them can encode."""

from __future__ import annotations

import msgspec

from utilityvm.guests import answers


class _Everything(answers._Document):
    words: answers.Words
    name: answers.Name
    path: answers.MountPath
    data: answers.Data
    many: list[answers.Words]


def test_what_was_read_is_of_plain_types() -> None:
    told = {"Words": "a\x1b]b", "Name": "ext4", "Path": "/data", "Data": "YQ==", "Many": ["one"]}
    read = answers.read(_Everything, told)
    assert [type(value) for value in (read.words, read.name, read.path, read.data, *read.many)] == [
        str,
        str,
        str,
        bytes,
        str,
    ]
    assert msgspec.json.decode(msgspec.json.encode(read))["Many"] == ["one"]
