//! The switch `nohop/off`, as it is watched.

use std::time::{Duration, Instant};

use super::super::ask::{Answer, Failure, Said};
use super::super::model::Subject;
use super::super::off;
use super::{Asked, DENIED_PAUSE, Supervisor};

/// The least time between two reads of the switch.
const SWITCH_PAUSE: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn take_switch(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { index, said: Said::Switch(is_off), .. }) => {
                self.switch.answered(index, now, fastrand::f64());
                self.switch.hold_until(now + SWITCH_PAUSE);
                if std::mem::replace(&mut self.is_off, is_off) != is_off {
                    let what = if is_off { "off" } else { "on again" };
                    tracing::warn!("Consul's key nohop/off switches translation {what}");
                    self.is_unsaved = true;
                }
                self.output.set_off(is_off);
                self.output.set_fact(off::PATH, None);
                None
            }
            Ok(_) => return,
            Err(Failure { problem, is_denied }) => {
                self.switch.failed(now, fastrand::f64());
                if is_denied {
                    // Whoever gives no right to the key doesn't use it, but should know that.
                    let fact = "Consul's key nohop/off can't switch this node, since the token may \
                                not read it: it needs key:read for nohop/off";
                    self.output.set_fact(off::PATH, Some(fact.into()));
                    self.switch.hold_until(now + DENIED_PAUSE);
                }
                (!is_denied).then_some(problem)
            }
        };
        self.note(Subject::Switch, problem, now);
    }
}
