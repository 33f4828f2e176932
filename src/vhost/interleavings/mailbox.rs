//! Messages between threads that sleep.

use super::explore;
use crate::device::memory::MemoryDisks;
use crate::device::{Device, Event, Reactor, Wait};
use crate::runtime::mailbox::mailbox;
use crate::sync::thread;
use crate::units::Time;

#[test]
fn no_message_is_lost_and_no_receiver_sleeps_on_one() {
    explore(2000, || {
        const SENDERS: u32 = 2;
        const EACH: u32 = 3;
        let (outbox, mut inbox) = mailbox().unwrap();
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let outbox = outbox.clone();
                thread::spawn(move || (0..EACH).for_each(|number| outbox.send((sender, number))))
            })
            .collect();
        // As a worker and the healer do: look when woken, and only then.
        let mut reactor = MemoryDisks::new(&[4096]).queue();
        reactor.watch(inbox.as_raw_fd(), 7);
        let (mut events, mut messages) = (Vec::new(), Vec::new());
        while messages.len() < usize::try_from(SENDERS * EACH).unwrap() {
            reactor.poll(Time(0), Wait::Forever, &mut events);
            for event in events.drain(..) {
                assert_eq!(event, Event::Ready(7));
                inbox.drain(&mut messages);
            }
        }
        for sender in 0..SENDERS {
            let of_sender = messages.iter().filter(|message| message.0 == sender).map(|message| message.1);
            assert_eq!(of_sender.collect::<Vec<_>>(), [0, 1, 2], "each once, and in order");
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}
