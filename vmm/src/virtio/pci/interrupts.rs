//! The interrupts of a function: messages (MSI-X, PCI Local Bus 3.0, section 6.8.2), and which of them
//! tells of what (virtio 1.2, section 4.1.4.3).

use serde::{Deserialize, Serialize};

use crate::devices::ioapic::Message;
use crate::virtio::Signal;
use crate::virtio::state::{StateError, expect};

/// Says that there is no message for something.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The most messages: as many as one word has bits.
const VECTORS_MAX: usize = 64;

/// Bits of the control register in the configuration space.
const ENABLED: u16 = 1 << 15;
const ALL_MASKED: u16 = 1 << 14;

/// The bytes of an entry of the table, and of each of its four parts.
const ENTRY_BYTES: usize = 16;
const PART_BYTES: usize = 4;

/// Bit of an entry's last part: no message is sent.
const MASKED: u32 = 1;

/// Who sends messages to processors.
pub trait Messages: Send {
    /// Sends one. Where the guest wants it to go to nobody, it does.
    fn send(&self, message: Message);
}

/// The interrupts of a function.
pub struct Interrupts {
    messages: Box<dyn Messages>,
    /// Address, its upper half, data, control.
    table: Vec<[u32; 4]>,
    control: u16,
    /// Bit N: message N is due, and masked.
    pending: u64,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

opaque_debug!(Interrupts);

/// They in a snapshot.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct InterruptsState {
    pub table: Vec<[u32; 4]>,
    pub control: u16,
    pub pending: u64,
    pub config_vector: u16,
    pub queue_vectors: Vec<u16>,
}

impl Interrupts {
    /// Of a function with so many queues: a message for each, and one for its configuration.
    ///
    /// # Panics
    ///
    /// If those are too many: devices are made by this program alone.
    pub fn new(queues: usize, messages: Box<dyn Messages>) -> Interrupts {
        assert!(queues < VECTORS_MAX, "{queues} queues");
        Interrupts {
            messages,
            table: vec![[0, 0, 0, MASKED]; queues + 1],
            control: 0,
            pending: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
        }
    }

    /// Sends what the driver wants to be told by, or remembers it.
    pub fn raise(&mut self, told: Signal) {
        let mut due = 0;
        for (index, vector) in self.queue_vectors.iter().enumerate() {
            if told.queues & 1 << index != 0 {
                due |= bit(*vector);
            }
        }
        if told.config {
            due |= bit(self.config_vector);
        }
        // Without messages there is no way to tell.
        if self.control & ENABLED != 0 {
            self.pending |= due;
            self.send_pending();
        }
    }

    /// Sends what is due and not masked.
    fn send_pending(&mut self) {
        if self.pending == 0 || self.control & (ENABLED | ALL_MASKED) != ENABLED {
            return;
        }
        for (index, [address, upper, data, control]) in self.table.iter().enumerate() {
            let bit = 1 << index;
            if self.pending & bit == 0 || control & MASKED != 0 {
                continue;
            }
            self.pending &= !bit;
            // There are no processors beyond 4 GiB.
            if *upper == 0 {
                let (address, data) = (*address, *data);
                self.messages.send(Message { address, data });
            }
        }
    }

    /// The control register, but for what the guest may change.
    pub(super) fn read_only_control(&self) -> u16 {
        u16::try_from(self.table.len() - 1).expect("a few messages")
    }

    pub(super) fn set_control(&mut self, control: u16) {
        self.control = control & (ENABLED | ALL_MASKED);
        self.send_pending();
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.queue_vectors.get(queue).copied().unwrap_or(NO_VECTOR)
    }

    /// A vector that is not there is none, which the driver finds when it reads.
    pub(super) fn set_config_vector(&mut self, vector: u16) {
        self.config_vector = self.possible(vector);
    }

    pub(super) fn set_queue_vector(&mut self, queue: usize, vector: u16) {
        let possible = self.possible(vector);
        if let Some(vector) = self.queue_vectors.get_mut(queue) {
            *vector = possible;
        }
    }

