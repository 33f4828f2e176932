use super::*;
use crate::vhost::testing::{DATA, Guest, chain_of, readable, writable};

fn check<T>(guest: &Guest, head: u16, see: impl FnOnce(Chain<'_>) -> T) -> Result<T, ChainError> {
    Scatter::default().walk(&guest.ring(), &guest.map(), head).map(see)
}

fn refusal(guest: &Guest, head: u16) -> ChainError {
    check(guest, head, |_| ()).unwrap_err()
}

#[test]
fn descriptors_in_a_row_are_one_piece() {
    let guest = Guest::new(16);
    let head = chain_of(&guest, &[readable(DATA, 16), writable(DATA + 0x1000, 512), writable(DATA + 0x1200, 1)]);
    check(&guest, head, |chain| {
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 513));
        assert_eq!(chain.pieces(), 1);
        assert!(!chain.is_faulty());
    })
    .unwrap();
}

#[test]
fn a_buffer_over_two_regions_is_two_pieces() {
    let guest = Guest::new(16);
    let end = guest.first_region_end();
    let head = chain_of(&guest, &[readable(end - 8, 16)]);
    check(&guest, head, |chain| {
        let mut bytes = [1; 16];
        assert!(chain.read_at(0, &mut bytes));
        assert_eq!((bytes, chain.pieces()), ([0; 16], 2));
        assert!(!chain.read_at(1, &mut bytes));
    })
    .unwrap();
}

#[test]
fn a_buffer_outside_is_faulty_but_leaves_the_status_byte() {
    let guest = Guest::new(16);
    for data in [writable(1 << 40, 512), writable(u64::MAX - 100, 512), writable(DATA, u32::MAX)] {
        let head = chain_of(&guest, &[readable(DATA, 16), data, writable(DATA + 600, 1)]);
        let seen = check(&guest, head, |chain| (chain.is_faulty(), chain.has_status()));
        assert_eq!(seen, Ok((true, true)), "{data:?}");
    }
    let head = chain_of(&guest, &[readable(DATA, 16), writable(DATA, 512), writable(1 << 40, 1)]);
    assert!(check(&guest, head, |chain| !chain.has_status()).unwrap());
}

#[test]
fn broken_structures_are_refused() {
    let guest = Guest::new(4);
    guest.descriptor(0, DATA, 1, F_NEXT, 1);
    guest.descriptor(1, DATA, 1, F_NEXT, 0);
    assert_eq!(refusal(&guest, 0), ChainError::Loop);
    guest.descriptor(1, DATA, 1, F_NEXT, 4);
    assert_eq!(refusal(&guest, 0), ChainError::OutsideTable(4));
    assert_eq!(refusal(&guest, 4), ChainError::OutsideTable(4));
    guest.descriptor(1, DATA, 16, F_INDIRECT | F_NEXT, 2);
    assert_eq!(refusal(&guest, 0), ChainError::IndirectAndNext);
    for len in [0, 8, 17, 32_769 * 16] {
        guest.descriptor(0, DATA, len, F_INDIRECT, 0);
        assert_eq!(refusal(&guest, 0), ChainError::IndirectLength(len));
    }
    guest.descriptor(0, 1 << 40, 16, F_INDIRECT, 0);
    assert_eq!(refusal(&guest, 0), ChainError::IndirectUnmapped);
    guest.descriptor(0, u64::MAX - 7, 32, F_INDIRECT, 0);
    assert_eq!(refusal(&guest, 0), ChainError::IndirectUnmapped);
    guest.indirect(DATA, &[(DATA, 16, F_INDIRECT, 0)]);
    guest.descriptor(0, DATA, 16, F_INDIRECT, 0);
    assert_eq!(refusal(&guest, 0), ChainError::NestedIndirect);
    guest.indirect(DATA, &[(DATA, 16, F_NEXT, 0)]);
    assert_eq!(refusal(&guest, 0), ChainError::Loop);
    let head = chain_of(&guest, &[writable(DATA, 16), readable(DATA, 16)]);
    assert_eq!(refusal(&guest, head), ChainError::ReadableAfterWritable);
}

