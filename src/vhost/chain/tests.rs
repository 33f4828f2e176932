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