    fn possible(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.table.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// The driver is gone.
    pub(super) fn forget_vectors(&mut self) {
        self.config_vector = NO_VECTOR;
        self.queue_vectors.fill(NO_VECTOR);
    }

    /// Reads the table as the guest does.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (part, offset) in data.chunks_exact_mut(PART_BYTES).zip(parts(offset)) {
            if let Some((entry, index)) = offset.filter(|(entry, _)| *entry < self.table.len()) {
                part.copy_from_slice(&self.table[entry][index].to_le_bytes());
            }
        }
    }

    /// Writes the table as the guest does: a part or two at a time.
    pub(super) fn write_table(&mut self, offset: u64, data: &[u8]) {
        for (part, offset) in data.chunks_exact(PART_BYTES).zip(parts(offset)) {
            let found = offset.and_then(|(entry, index)| Some((self.table.get_mut(entry)?, index)));
            if let Some((entry, index)) = found {
                let value = u32::from_le_bytes(part.try_into().expect("4 bytes"));
                entry[index] = if index == 3 { value & MASKED } else { value };
            }
        }
        self.send_pending();
    }

    /// Reads which messages are due as the guest does.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.pending.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = bytes.get(start..).unwrap_or_default();
        let count = there.len().min(data.len());
        data[..count].copy_from_slice(&there[..count]);
    }

    pub(super) fn save(&self) -> InterruptsState {
        InterruptsState {
            table: self.table.clone(),
            control: self.control,
            pending: self.pending,
            config_vector: self.config_vector,
            queue_vectors: self.queue_vectors.clone(),
        }
    }

    /// New interrupts become those that were saved.
    pub(super) fn restore(&mut self, state: &InterruptsState) -> Result<(), StateError> {
        let (messages, queues) = (self.table.len(), self.queue_vectors.len());
        expect("number of messages", &state.table.len(), &messages)?;
        expect("number of queues", &state.queue_vectors.len(), &queues)?;
        for (entry, saved) in self.table.iter_mut().zip(&state.table) {
            let [address, upper, data, control] = *saved;
            *entry = [address, upper, data, control & MASKED];
        }
        self.set_config_vector(state.config_vector);
        for (queue, vector) in state.queue_vectors.iter().enumerate() {
            self.set_queue_vector(queue, *vector);
        }
        let there = self.table.iter().enumerate();
        let there = there.fold(0, |bits, (index, _)| bits | 1 << index);
        self.pending = state.pending & there;
        self.set_control(state.control);
        Ok(())
    }
}

/// The bit of a message, or none.
fn bit(vector: u16) -> u64 {
    1_u64.checked_shl(vector.into()).unwrap_or(0)
}

