"""The inputs that each target begins with: what real programs wrote, and what we write ourselves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import manifests_made
from fuzz_targets import packed
from scsi_bench import Bench
from utilityvm.bridge import messages
from utilityvm.bridge.frame import encode, guest_json, host_json
from utilityvm.scsi.ports import Verity
from utilityvm.server import routes
from utilityvm.store import journal
from utilityvm.templates import manifest

VECTORS: Final = Path(__file__).parents[1] / "vectors"
_IMAGES: Final = (
    ("qcow2", "-o compat=0.10"),
    ("qcow2", "-o compat=1.1,extended_l2=on,cluster_size=64k"),
    ("qcow2", "-o preallocation=metadata"),
    ("vpc", "-o subformat=dynamic"),
    ("vpc", "-o subformat=fixed,force_size=on"),
    ("vhdx", "-o block_size=1M"),
    ("vmdk", ""),
    ("vmdk", "-o subformat=streamOptimized"),
    ("raw", ""),
)


def images() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        made = [b""]
        for kind, options in _IMAGES:
            command = ["qemu-img", "create", "-q", "-f", kind, *options.split(), str(path), "256K"]
            subprocess.run(command, check=True, capture_output=True)
            made.append(packed(path.read_bytes()))
            path.unlink()
        for more in (["-b", "/etc/passwd", "-F", "raw"], ["-o", f"data_file={folder}/other,data_file_raw=on"]):
            command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", *more, str(path), "256K"]
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                made.append(packed(path.read_bytes()))
        return made


def from_guest() -> list[bytes]:
    recorded = json.loads((VECTORS / "gcs.json").read_text())
    made = [bytes.fromhex(one["hex"]) for one in recorded["host_receives"]]
    bodies: list[dict[str, Any]] = [
        {"Result": 0, "Version": 4, "Capabilities": {"Utilityvm": {"Agent": 2, "Kernel": "6.1", "BootId": "b"}}},
        {"Result": 0, "MountPaths": ["/data"], "Present": True},
        {"Result": 0, "More": True, "Mounts": [{"MountPath": "/x", "Controller": 0, "Lun": 1, "Partition": 0}]},
        {"Result": -1, "ErrorMessage": "no", "Utilityvm": {"Kind": "busy", "Holders": ["sh"], "Remedy": "end it"}},
        {"Process": 1, "Stream": "out", "Data": "eHg="},
        {"Process": 1, "ExitCode": 0},
        {"Process": 1, "Bytes": 65536},
        {"Result": 0, "Flushed": ["/a"], "Unclean": ["/b"], "BootId": "c"},
    ]
    return made + [encode(messages.response_to(messages.PING), 7, guest_json(body)) for body in bodies]


def from_host() -> list[bytes]:
    extension = {"Key": "A" * 86 + "==", "TimeoutMs": 10, "MayHold": [[0, 512]], "Scratch": False}
    settings = {"MountPath": "/data", "Controller": 1, "Lun": 2, "Options": ["ro", 'a="b,c"']}
    bodies = [
        messages.negotiate_request(),
        messages.modify_request("Add", "MappedVirtualDisk", settings, extension=extension),
        messages.request(Controller=0, Lun=1, Check=1 << 30),
        messages.request(Process=1, Argv=["sh", "-c", "ls"], Env={"A": "b"}, Cwd="/", Stdin=True),
        messages.request(Process=1, Data="eHg="),
    ]
    made = [encode(messages.MODIFY, 3, host_json(body)) for body in bodies]
    return [*made, b"".join(made)]


def gob() -> list[bytes]:
    recorded = json.loads((VECTORS / "gob.json").read_text())
    return [
        bytes.fromhex(one["hex"])
        for kind, vectors in recorded.items()
        if isinstance(vectors, list) and kind != "layout"
        for one in vectors
    ]


def saved_states() -> list[bytes]:
    recorded = json.loads((VECTORS / "hcs_head.json").read_text())
    return [bytes.fromhex(one["payload_hex"]) for one in recorded["controller"]["save_payloads"]]


async def _fill(bench: Bench) -> None:
    await bench.add("/a", "/1", options=("noatime",))
    await bench.add("/b", "/2", verity=Verity(root_hash=bytes(32), hash_offset_bytes=4096))
    await bench.attach("/c", read_only=False)


def states() -> list[bytes]:
    async def made() -> bytes:
        bench = Bench()
        await _fill(bench)
        return (await bench.manager.export_state()).to_json()

    return [asyncio.run(made()), b"{}", b'{"version":1}']


def journal_rows() -> list[bytes]:
    async def made() -> list[Any]:
        bench = Bench()
        await _fill(bench)
        return bench.journal.read()

    tables: list[list[Any]] = [[], [], []]
    for record in asyncio.run(made()):
        sql, values = journal._put(1, record)
        number = 0 if " disks " in sql else 1 if " mounts " in sql else 2
        tables[number].append(list(values))
    return [json.dumps(tables).encode()]


def manifests() -> list[bytes]:
    return [manifest.encode(manifests_made.manifest("warm"))]


def disk_words() -> list[bytes]:
    words = ("a.img:/data:ro", "/a:b:/c", "256M", "1.5G", "90s", ".5", "5m", "100", "1e9", "a:/b:/c:rw", "\u0661")
    return [word.encode() for word in words]


def http() -> list[bytes]:
    made = [
        f"{route.method} {route.path}?wait_s=0&timeout_s=1\n\n".replace("{vm}", "worker")
        .replace("{reservation}", "0123456789ab")
        .replace("{program}", "0123456789ab")
        for route in routes.ROUTES
    ]
    made += [one.replace("?wait_s=0&timeout_s=1", "") for one in made]
    disk = {"host_path": "/a.raw", "guest_path": "/data", "read_only": True, "holder": "h", "timeout_s": 5}
    program = {"command": ["sh", "-c", "true"], "stdin": True, "env": {"A": "b"}, "cwd": "/"}
    typed = "\ncontent-type: application/json\n\n"
    made += [
        f"PUT /v1/vms/worker/reservations/0123456789ab{typed}{json.dumps(disk)}",
        f"PUT /v1/vms/worker/programs/0123456789ab{typed}{json.dumps(program)}",
        f"POST /v1/vms/worker/remove{typed}{json.dumps({'host_path': '/a.raw'})}",
        f"POST /v1/vms/worker/resize{typed}{json.dumps({'host_path': '/a.raw', 'size_bytes': 1 << 20})}",
        "PUT /v1/vms/worker/programs/0123456789ab/input?at=0&last=true\ncontent-type: application/octet-stream\n\nx",
        "GET /v1\ncontent-length: many\norigin: http://x\n\n",
        "GET /v1/openapi.json\n\n",
    ]
    return [one.encode() for one in made]


def of(target: str) -> list[bytes]:
    made: list[bytes] = globals()[target]()
    return made
