//! The operator, and what status says: orders, their replies, and what must be true of them.

use vhost_remap::device::{DeviceIndex, Op, OpKind};
use vhost_remap::engine::healer::{HealerStatus, Order, OrderId, Reply, Work};
use vhost_remap::engine::view::PrimaryState;
use vhost_remap::units::Sector;

use super::{Ordered, Owner, World, trace};
use crate::config::Fault;
use crate::coverage::State;

impl World {
    pub(crate) fn order(&mut self, order: Order) {
        let id = OrderId(self.next_order);
        self.next_order += 1;
        trace!(self, "order {order:?}");
        let ordered = match &order {
            Order::Clear => Ordered::Clear(self.status().poison),
            Order::Remap(_) | Order::Release(_) => Ordered::Move,
            Order::Save | Order::Scan(_) => Ordered::Save,
            Order::PrepareResize(_) => Ordered::PrepareResize,
            Order::Resize { capacity, .. } => Ordered::Resize(*capacity),
            Order::Settle | Order::Seal(_) => Ordered::Close,
            Order::Pulse | Order::Status | Order::List { .. } => unreachable!("these change nothing"),
        };
        self.orders.insert(id, ordered);
        let now = self.now;
        self.with_healer(|healer, out| healer.order(now, id, order, out));
    }

    /// Let a pass of the scanner go on, for a minute at most, unless it waits for something.
    pub(crate) fn scan_through(&mut self) {
        let until = self.now.plus_secs(60);
        self.serve_until(|world| {
            if world.now >= until {
                return true;
            }
            world.wake_healer();
            !world.healer().is_scanning()
        });
        self.settle_down();
    }

    /// The healer's state, which it gives at once.
    pub(crate) fn status(&mut self) -> HealerStatus {
        let Reply::Status(status) = self.ask_healer(Order::Status) else { panic!("a status was asked for") };
        *status
    }

    /// An order that is answered at once.
    fn ask_healer(&mut self, order: Order) -> Reply {
        let (now, id) = (self.now, OrderId(u64::MAX));
        let mut reply = None;
        self.with_healer(|healer, out| {
            healer.order(now, id, order, out);
            let at = out.replies.iter().position(|(of, _)| *of == id).expect("it is answered at once");
            reply = Some(out.replies.remove(at).1);
        });
        reply.expect("set above")
    }

    /// All special blocks.
    pub(crate) fn list(&mut self) -> Vec<(vhost_remap::units::Block, vhost_remap::volume::map::BlockState, u8)> {
        let order = Order::List { from: Sector(0), limit: usize::MAX };
        let Reply::List(list) = self.ask_healer(order) else { panic!("a list was asked for") };
        list
    }

    pub(super) fn replied(&mut self, id: OrderId, reply: Reply) {
        let ordered = self.orders.remove(&id).expect("an order is answered once");
        trace!(self, "reply {id:?} {reply:?}");
        match (ordered, reply) {
            (Ordered::Clear(report), Reply::Done(Ok(_))) => {
                let was_poisoned = self.poisoned_at.take().is_some();
                if was_poisoned {
                    let known = report.filter(|report| !report.ranges.is_empty());
                    self.model.distrust(known.as_ref().map(|report| &report.ranges[..]));
                }
            }
            (Ordered::Resize(capacity), Reply::Resized(result)) => self.resized(capacity, result),
            (_, Reply::Settled(settled)) => self.settled = Some(settled),
            (_, Reply::Done(done)) => self.done = Some(done),
            _ => {}
        }
    }

    pub(super) fn is_metadata_write(&self, op: &Op) -> bool {
        let layout = self.config.layout();
        let data = layout.slots_start..layout.tail_start;
        op.device == DeviceIndex::SPARE && op.kind == OpKind::Write && !data.contains(&op.offset)
    }

    /// What the volume is busy with.
    fn states(&self) -> Vec<State> {
        let Some(engine) = &self.engine else { return vec![State::Script(self.script)] };
        let mode = engine.healer.view().mode;
        let flights = || self.flights.iter().filter(|flight| flight.owner == Owner::Healer);
        let ordered = |wanted: fn(&Ordered) -> bool| self.orders.values().any(wanted);
        let Work { repairs, held, is_in_doubt, free } = engine.healer.work();
        let states = [
            (State::Committing, flights().any(|flight| self.is_metadata_write(&flight.op))),
            (State::Flushing, flights().any(|flight| flight.op.kind == OpKind::Flush)),
            (State::Moving, ordered(|order| matches!(order, Ordered::Move | Ordered::Resize(..)))),
            (State::Closing, ordered(|order| matches!(order, Ordered::Close))),
            (State::Stopping, !self.stopping.is_empty()),
            (State::Poisoned, mode.poisoned),
            (State::SpareDown, !mode.spare_up),
            (State::PrimaryDown, mode.primary != PrimaryState::Up),
            (State::Repairing, repairs > 0),
            (State::Holding, held > 0),
            (State::InDoubt, is_in_doubt),
            (State::SpareFull, free == 0),
        ];
        let held: Vec<State> = states.into_iter().filter(|(_, held)| *held).map(|(state, _)| state).collect();
        if held.is_empty() { vec![State::Idle] } else { held }
    }

    /// A fault has struck.
    pub(crate) fn count_strike(&mut self, fault: Option<Fault>) {
        let Some(fault) = fault.filter(|_| self.strikes.is_some()) else { return };
        let states = self.states();
        self.strikes.as_mut().expect("looked at above").count(fault, &states);
    }

    /// What must be true whenever nothing is under way.
    pub(crate) fn check_quiet(&mut self) {
        let status = self.status();
        assert_eq!(status.fences, 0, "a fence stands with nobody behind it");
        assert_eq!((status.repairs, status.held), (0, 0), "repairs without requests");
        assert_eq!(self.errors_answered, self.errors_reported, "P1: one event for each error");
        let list = self.list();
        let mapped = list.iter().filter(|(_, state, _)| state.slot.is_some()).count();
        let lost: u64 = list.iter().map(|(_, state, _)| u64::from(state.lost.count_ones())).sum();
        assert!(status.live >= mapped, "{} live slots for {mapped} remapped blocks", status.live);
        assert_eq!(status.lost_sectors, lost);
        let slots = usize::try_from(self.config.max_remaps).expect("small");
        let spoken_for = slots - (status.live + status.free + status.retired);
        assert!(
            spoken_for == 0 || status.in_doubt > 0 || !status.mode.spare_up,
            "every slot is live, free or retired: {status:?}"
        );
    }
}
