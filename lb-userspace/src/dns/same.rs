//! Questions that are under way: those that are the same share one answer.
//!
//! So a name that everybody wants costs one question, and a question that comes back in a circle
//! waits for itself, instead of going round.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OnceCell;

use super::forward::{ForwardError, Forwarded};
use super::message::{Asked, HEADER_LEN};
use super::sockets::Transport;

/// From so many on there may be a circle, and it is looked for.
const N_SUSPICIOUS: usize = 8;

type Answer = Result<Forwarded, ForwardError>;

/// All of a question but its id, and how it goes out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// In lower case, as some resolvers change a name's case.
    bytes: Box<[u8]>,
    transport: Transport,
}

impl Key {
    pub(super) fn new(asked: &Asked<'_>, transport: Transport) -> Key {
        let mut bytes = asked.bytes()[2..].to_vec();
        let question = HEADER_LEN - 2..asked.head().len() - 2;
        bytes[question].make_ascii_lowercase();
        Key { bytes: bytes.into(), transport }
    }
}

/// The questions under way.
#[derive(Debug, Default)]
pub(super) struct Same {
    answers: Mutex<HashMap<Key, Weak<OnceCell<Answer>>>>,
}

/// A question that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct UnderWay<'a> {
    same: &'a Same,
    key: Key,
    answer: Arc<OnceCell<Answer>>,
    /// Whether it comes so often that it might go in a circle.
    pub(super) is_suspicious: bool,
}

impl Same {
    /// Joins those who ask the same at this moment.
    pub(super) fn enter(&self, key: Key) -> UnderWay<'_> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer that is there already is of a moment before: nothing is kept.
        let known = answers.get(&key).and_then(Weak::upgrade).filter(|known| !known.initialized());
        let answer = known.unwrap_or_default();
        answers.insert(key.clone(), Arc::downgrade(&answer));
        let is_suspicious = Arc::strong_count(&answer) >= N_SUSPICIOUS;
        UnderWay { same: self, key, answer, is_suspicious }
    }
}

impl UnderWay<'_> {
    /// The answer for all who wait for it. Where the one whose question it was stops waiting, the
    /// next one asks.
    pub(super) async fn answer(&self, ask: impl Future<Output = Answer>) -> Answer {
        self.answer.get_or_init(|| ask).await.clone()
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut answers = self.same.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let is_last = Arc::strong_count(&self.answer) == 1;
        let ours = Arc::downgrade(&self.answer);
        if is_last && answers.get(&self.key).is_some_and(|known| known.ptr_eq(&ours)) {
            answers.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    use tokio::sync::oneshot;

    use super::*;

    fn key(id: u16, name: &str, kind: RecordType, transport: Transport) -> Key {
        let mut message = Message::query();
        message.metadata.id = id;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        Key::new(&Asked::read(&message.to_vec().unwrap()).unwrap(), transport)
    }

    fn a_key() -> Key {
        key(1, "a.example.", RecordType::A, Transport::Udp)
    }

    #[test]
    fn what_is_the_same() {
        let rows = [
            (key(2, "A.Example.", RecordType::A, Transport::Udp), true),
            (key(1, "a.example.", RecordType::AAAA, Transport::Udp), false),
            (key(1, "aexample.", RecordType::A, Transport::Udp), false),
            (key(1, "a.example.", RecordType::A, Transport::Tcp), false),
        ];
        for (other, is_same) in rows {
            assert_eq!(other == a_key(), is_same, "{other:?}");
        }
    }

    #[tokio::test]
    async fn many_share_an_answer_and_later_ones_ask_anew() {
        let same = Same::default();
        let under_way: Vec<_> = (0..1000).map(|_| same.enter(a_key())).collect();
        let n_suspicious = under_way.iter().filter(|each| each.is_suspicious).count();
        assert_eq!(n_suspicious, 1001 - N_SUSPICIOUS);
        let first = under_way[0].answer(async { Err(ForwardError::Unanswered(1)) }).await;
        assert_eq!(first.unwrap_err(), ForwardError::Unanswered(1));
        for each in &under_way {
            let shared = each.answer(async { panic!("asked twice") }).await;
            assert_eq!(shared.unwrap_err(), ForwardError::Unanswered(1));
        }
        let later = same.enter(a_key());
        assert!(!later.is_suspicious);
        let answer = later.answer(async { Err(ForwardError::Busy) }).await;
        assert_eq!(answer.unwrap_err(), ForwardError::Busy);
        drop((under_way, later));
        assert!(same.answers.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn who_stops_waiting_takes_nobodys_answer_away() {
        let same = Same::default();
        let (first, second) = (same.enter(a_key()), same.enter(a_key()));
        let (_never, silence) = oneshot::channel();
        tokio::select! {
            biased;
            _ = first.answer(async { silence.await.unwrap() }) => panic!("answered"),
            () = tokio::task::yield_now() => {}
        }
        drop(first);
        let answer = second.answer(async { Err(ForwardError::Busy) }).await;
        assert_eq!(answer.unwrap_err(), ForwardError::Busy);
    }
}