/// From an offset in the table on: entry and part, one after the other, or nothing where the offset
/// is not that of a part.
fn parts(offset: u64) -> impl Iterator<Item = Option<(usize, usize)>> {
    let start = usize::try_from(offset).ok();
    (0..).step_by(PART_BYTES).map(move |more: usize| {
        let offset = start?.checked_add(more)?;
        let part = offset % ENTRY_BYTES / PART_BYTES;
        offset
            .is_multiple_of(PART_BYTES)
            .then_some((offset / ENTRY_BYTES, part))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps what was sent.
    #[derive(Clone, Default)]
    pub(crate) struct Sent(pub(crate) Arc<Mutex<Vec<(u32, u32)>>>);

    impl Messages for Sent {
        fn send(&self, message: Message) {
            let mut sent = self.0.lock().unwrap();
            sent.push((message.address, message.data));
        }
    }

    impl Sent {
        pub(crate) fn take(&self) -> Vec<(u32, u32)> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    /// Message N of three goes to 0xfee00000 with data 100 + N, unmasked, but none is wanted yet.
    fn interrupts() -> (Interrupts, Sent) {
        let sent = Sent::default();
        let mut interrupts = Interrupts::new(2, Box::new(sent.clone()));
        for vector in 0..3_u32 {
            let parts = [0xfee0_0000, 0, 100 + vector, 0].map(u32::to_le_bytes);
            interrupts.write_table(u64::from(vector) * 16, &parts.concat());
        }
        (interrupts, sent)
    }

    fn started() -> (Interrupts, Sent) {
        let (mut interrupts, sent) = interrupts();
        interrupts.set_control(ENABLED);
        interrupts.set_config_vector(0);
        interrupts.set_queue_vector(0, 1);
        interrupts.set_queue_vector(1, 2);
        (interrupts, sent)
    }

    #[test]
    fn each_cause_has_its_message_and_causes_that_share_one_send_it_once() {
        let (mut interrupts, sent) = started();
        let message = |vector: u32| (0xfee0_0000, 100 + vector);
        interrupts.raise(Signal::queue(1));
        assert_eq!(sent.take(), [message(2)]);
        interrupts.raise(Signal::CONFIG.and(Signal::queue(0)));
        assert_eq!(sent.take(), [message(0), message(1)]);
        interrupts.set_queue_vector(1, 1);
        interrupts.raise(Signal::queue(0).and(Signal::queue(1)));
        assert_eq!(sent.take(), [message(1)]);
        interrupts.forget_vectors();
        interrupts.raise(Signal::CONFIG.and(Signal::queue(0)));
        assert_eq!(sent.take(), []);
    }

    #[test]
    fn what_is_masked_is_sent_once_when_it_is_not_any_more() {
        let (mut interrupts, sent) = started();
        let control = 16 + 12;
        interrupts.write_table(control, &1_u32.to_le_bytes());
        interrupts.raise(Signal::queue(0));
        interrupts.raise(Signal::queue(0));
        let mut pending = [0; 8];
        interrupts.read_pending(0, &mut pending);
        assert_eq!((sent.take(), pending[0]), (Vec::new(), 0b10));
        // It goes where it is to go by then.
        interrupts.write_table(16 + 8, &7_u32.to_le_bytes());
        interrupts.write_table(control, &0_u32.to_le_bytes());
        assert_eq!(sent.take(), [(0xfee0_0000, 7)]);
        interrupts.set_control(ENABLED | ALL_MASKED);
        interrupts.raise(Signal::queue(1));
        assert_eq!(sent.take(), []);
        interrupts.set_control(ENABLED);
        assert_eq!(sent.take(), [(0xfee0_0000, 102)]);
        interrupts.set_control(0);
        interrupts.raise(Signal::queue(1));
        interrupts.set_control(ENABLED);
        assert_eq!(sent.take(), []);
    }

    #[test]
    fn vectors_and_entries_that_are_not_there_are_none() {
        let (mut interrupts, sent) = started();
        for vector in [3, 64, 0x7fff, NO_VECTOR] {
            interrupts.set_config_vector(vector);
            interrupts.set_queue_vector(0, vector);
            interrupts.set_queue_vector(9, 0);
            assert_eq!(interrupts.config_vector(), NO_VECTOR);
            assert_eq!(interrupts.queue_vector(0), NO_VECTOR);
        }
        interrupts.raise(Signal::CONFIG.and(Signal::queue(0)));
        assert_eq!(sent.take(), []);
        let before = interrupts.save();
        for (offset, bytes) in [(48, 4), (u64::MAX, 8), (2, 4), (0, 3), (0x1000, 8)] {
            interrupts.write_table(offset, &[0xff; 8][..bytes]);
            interrupts.read_table(offset, &mut [0; 8][..bytes]);
            interrupts.read_pending(offset, &mut [0; 8][..bytes]);
        }
        assert_eq!(interrupts.save(), before);
        // An address that no processor has.
        interrupts.set_queue_vector(1, 2);
        interrupts.write_table(2 * 16 + 4, &1_u32.to_le_bytes());
        interrupts.raise(Signal::queue(1));
        assert_eq!(sent.take(), []);
    }

    #[test]
    fn restored_interrupts_go_on_as_the_saved_ones() {
        let (mut interrupts, _) = started();
        interrupts.set_control(ENABLED | ALL_MASKED);
        interrupts.raise(Signal::queue(0));
        let state = interrupts.save();
        let sent = Sent::default();
        let mut other = Interrupts::new(2, Box::new(sent.clone()));
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert_eq!(sent.take(), []);
        other.set_control(ENABLED);
        assert_eq!(sent.take(), [(0xfee0_0000, 101)]);

        let wild = InterruptsState {
            table: vec![[u32::MAX; 4]; 3],
            control: u16::MAX,
            pending: u64::MAX,
            config_vector: 70,
            queue_vectors: vec![2; 2],
        };
        other.restore(&wild).unwrap();
        assert_eq!((other.pending, other.control), (0b111, 0xc000));
        other
            .restore(&InterruptsState {
                table: Vec::new(),
                ..wild
            })
            .unwrap_err();
    }
}
