//! Small, and without system calls: an interpreter that knows what is undefined runs these (`ci/test miri`).

use super::*;

/// Read through an operation's `data`, as a device does.
fn through(data: IoSlice) -> Vec<u8> {
    let mut bytes = Vec::new();
    // SAFETY: the tests keep the list behind it.
    for iovec in unsafe { data.iovecs() } {
        // SAFETY: as above, and the memory too; nobody writes to it meanwhile.
        bytes.extend(unsafe { std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), iovec.iov_len) });
    }
    bytes
}

/// Write through it.
fn fill(data: IoSlice, byte: u8) {
    // SAFETY: the tests keep the list behind it.
    for iovec in unsafe { data.iovecs() } {
        // SAFETY: as above, and the memory too; nobody looks at it meanwhile.
        unsafe { iovec.iov_base.cast::<u8>().write_bytes(byte, iovec.iov_len) };
    }
}

/// Memory that is reached only by address, as a guest's is.
struct Foreign(Box<[std::cell::UnsafeCell<u8>]>);

// SAFETY: the tests have one thread.
unsafe impl Send for Foreign {}
// SAFETY: as above.
unsafe impl Sync for Foreign {}

/// A list of these pieces (start, length) of memory of its own, whose bytes count up.
fn foreign(len: usize, pieces: &[(usize, usize)]) -> Iovecs {
    let bytes = (0..len).map(|at| std::cell::UnsafeCell::new(u8::try_from(at % 251).unwrap()));
    let memory = Arc::new(Foreign(bytes.collect()));
    let mut list = Iovecs::new();
    for &(start, len) in pieces {
        assert!(start + len <= memory.0.len());
        let base = memory.0.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: the piece lies in memory that the owner below keeps, and of which there are only cells.
        unsafe { list.push(base.wrapping_add(start), len) };
    }
    list.set_owner(memory);
    list
}

#[test]
fn a_buffer_can_move_while_a_device_works_on_it() {
    let mut buffer = AlignedBuf::copy_of(&[7; 600]);
    let data = buffer.as_io();
    assert_eq!((buffer.as_ptr() as usize % ALIGNMENT, data.count()), (0, 1));
    let moved = Box::new(buffer);
    let data_of_moved = moved.as_io();
    fill(data, 8);
    buffer = *moved;
    assert_eq!(through(data), [8; 600]);
    assert_eq!(through(data_of_moved), [8; 600]);
    assert_eq!(&buffer[..], [8; 600]);
    buffer[1] = 9;
    assert_eq!(through(buffer.as_io())[..3], [8, 9, 8]);
    assert_eq!(AlignedBuf::zeroed(0).as_io().count(), 0);
    assert!(through(IoSlice::EMPTY).is_empty());
}

#[test]
fn a_part_of_a_shared_buffer_is_read_while_others_read_it() {
    let buffer = Arc::new(AlignedBuf::copy_of(&(0..=255).collect::<Vec<u8>>()));
    let list = Iovecs::of_buffer(&buffer, 10, 3);
    let data = list.as_io();
    assert_eq!(buffer[11], 11);
    let moved = Some(list);
    assert_eq!(through(data), [10, 11, 12]);
    drop(buffer);
    assert_eq!(through(data), [10, 11, 12], "the list keeps the buffer");
    assert_eq!(moved.map(|list| list.len()), Some(3));
}

#[test]
fn pieces_are_copied_across_their_borders() {
    let list = foreign(100, &[(10, 4), (0, 0), (50, 1), (20, 7)]);
    assert_eq!((list.len(), list.as_io().count()), (12, 3));
    let mut copy = [0; 12];
    list.copy_to(0, &mut copy);
    assert_eq!(copy, [10, 11, 12, 13, 50, 20, 21, 22, 23, 24, 25, 26]);
    for from in 0..=12 {
        for len in 0..=12 - from {
            let part = list.slice(from, len);
            assert_eq!((part.len(), through(part.as_io())), (len, copy[from..from + len].to_vec()));
        }
    }
    list.copy_from(3, &[1, 2, 3, 4]);
    assert_eq!(through(list.as_io()), [10, 11, 12, 1, 2, 3, 4, 22, 23, 24, 25, 26]);
    list.copy_from(12, &[]);
}

#[test]
fn a_part_keeps_the_memory_of_the_whole() {
    let mut list = foreign(64, &[(0, 32), (32, 32)]);
    let part = list.slice(30, 4);
    let data = part.as_io();
    list.clear();
    assert!(list.is_empty());
    fill(data, 1);
    assert_eq!(through(part.as_io()), [1; 4]);
}

#[test]
#[should_panic(expected = "a piece outside of the scatter list")]
fn no_byte_beyond_the_list_is_reached() {
    foreign(64, &[(0, 10), (20, 10)]).copy_to(15, &mut [0; 6]);
}
