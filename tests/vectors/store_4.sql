-- A store of version 4, as its own version wrote it.
BEGIN TRANSACTION;
CREATE TABLE disks (
    vm          INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    attachment  TEXT NOT NULL,
    controller  INTEGER NOT NULL,
    lun         INTEGER NOT NULL,
    host_path   TEXT NOT NULL,
    identity    TEXT NOT NULL,
    kind        TEXT NOT NULL,                     -- an AttachmentType
    format      TEXT NOT NULL,                     -- a DiskFormat
    access      TEXT NOT NULL,                     -- a VMAccess
    read_only   INTEGER NOT NULL,
    size_bytes  INTEGER NOT NULL,
    state       TEXT NOT NULL,                     -- a DiskState
    since       REAL NOT NULL,
    sector_size_bytes INTEGER,                     -- of an image, where the caller gave it
    PRIMARY KEY (vm, attachment)
) STRICT, WITHOUT ROWID;
INSERT INTO "disks" VALUES(1,'a',0,1,'/d','i','VirtualDisk','raw','noop',1,512,'attached',1.0,NULL);
CREATE TABLE images (
    inode       INTEGER NOT NULL,
    birth_ns    INTEGER NOT NULL,                  -- 0: its file system does not keep it
    device      INTEGER NOT NULL,                  -- 0: the time of birth is enough
    format      TEXT NOT NULL,                     -- a DiskFormat
    size_bytes  INTEGER NOT NULL,                  -- of the file
    seen        REAL NOT NULL,
    PRIMARY KEY (inode, birth_ns, device)
) STRICT, WITHOUT ROWID;
CREATE TABLE mounts (
    vm                 INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    mount              TEXT NOT NULL,
    attachment         TEXT NOT NULL,
    guest_path         TEXT NOT NULL,
    partition          INTEGER NOT NULL,
    read_only          INTEGER NOT NULL,
    options            TEXT NOT NULL,              -- a JSON list, in the caller's order; empty for none
    filesystem         TEXT,
    ensure_filesystem  INTEGER NOT NULL,
    reformat           INTEGER NOT NULL,
    block_device       INTEGER NOT NULL,
    encryption         TEXT,                       -- NULL, 'scratch' or 'caller': never the key
    verity             TEXT,                       -- JSON
    state              TEXT NOT NULL,              -- a MountState
    since              REAL NOT NULL,
    PRIMARY KEY (vm, mount)
) STRICT, WITHOUT ROWID;
INSERT INTO "mounts" VALUES(1,'m0','a','/m/0',0,0,'',NULL,0,0,0,NULL,NULL,'mounted',0.0);
INSERT INTO "mounts" VALUES(1,'m1','a','/m/1',2,1,'["noatime", "a,b"]','xfs',0,0,0,NULL,'{"root_hash": "00ff", "hash_offset_bytes": 4096, "data_blocks": 2, "salt": "01", "algorithm": "sha256", "block_size_bytes": 4096}','mounted',1.0);
INSERT INTO "mounts" VALUES(1,'m2','a','/m/2',0,0,'',NULL,1,1,0,'scratch',NULL,'mounted',2.0);
INSERT INTO "mounts" VALUES(1,'m3','a','/m/3',0,0,'',NULL,0,0,1,'caller',NULL,'mounted',3.0);
CREATE TABLE reservations (
    vm           INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    reservation  TEXT NOT NULL,
    attachment   TEXT NOT NULL,
    mount        TEXT,                             -- NULL: attached only
    holder       TEXT NOT NULL,
    pid          INTEGER,                          -- NULL: a named holder, which outlives processes
    started      TEXT,                             -- the kernel's start time of that pid
    state        TEXT NOT NULL,                    -- a ReservationState
    since        REAL NOT NULL,
    PRIMARY KEY (vm, reservation)
) STRICT, WITHOUT ROWID;
CREATE TABLE vms (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    name     TEXT NOT NULL UNIQUE,
    uuid     TEXT NOT NULL,
    state    TEXT NOT NULL,                        -- a VMState
    created  REAL NOT NULL,                        -- seconds since the epoch
    config   TEXT NOT NULL,                        -- JSON, as VMConfig.to_json
    process  TEXT,                                 -- JSON, as QemuProcess.to_json; NULL before QEMU runs
    owner    TEXT,                                 -- JSON, as Owner.to_json; NULL: nobody owns it
    had_key  INTEGER NOT NULL DEFAULT 0            -- a caller's key was, or may have been, sent to the guest
) STRICT;
INSERT INTO "vms" VALUES(1,'worker','u','starting',1.0,'{}',NULL,NULL,1);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('vms',1);
COMMIT;
