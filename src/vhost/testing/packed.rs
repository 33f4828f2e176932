//! The driver's side of a packed ring (virtio 1.3 §2.8), written a second time and apart from the device's.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const NEXT: u16 = 1;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Event flags: always, never, and for one place.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A descriptor of a chain: address, length, flags but for those of the ring.
pub(crate) type Element = (u64, u32, u16);

/// Where the three parts of a packed ring are: descriptors, driver's and device's event word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedParts {
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
}

/// A driver with one packed ring.
pub(crate) struct PackedDriver {
    memory: Arc<GuestMemoryMmap>,
    pub(crate) parts: PackedParts,
    pub(crate) size: u16,
    /// Descriptors made available, and used, since the start.
    avail: Cell<u32>,
    used: Cell<u32>,
    /// Descriptors of each buffer that the device has.
    lens: RefCell<BTreeMap<u16, u16>>,
}

impl PackedDriver {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>, parts: PackedParts, size: u16) -> PackedDriver {
        PackedDriver { memory, parts, size, avail: Cell::new(0), used: Cell::new(0), lens: RefCell::default() }
    }

    /// Begin anew, as a driver does after a reset.
    pub(crate) fn restart(&self) {
        self.memory.write_slice(&vec![0; 16 * usize::from(self.size)], GuestAddress(self.parts.descriptors)).unwrap();
        self.avail.set(0);
        self.used.set(0);
        self.lens.borrow_mut().clear();
    }

    fn index(&self, count: u32) -> u16 {
        u16::try_from(count % u32::from(self.size)).unwrap()
    }

    fn wrap(&self, count: u32) -> bool {
        (count / u32::from(self.size)).is_multiple_of(2)
    }

    fn place(&self, count: u32) -> u16 {
        self.index(count) | u16::from(self.wrap(count)) << 15
    }

    /// The place of the next chain, as in a base and in event words.
    pub(crate) fn avail_place(&self) -> u16 {
        self.place(self.avail.get())
    }

    /// The place of the next used descriptor.
    pub(crate) fn used_place(&self) -> u16 {
        self.place(self.used.get())
    }

    /// What GET_VRING_BASE says of a device that has taken and used everything up to here.
    pub(crate) fn base(&self) -> u32 {
        u32::from(self.avail_place()) | u32::from(self.used_place()) << 16
    }

    fn at(&self, index: u16) -> u64 {
        self.parts.descriptors + 16 * u64::from(index)
    }

    /// Write one descriptor, flags last.
    pub(crate) fn descriptor(&self, index: u16, (addr, len, flags): Element, id: u16) {
        let at = self.at(index);
        self.memory.write_obj(addr, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(id, GuestAddress(at + 12)).unwrap();
        self.memory.store(flags, GuestAddress(at + 14), Ordering::Release).unwrap();
    }

    /// The flags that make a descriptor available, so many descriptors after the next one.
    pub(crate) fn available_flags(&self, ahead: u16) -> u16 {
        if self.wrap(self.avail.get() + u32::from(ahead)) { AVAIL } else { USED }
    }

    /// Make a chain available, its first descriptor last. Whether there is room is the caller's affair.
    pub(crate) fn offer(&self, id: u16, chain: &[Element]) {
        let len = u16::try_from(chain.len()).unwrap();
        for ahead in (0..len).rev() {
            let (addr, bytes, flags) = chain[usize::from(ahead)];
            let more = if ahead + 1 < len { NEXT } else { 0 };
            let flags = flags | more | self.available_flags(ahead);
            self.descriptor(self.index(self.avail.get() + u32::from(ahead)), (addr, bytes, flags), id);
        }
        self.lens.borrow_mut().insert(id, len);
        self.avail.set(self.avail.get() + u32::from(len));
    }

    /// Whether the device wants to be kicked for what was made available from `before` on (virtio 1.3 §2.8.10).
    pub(crate) fn wants_kick(&self, before: u16, event_idx: bool) -> bool {
        match self.device_event() {
            (_, EVENT_DISABLE) => false,
            (place, EVENT_DESC) if event_idx => self.is_between(place, before),
            _ => true,
        }
    }

    /// Ask for an interrupt for the next used buffer.
    pub(crate) fn want_interrupt(&self, event_idx: bool) {
        self.set_driver_event(self.used_place(), if event_idx { EVENT_DESC } else { EVENT_ENABLE });
    }

    /// Whether the descriptor at that place was made available since the next one was to be at `before`.
    fn is_between(&self, place: u16, before: u16) -> bool {
        let twice = 2 * u32::from(self.size);
        let number = |place: u16| {
            let index = u32::from(place & 0x7fff);
            if place >> 15 == 1 { index } else { index + u32::from(self.size) }
        };
        let since = |place: u16| (number(place) + twice - number(before)) % twice;
        since(place) < since(self.avail_place())
    }

    /// The used buffer so many descriptors after the start, if there is one: id, length, flags, and its descriptors.
    fn used_at(&self, count: u32) -> Option<(u16, u32, u16, u16)> {
        let at = self.at(self.index(count));
        let flags: u16 = self.memory.load(GuestAddress(at + 14), Ordering::Acquire).unwrap();
        let wanted = if self.wrap(count) { AVAIL | USED } else { 0 };
        if count == self.avail.get() || flags & (AVAIL | USED) != wanted {
            return None;
        }
        let len = self.memory.read_obj(GuestAddress(at + 8)).unwrap();
        let id: u16 = self.memory.read_obj(GuestAddress(at + 12)).unwrap();
        let descriptors = *self.lens.borrow().get(&id).expect("a buffer that the device has");
        Some((id, len, flags & !(AVAIL | USED), descriptors))
    }

    /// The place after the last used buffer, whether it was taken or not.
    pub(crate) fn shown_place(&self) -> u16 {
        let mut count = self.used.get();
        while let Some((.., descriptors)) = self.used_at(count) {
            count += u32::from(descriptors);
        }
        self.place(count)
    }

    /// The next used buffer, if there is one: id, length, flags.
    pub(crate) fn take(&self) -> Option<(u16, u32, u16)> {
        let (id, len, flags, descriptors) = self.used_at(self.used.get())?;
        self.lens.borrow_mut().remove(&id);
        self.used.set(self.used.get() + u32::from(descriptors));
        Some((id, len, flags))
    }

    /// The next used buffer: id and length.
    pub(crate) fn take_used(&self) -> Option<(u16, u32)> {
        self.take().map(|(id, len, _)| (id, len))
    }

    /// Say when to interrupt: a place, and event flags.
    pub(crate) fn set_driver_event(&self, place: u16, flags: u16) {
        let word = u32::from(place) | u32::from(flags) << 16;
        self.memory.store(word, GuestAddress(self.parts.driver), Ordering::SeqCst).unwrap();
    }

    /// When the device wants to be kicked: a place, and event flags.
    pub(crate) fn device_event(&self) -> (u16, u16) {
        let word: u32 = self.memory.load(GuestAddress(self.parts.device), Ordering::SeqCst).unwrap();
        (u16::try_from(word & 0xffff).unwrap(), u16::try_from(word >> 16).unwrap())
    }
}
