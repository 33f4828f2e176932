//! Opening a device or file: one file description that does all I/O and carries the lock.