#[test]
fn an_indirect_table_may_be_longer_than_the_queue_and_cross_regions() {
    let guest = Guest::new(4);
    let table = guest.first_region_end() - 24;
    let entries: Vec<_> =
        (0..515_u16).map(|i| (DATA + 2 * u64::from(i), 1, if i < 514 { F_NEXT } else { 0 }, i + 1)).collect();
    guest.indirect(table, &entries);
    guest.descriptor(0, table, 515 * 16, F_INDIRECT, 0);
    assert_eq!(check(&guest, 0, |chain| (chain.readable_len(), chain.pieces())), Ok((515, 515)));
}

fn list(chain: &[(u64, u32, u16)]) -> Vec<Descriptor> {
    chain.iter().map(|&(addr, len, flags)| Descriptor { addr, len, flags, next: 0 }).collect()
}

fn check_list<T>(guest: &Guest, chain: &[(u64, u32, u16)], see: impl FnOnce(Chain<'_>) -> T) -> Result<T, ChainError> {
    Scatter::default().walk_list(&list(chain), &guest.map()).map(see)
}

#[test]
fn a_list_of_a_packed_ring_is_walked_in_its_order() {
    let guest = Guest::new(16);
    let chain = [(DATA, 16, F_NEXT), (DATA + 0x1000, 512, F_NEXT | F_WRITE), (DATA + 0x2000, 1, F_WRITE)];
    let seen = check_list(&guest, &chain, |chain| (chain.readable_len(), chain.writable_len(), chain.pieces()));
    assert_eq!(seen, Ok((16, 513, 2)));
    let seen = check_list(&guest, &chain[1..], |chain| chain.has_status());
    assert_eq!(seen, Ok(true));
    let refusal = |chain: &[(u64, u32, u16)]| check_list(&guest, chain, |_| ()).unwrap_err();
    assert_eq!(refusal(&[chain[1], chain[0]]), ChainError::ReadableAfterWritable);
    assert_eq!(refusal(&[chain[0], (DATA, 16, F_INDIRECT)]), ChainError::IndirectAndNext);
    assert_eq!(refusal(&[(DATA, 16, F_INDIRECT | F_NEXT), chain[2]]), ChainError::IndirectAndNext);
}

/// Of its entries' flags only F_WRITE counts, and their order is that of the table (virtio 1.3 §2.8.7).
#[test]
fn a_table_of_a_packed_ring_is_all_of_its_chain() {
    let guest = Guest::new(16);
    // Beginning in one region of memory, and going on in the next.
    let table = guest.first_region_end() - 24;
    let entry = |at: u64, addr: u64, len: u32, flags: u16| {
        guest.write(at, &addr.to_le_bytes());
        guest.write(at + 8, &len.to_le_bytes());
        guest.write(at + 12, &[0xff; 2]);
        guest.write(at + 14, &flags.to_le_bytes());
    };
    entry(table, DATA, 16, 0);
    entry(table + 16, DATA + 0x1000, 512, F_WRITE | F_INDIRECT | F_NEXT);
    entry(table + 32, DATA + 0x2000, 1, F_WRITE | 0x8080);
    let seen = |len: u32, flags: u16| {
        check_list(&guest, &[(table, len, flags)], |chain| (chain.readable_len(), chain.writable_len()))
    };
    assert_eq!(seen(48, F_INDIRECT), Ok((16, 513)));
    assert_eq!(seen(32, F_INDIRECT | F_WRITE), Ok((16, 512)));
    for len in [0, 8, 17, 32_769 * 16] {
        assert_eq!(seen(len, F_INDIRECT), Err(ChainError::IndirectLength(len)));
    }
    for at in [1 << 40, u64::MAX - 7] {
        assert_eq!(check_list(&guest, &[(at, 32, F_INDIRECT)], |_| ()), Err(ChainError::IndirectUnmapped));
    }
}
