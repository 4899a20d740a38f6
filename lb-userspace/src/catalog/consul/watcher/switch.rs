//! The switch `nohop/off`, as it is watched.

use std::time::{Duration, Instant};

use super::super::index::{IndexCheck, ReadMode};
use super::super::kill_switch;
use super::super::model::Subject;
use super::super::query::{Answer, QueryFailure, Response};
use super::{Asked, DENIED_PAUSE, Supervisor};

/// The least time between two reads of the switch.
const SWITCH_PAUSE: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn take_switch(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { index, said: Response::Switch(is_off), .. }) => {
                let is_sure = self.switch.ask() == ReadMode::Consistent;
                // What this run hasn't read itself an earlier one may have, of another Consul perhaps.
                let may_be_off = self.is_off || !self.model.has_switch();
                match self.switch.answered(index, now, fastrand::f64()) {
                    // One stale answer in an election must not translate what somebody wants left
                    // alone; the other way round it does no harm.
                    IndexCheck::Apply if may_be_off && !is_off && !is_sure => {
                        self.switch.doubt(now, self.timing().doubt.mul_f64(fastrand::f64()));
                    }
                    IndexCheck::Apply => self.turn(is_off, now),
                    IndexCheck::Confirm => tracing::info!(
                        index,
                        "Consul's index of nohop/off went backwards; asking again before believing it"
                    ),
                }
                self.output.set_notice(kill_switch::PATH, None);
                None
            }
            Ok(_) => return,
            Err(QueryFailure { problem, is_denied }) => {
                self.switch.failed(now, fastrand::f64());
                if is_denied {
                    // Whoever gives no right to the key doesn't use it, but should know that.
                    let fact = "Consul's key nohop/off can't switch this node, since the token may \
                                not read it: it needs key:read for nohop/off";
                    self.output.set_notice(kill_switch::PATH, Some(fact.into()));
                    self.switch.hold_until(now + DENIED_PAUSE);
                    // What another Consul said doesn't hold for this one.
                    self.output.set_off(self.is_off);
                    self.model.hear_switch();
                }
                (!is_denied).then_some(problem)
            }
        };
        self.note(Subject::Switch, problem, now);
    }

    /// Believes what the switch says.
    fn turn(&mut self, is_off: bool, now: Instant) {
        let is_news = std::mem::replace(&mut self.is_off, is_off) != is_off;
        if is_news {
            let what = if is_off { "off" } else { "on again" };
            tracing::warn!("Consul's key nohop/off switches translation {what}");
            self.is_unsaved = true;
        }
        // A question about a key that isn't there comes back at every write of any other key.
        let pause = if is_news { SWITCH_PAUSE } else { self.timing().switch };
        self.switch.hold_until(now + pause.mul_f64(1.0 + fastrand::f64() / 5.0));
        self.output.set_off(is_off);
        self.model.hear_switch();
    }
}
