-- The store, version 5: what this host knows of its VMs, and each VM's journal.
--
-- A VM's rows go with it. Its `id` is never used again, so a process that still writes for a VM that was removed is
-- refused and does not write into the next VM of that name. The journal's tables have no rowid and no second index: a
-- small write then touches one page, and a journal line costs some 10 us.
--
-- No column ever holds a caller's encryption key: `mounts.config` has only its kind.

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

CREATE TABLE mounts (
    vm                 INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    mount              TEXT NOT NULL,
    attachment         TEXT NOT NULL,
    guest_path         TEXT NOT NULL,
    config             TEXT NOT NULL,              -- JSON: the fields of a MountConfig that are not its defaults
    state              TEXT NOT NULL,              -- a MountState
    since              REAL NOT NULL,
    notes              TEXT NOT NULL DEFAULT '[]', -- JSON: what the guest said when it was mounted, a list of texts
    PRIMARY KEY (vm, mount)
) STRICT, WITHOUT ROWID;

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

-- What each image was when it was opened last; see formats.py. No VM's, and not removed with one.
CREATE TABLE images (
    inode       INTEGER NOT NULL,
    birth_ns    INTEGER NOT NULL,                  -- 0: its file system does not keep it
    device      INTEGER NOT NULL,                  -- 0: the time of birth is enough
    format      TEXT NOT NULL,                     -- a DiskFormat
    size_bytes  INTEGER NOT NULL,                  -- of the file
    seen        REAL NOT NULL,
    PRIMARY KEY (inode, birth_ns, device)
) STRICT, WITHOUT ROWID;
